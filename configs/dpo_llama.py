"""What configs/llama.py has trained, by direct preference optimisation.

    torchrun --nproc_per_node=4 dpo.py --config configs/dpo_llama.py datasets=[ultrabin]
"""

from configs.base import DPOConfig, ModelConfig

config = DPOConfig(
    exp_name="llama3-8B-dpo",
    datasets=["ultrabin"],
    lr=5e-7,
    model=ModelConfig(
        name_or_path=".cache/llama3-8B-sft/FINAL",
        activation_checkpointing=True,  # will_it_fit.py: on four GPUs 42.6, without 91.0 GiB each, as in SFT
        compile=True,
    ),
)
