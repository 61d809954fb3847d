"""SmolLM2-135M-Instruct, small enough to fine-tune on a laptop.

    torchrun --nproc_per_node=2 sft.py --config configs/smollm2.py
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="smollm2-135M-sft",
    datasets=["ultrachat"],
    lr=2e-5,
    model=ModelConfig(name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct"),
)
