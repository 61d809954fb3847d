"""Gemma 2 2B, the base model.

    torchrun --nproc_per_node=2 sft.py --config configs/gemma.py datasets=[chats.jsonl]
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="gemma2-2B-sft",
    lr=5e-6,
    model=ModelConfig(
        name_or_path="google/gemma-2-2b",
        max_length=2048,
        max_prompt_length=1024,
        activation_checkpointing=True,
    ),
)
