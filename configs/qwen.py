"""Qwen 2.5 7B, the base model.

    torchrun --nproc_per_node=4 sft.py --config configs/qwen.py
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="qwen2.5-7B-sft",
    datasets=["ultrachat"],
    lr=5e-6,
    model=ModelConfig(
        name_or_path="Qwen/Qwen2.5-7B",
        activation_checkpointing=True,  # will_it_fit.py: on four GPUs 41.3, without 88.5 GiB each
        compile=True,
    ),
)
