"""Qwen 2.5 7B, the base model.

    torchrun --nproc_per_node=4 sft.py --config configs/qwen.py datasets=[chats.jsonl]
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="qwen2.5-7B-sft",
    lr=5e-6,
    model=ModelConfig(
        name_or_path="Qwen/Qwen2.5-7B",
        max_length=2048,
        max_prompt_length=1024,
        activation_checkpointing=True,
    ),
)
