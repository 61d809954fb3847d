"""Pythia 2.8B.

    torchrun --nproc_per_node=2 sft.py --config configs/pythia.py
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="pythia2.8B-sft",
    datasets=["ultrachat"],
    lr=1e-5,
    model=ModelConfig(name_or_path="EleutherAI/pythia-2.8b"),  # will_it_fit.py: on two GPUs 49.0 GiB each
)
