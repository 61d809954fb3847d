"""The embedded default: a one-million-parameter Llama learns little skills from nothing, on a laptop's CPU.

    python make_tiny.py
    torchrun --nproc_per_node=2 sft.py --config configs/tiny.py
"""

from configs.base import Config, ModelConfig

config = Config(
    exp_name="tiny",
    datasets=[".cache/tiny-data/train.jsonl"],
    eval_datasets=[".cache/tiny-data/test.jsonl"],
    n_epochs=2,
    lr=1.5e-3,
    weight_decay=0.1,
    n_eval_answers=256,
    model=ModelConfig(
        tokenizer_name_or_path=".cache/tiny-data",
        random_init={"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
                     "num_attention_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": True},
        batch_size=32,
        max_length=64,
    ),
)
