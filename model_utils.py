"""The model and its tokenizer, as transformers has them, made ready for training on conversations."""


import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


class ModelError(ValueError):
    """A model or tokenizer that can't be used: one line that names it."""


# ChatML, for a tokenizer that brings no chat template of its own
CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def load_tokenizer(name_or_path: str, cache_dir: str) -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer, with a chat template (ChatML if it brings none) and a pad token (eos if it has none).

    Raises ModelError where there is none, or none without running code that came with it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name_or_path}: no tokenizer can be loaded: {first_line(error)}") from error
    if not tokenizer.chat_template:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + CHATML
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # masked by length, so any will do
    return tokenizer


def load_model(name_or_path: str, random_init: dict | None, tokenizer, stop_id: int | None, cache_dir: str):
    """Returns a causal LM in fp32, with a row of the embeddings for every token, that stops generating at stop_id.

    `random_init` describes a new one (a transformers config; its vocabulary is the tokenizer's), instead of loading it.
    """
    if random_init:
        try:
            config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **random_init})
        except (ValueError, TypeError) as error:
            raise ModelError(f"model.random_init: {first_line(error)}") from error
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32, cache_dir=cache_dir,
                                                         trust_remote_code=False, use_safetensors=True)  # never a pickle
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"{name_or_path}: no causal language model can be loaded: {first_line(error)}") from error

    old_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > old_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # a new token starts as the mean of the known ones, on every rank alike
            for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
                embedding.weight[old_size:] = embedding.weight[:old_size].mean(0)

    generation = model.generation_config
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    generation.eos_token_id = sorted({stop for stop in [*stops, stop_id] if stop is not None})
    generation.pad_token_id = tokenizer.pad_token_id
    if any(value is not None for value in (generation.temperature, generation.top_p, generation.top_k)):
        generation.do_sample = True  # transformers refuses to save sampling settings that are switched off
    return model


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
