"""A tiny configuration of every type with the structure of the real one: each kind of layer, windows, caps, scales, experts."""

import torch
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

VOCABULARY, LAYERS = 128, 4
SIZES = {key: size for size, keys in {  # of what is larger by default
    1: "num_dense_layers num_nextn_predict_layers",
    2: """first_k_dense_replace linear_num_key_heads mamba_n_groups mamba_ngroups moe_k moe_top_k moe_topk n_groups
        num_experts_per_tok num_experts_per_token num_kv_shared_layers swa_num_key_value_heads topk_group""",
    4: """attention_heads decoder_attention_heads decoder_layers depth encoder_attention_heads encoder_layers linear_num_heads
        linear_num_value_heads n_group n_head n_heads n_layer n_layers num_attention_heads num_blocks num_codebooks
        num_decoder_attention_heads num_decoder_layers num_encoder_attention_heads num_encoder_layers num_expert_group num_heads
        num_hidden_layers num_layers o_groups swa_num_attention_heads zero_expert_num""",
    # Few heads of an indexer would give scores that are exactly zero, of which any may be among the best.
    8: """attention_chunk_size attention_window_size floor_scale gated_norm_rank index_n_heads index_topk local_attention
        local_attention_window_len log_scaling_n_floor mamba_n_heads mamba_num_heads moe_num_experts n_mamba_heads
        n_routed_experts num_experts num_local_experts qk_rope_head_dim rel_extent rotary_dim sliding_window
        sliding_window_size window_size""",
    16: """adapter_rank attention_head_size block_size chunk_size d_head d_kv d_rel dim_head global_head_dim hc_lowrank head_dim
        hidden_size_per_layer_input image_size index_head_dim keep_window_size kv_channels kv_lora_rank laurel_rank
        linear_head_dim linear_key_head_dim linear_value_head_dim loop_gate_rank
        mamba_chunk_size mamba_d_head mamba_d_state mamba_dt_rank
        mamba_head_dim mamba_headdim o_lora_rank original_max_position_embeddings patch_size qk_nope_head_dim
        router_hidden_size ssm_state_size state_size swa_head_dim time_step_rank v_head_dim""",
    24: "q_lora_rank",
    48: """expert_ffn_hidden_size moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size""",
    64: """adapter_in_dim adapter_input_size adapter_out_dim attention_hidden_size backbone_hidden_size context_length d_model
        emb_dim embed_dim embedding_dim embedding_size hidden_size hidden_size_global input_embedding_size input_size lru_width
        max_position_embeddings max_seq_len max_source_positions max_target_positions n_ctx n_embd n_positions out_hidden_size
        output_embedding_size projector_input_dim projector_output_dim vision_output_dim word_embed_proj_dim""",
    96: """centroid_intermediate_size d_ff d_inner decoder_ffn_dim dense_intermediate_size dff dim_ff encoder_ffn_dim
        feed_forward_size ffn_dim ffn_hidden_size intermediate_size intermediate_size_mlp mlp_dim""",
    128: """decoder_vocab_size encoder_hash_byte_group_vocab mamba_d_ssm unpadded_vocab_size vocab_size
        vocab_size_per_layer_input""",
}.items() for key in keys.split()}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # all others count down from the last
COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

TWO_KINDS = ["linear_attention", "full_attention"] * 2
CONVOLUTIONS = {"num_hidden_layers": 4, "full_attn_idxs": ..., "layer_types": ["conv", "full_attention"] * 2}
WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": ...}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
ROPES = {"sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
         "full_attention": {"rope_theta": 1e6, "rope_type": "default"}}
LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 48, "factor": 4.0,
             "short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
GEMMA_4 = {"per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}, "attention_k_eq_v": True,
           "num_global_key_value_heads": 2}
GEMMA_4_MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48}
GEMMA_4_OWN = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
DOTS_3 = {"head_dim": 24, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_num_attention_heads": 4, "swa_v_head_dim": 8,
          "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 24, "per_layer_config": ...}
QWEN_4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
          "ple_layer_ids": [1], "ngram_vocab_size_base": 64, "split_ngram_parts": 2}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
         "attention_head_dim": 32}
