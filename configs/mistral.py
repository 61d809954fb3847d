"""Mistral 7B v0.3, the base model.

    torchrun --nproc_per_node=4 sft.py --config configs/mistral.py
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="mistral-7B-sft",
    datasets=["ultrachat"],
    lr=5e-6,
    model=ModelConfig(
        name_or_path="mistralai/Mistral-7B-v0.3",
        activation_checkpointing=True,  # will_it_fit.py: on four GPUs 37.3, without 84.3 GiB each
        compile=True,
    ),
)
