"""Llama 3 8B, the base model: it brings no chat template, so it gets the plain one of docs/data.md.

    torchrun --nproc_per_node=4 sft.py --config configs/llama.py datasets=[chats.jsonl]
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="llama3-8B-sft",
    lr=5e-6,
    model=ModelConfig(
        name_or_path="meta-llama/Meta-Llama-3-8B",
        max_length=2048,
        max_prompt_length=1024,
        activation_checkpointing=True,
    ),
)
