"""Pythia 2.8B.

    torchrun --nproc_per_node=2 sft.py --config configs/pythia.py datasets=[chats.jsonl]
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="pythia2.8B-sft",
    lr=1e-5,
    model=ModelConfig(
        name_or_path="EleutherAI/pythia-2.8b",
        max_length=2048,
        max_prompt_length=1024,
        activation_checkpointing=True,
    ),
)
