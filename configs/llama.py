"""Llama 3 8B, the base model: it brings no chat template, so it gets the plain one of docs/data.md.

    torchrun --nproc_per_node=4 sft.py --config configs/llama.py
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="llama3-8B-sft",
    datasets=["ultrachat"],
    lr=5e-6,
    model=ModelConfig(
        name_or_path="meta-llama/Meta-Llama-3-8B",
        activation_checkpointing=True,  # will_it_fit.py: on four GPUs 42.6, without 91.1 GiB each
        compile=True,
    ),
)
