"""Mistral 7B v0.3, the base model.

    torchrun --nproc_per_node=4 sft.py --config configs/mistral.py datasets=[chats.jsonl]
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="mistral-7B-sft",
    lr=5e-6,
    model=ModelConfig(
        name_or_path="mistralai/Mistral-7B-v0.3",
        max_length=2048,
        max_prompt_length=1024,
        activation_checkpointing=True,
    ),
)