NEEDED = {  # what the default configuration must be made with
    "gemma4": {"vision_config": {}, "audio_config": {}}, "gemma4_unified": {"vision_config": {}, "audio_config": {}},
    "gemma4_assistant": {"text_config": GEMMA_4_OWN | {"num_kv_shared_layers": 30}},
}
CHANGES = {  # to the shrunk default; a dict is merged, ... takes a key away
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"}, "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": ROPES},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 64}},
    "deepseek_v2": ROUTED | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": ROUTED, "dots3_note": {"text_config": DOTS_3}, "dots3_note_text": DOTS_3,
    "emu3": {"vocabulary_map": {"<image>": 127, "<|extra_200|>": 126, "<|visual token 000000|>": 125}},
    "gemma4": {"text_config": GEMMA_4 | GEMMA_4_MOE}, "gemma4_assistant": {"text_config": GEMMA_4_OWN},
    "gemma4_text": GEMMA_4 | {"attention_k_eq_v": False, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gemma4_unified": {"text_config": GEMMA_4}, "gemma4_unified_text": GEMMA_4,
    "granitemoehybrid": {"layer_types": TWO_KINDS},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2": CONVOLUTIONS, "lfm2_moe": CONVOLUTIONS,
    "llama": {"rope_parameters": LLAMA_3_ROPE, "num_key_value_heads": 2},
    "llama4": {"text_config": {"moe_layers": [1, 3]}}, "llama4_text": {"moe_layers": [1, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 16}, "ministral": {"head_dim": 16}, "nemotron": {"num_key_value_heads": 2},
    "phi3": {"original_max_position_embeddings": 48, "rope_parameters": LONG_ROPE},
    "phimoe": {"rope_parameters": LONG_ROPE | {"short_mscale": 1.2, "long_mscale": 1.3}},
    "qwen2": WINDOWED, "qwen3": WINDOWED,
    "qwen4_exp": {"text_config": QWEN_4}, "qwen4_exp_text": QWEN_4,
    "reformer": {"axial_pos_embds": False, "num_buckets": 4, "hash_seed": 1, "attn_layers": ["local", "lsh"] * 2},
    "xlm": {"causal": True}, "xlstm": {"autocast_kernel_dtype": "float32"}, "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA, "zamba2": ZAMBA | {"hybrid_layer_ids": [1, 3], "use_mem_rope": True, "use_shared_attention_adapter": True},
}


def count_layers(config: dict) -> int:
    return next((config[key] for key in COUNTS if config.get(key)), 0)


def pick_layers(config: dict) -> list[int]:
    """Which of a default configuration's layers to keep: the first of each kind, the last, and others from the end."""
    count = count_layers(config)
    lists = [map(str, value) for value in config.values()
             if isinstance(value, list) and len(value) == count and value != [*range(count)]]  # not the layers' own numbers
    first = {}
    for i, kind in enumerate(zip(*lists)):
        first.setdefault(kind, i)
    kept = {*first.values(), *range(count - 1, count)}
    others = [i for i in reversed(range(count)) if i not in kept]
    return sorted([*kept, *others[:max(0, LAYERS - len(kept))]])


def shrink(config: dict) -> dict:
    """Returns what to change in a default configuration: sizes, tokens, dropout, and numbers that do nothing as they are."""
    small, layers, count, last_token = {}, pick_layers(config), count_layers(config), VOCABULARY - 1
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config") and value:
            small[key] = shrink(value)
        elif key in TOKENS:
            small[key] = TOKENS[key]
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int):
            small[key], last_token = last_token, last_token - 1
        elif isinstance(value, list) and count and len(value) == count:
            small[key] = [value[i] for i in layers]
        elif key in COUNTS and value:
            small[key] = len(layers)
        elif key in ("num_key_value_heads", "num_kv_heads") and value:
            small[key] = 4 if value in (config.get("num_attention_heads"), config.get("n_heads")) else 2
        elif key in ("head_dim", "qk_head_dim") and value and config.get("qk_rope_head_dim"):
            small[key] = {config["qk_rope_head_dim"]: 8, config.get("qk_head_dim"): 24}.get(value, 16)
        elif "soft" in key and "cap" in key and isinstance(value, float):
            small[key] = 3.0
        elif isinstance(value, float) and value == 1.0 and ("multiplier" in key or "scal" in key):
            small[key] = 0.8
        elif isinstance(value, float) and "drop" in key or key.endswith("jitter_noise"):
            small[key] = 0.0
        elif key == "is_decoder":
            small[key] = True
        elif isinstance(value, int) and not isinstance(value, bool) and SIZES.get(key, value) < value:
            small[key] = SIZES[key]
    return small


def merge(config: dict, changes: dict) -> dict:
    changes = {key: merge(config.get(key) or {}, value) if isinstance(value, dict) else value for key, value in changes.items()}
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


@torch.no_grad()
def build(model_type: str):
    """Returns a model of the class that the type's checkpoints hold, so with its vision where it has it; none of its weights,
    norms, biases, sinks and scales is a zero or a one."""
    small = shrink(AutoConfig.for_model(model_type, **NEEDED.get(model_type, {})).to_dict())
    config = AutoConfig.for_model(model_type, **merge(small, CHANGES.get(model_type, {})))
    torch.manual_seed(3)
    whole = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    model = (AutoModelForMultimodalLM if whole else AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    saved = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in saved or not tensor.is_floating_point() or not tensor.isfinite().all():
            continue
        if tensor.ndim < 2 or "A_log" in name:
            tensor.add_(0.2 * (tensor.abs().mean().item() or 1.0) * torch.randn_like(tensor))
        elif "embed" in name or "wte" in name:
            tensor.normal_()
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
    return model
