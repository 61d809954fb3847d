"""Attention over packed documents: one after the other in a single row, each of which sees only itself."""

import inspect
import math

import torch
import torch.nn.functional as F
import transformers

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
SHARES_HEADS = varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11's does not


def document_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None,
                       s_aux=None, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None,
                       key_positions=None, **kwargs):
    """Causal attention in which no document sees another, for transformers' AttentionInterface.

    query (1, heads, T, D), key and value (1, kv heads, T, D); the documents are tokens cu_seq_lens_q[i] up to
    cu_seq_lens_q[i + 1], and likewise of the keys, which if there are key_positions stand there. Of fewer queries than keys the
    last see the last. A sliding window of w lets a token see itself and the w - 1 before it;
    softcap bounds the scores (Gemma 2); s_aux (heads,) are sinks, to which a head may attend instead of to any token (gpt-oss).
    Returns (1, T, heads, D) and None for the probabilities, which are never made.
    """
    if attention_mask is not None and (any(attention_mask.stride()) or attention_mask.shape[1] != (sliding_window or 1)):
        raise ValueError("only its mask knows whom a token may see")
    if key_positions is not None:
        key, value = (x.index_select(2, key_positions) for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    # flash attention takes two types, and heads of these sizes
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in range(8, 257, 8)
    if query.is_cuda and varlen_attn and fits and not softcap and s_aux is None and not dropout:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        if groups > 1 and not SHARES_HEADS:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        options = {"enable_gqa": True} if groups > 1 and SHARES_HEADS else {}
        window = (sliding_window - 1 if sliding_window else -1, 0)  # none to the right: causal
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale=scaling, window_size=window,
                          **options)
        return out.unsqueeze(0), None
    ends = cu_seq_lens_q, cu_seq_lens_k
    return attend_apart(query, key, value, *ends, dropout, scaling, sliding_window, softcap, s_aux), None


@torch.compiler.disable  # else it is compiled anew for every number of documents
def attend_apart(query, key, value, query_ends, key_ends, dropout, scaling, sliding_window, softcap, sinks):
    """document_attention on any device and in any dtype, one document after the other."""
    groups, outs = query.shape[1] // key.shape[1], []
    n_queries = query_ends.diff().tolist()
    n_keys = n_queries if key_ends is query_ends else key_ends.diff().tolist()  # a GPU need not be waited for twice
    by_hand = softcap or sinks is not None
    for q, k, v in zip(query.split(n_queries, dim=2), key.split(n_keys, dim=2), value.split(n_keys, dim=2)):
        length, before = k.shape[2], k.shape[2] - q.shape[2]
        mask = None
        if by_hand or before or (sliding_window and length > sliding_window):
            mask = torch.ones(q.shape[2], length, dtype=torch.bool, device=q.device).tril(before)
            mask = mask.triu(before + 1 - sliding_window) if sliding_window else mask
        if by_hand:
            scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            scores = scores.masked_fill(~mask, -math.inf)
            if sinks is not None:  # one more column, which takes its part of the probability and has no value
                scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
            probabilities = scores.softmax(-1, dtype=torch.float32)[..., :length].to(q.dtype)
            out = F.dropout(probabilities, dropout) @ v.repeat_interleave(groups, 1)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling,
                                                 enable_gqa=groups > 1)
        outs.append(out)
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous()


def mask_of_documents(*args, q_length: int, kv_length: int, local_size: int | None = None, **kwargs) -> torch.Tensor | None:
    """What a model gets for a mask, and hands on to document_attention, which knows better: nothing, or where it has a window,
    zeros that take no memory, (1, window, Q, K). They can be sliced as a mask can, and tell the window if the model does not;
    and are no floats, which FSDP2 would write out in the dtype that blocks compute in."""
    return torch.zeros((), dtype=torch.bool).expand(1, local_size, q_length, kv_length) if local_size else None


transformers.AttentionInterface.register("documents", document_attention)
transformers.AttentionMaskInterface.register("documents", mask_of_documents)
