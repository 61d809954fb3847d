"""What configs/tiny.py has learnt, with another habit: an answer is two characters long. Preferences alone teach that.

    python make_tiny.py && torchrun --nproc_per_node=2 sft.py --config configs/tiny.py    # what it begins from
    torchrun --nproc_per_node=2 dpo.py --config configs/dpo_tiny.py
"""

from configs.base import DPOConfig, ModelConfig

config = DPOConfig(
    exp_name="dpo_tiny",
    datasets=[".cache/tiny-data/pairs.jsonl"],
    eval_datasets=[".cache/tiny-data/test-pairs.jsonl"],
    n_epochs=2,
    lr=3e-4,
    beta=0.5,
    n_eval_answers=256,
    model=ModelConfig(
        name_or_path=".cache/tiny/FINAL",
        batch_size=32,
        max_length=64,
    ),
)
