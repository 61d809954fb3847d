"""Llama 3.1 8B Instruct on one GPU of 16 GB, 11.3 GiB foretold: frozen linears in 4 bits (docs/lora.md), adapters beside them.

    python sft.py --config configs/llama_8b_qlora.py datasets=[chats.jsonl]
"""

from configs.base import Config, ModelConfig, PeftConfig

config = Config(
    exp_name="llama3-8B-qlora",
    datasets=["ultrachat"],
    lr=1e-4,
    model=ModelConfig(
        name_or_path="meta-llama/Llama-3.1-8B-Instruct",
        microbatch_tokens=2048,
        activation_checkpointing=True,
        use_peft=True,
        peft=PeftConfig(lora_r=16, lora_alpha=32, quantise=True),
    ),
)
