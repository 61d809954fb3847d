"""Gemma 2 2B, the base model.

    torchrun --nproc_per_node=2 sft.py --config configs/gemma.py
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="gemma2-2B-sft",
    datasets=["ultrachat"],
    lr=5e-6,
    model=ModelConfig(
        name_or_path="google/gemma-2-2b",
        activation_checkpointing=True,  # will_it_fit.py: on two GPUs 28.7 GiB each, without 91.5
    ),
)
