"""Log-probabilities of targets, from hidden states, without whole logits: what the loss is made of."""

import functools
import math

import torch


def target_logps(model, batch: dict, uniform: bool = True, fuse: bool = False) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Returns (log p(target | the tokens before it), (N,) fp32; the microbatch's share of a mixture's load balancing loss).

    `batch` is SFTDataLoader's; only its predicting_positions are projected to the vocabulary. `uniform`, which a loss
    that weighs targets differently must switch off, and `fuse` are linear_logps'.
    The second is router_aux_loss_coef times balance_loss, where the model's configuration sets output_router_logits, else 0.0.
    A method of the model, so that FSDP2 gathers the head's weight for it as it does for a forward.
    """
    ends, longest, mask = batch["document_ends"], batch["longest"], batch["target_combined_attention_mask"]
    inputs = {"input_ids": batch["target_combined_input_ids"], "use_cache": False}
    if ends is None:  # a model counts the positions of padded rows itself: RoBERTa's begin behind the padding's
        inputs |= {"attention_mask": mask}
    else:
        inputs |= {"position_ids": batch["position_ids"], "cu_seq_lens_q": ends, "cu_seq_lens_k": batch.get("key_ends", ends),
                   "max_length_q": longest, "max_length_k": longest}
        inputs |= {"key_positions": batch["key_positions"]} if "key_positions" in batch else {}
    labels, config = batch["target_labels"].flatten()[batch["target_positions"]], model.config.get_text_config()
    if model.uses_own_logits:
        output = type(model).forward(model, **inputs)  # not model(), which is FSDP2's to gather for, as this function is
        logits = output.logits.flatten(0, 1)[batch["predicting_positions"]]
        logps = logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    else:
        output, head = body_of(model)(**inputs), model.get_output_embeddings()
        hidden = output.last_hidden_state.flatten(0, 1)[batch["predicting_positions"]]
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)  # Cohere, Granite
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        logps = linear_logps(hidden, weight_of(head), labels, head.bias, scale, softcap, uniform, fuse)
    if not (getattr(config, "output_router_logits", False) and config.router_aux_loss_coef and batch["n_documents"]):
        return logps, 0.0
    router_logits = torch.stack(output.router_logits)
    if ends is None:
        router_logits, lengths = router_logits[:, mask.flatten().bool()], mask.sum(1)  # without the padding
    else:
        lengths = ends.diff()
    return logps, config.router_aux_loss_coef * balance_loss(router_logits, config.num_experts_per_tok, lengths)


def body_of(model):
    """Returns the part of the model that makes the hidden states that the head reads."""
    if model.base_model is not model:
        return model.base_model
    return next(child for child in model.children() if model.get_input_embeddings() in set(child.modules()))


def weight_of(layer) -> torch.Tensor:
    """Returns the weight of an embedding or a head, in which rows that are trained beside it, by lora.py, are in their place."""
    if "token_adapter" not in layer._modules:
        return layer.weight
    rows = layer.token_adapter.trainable_tokens_delta
    return torch.cat([layer.weight[:-len(rows)], rows.to(layer.weight.dtype)])


def balance_loss(router_logits: torch.Tensor, top_k: int, lengths: torch.Tensor) -> torch.Tensor:
    """The load balancing loss of each document, times its tokens, and summed. Fedus et al. 2021 (Switch), eq. 4 to 6:

        E * sum over experts of (times it is chosen / tokens) * (sum of its probabilities / tokens)

    over the tokens of all layers, as transformers' load_balancing_loss_func has it. That is no sum over tokens, so that it
    is taken of a document, not of a microbatch: it would depend on how the step is cut up.
    router_logits (layers, T, E) of documents of these lengths, one after the other, T tokens together.
    """
    probabilities = router_logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k).indices, 1.0)
    per_token = torch.stack([chosen, probabilities]).mean(1)  # over the layers: (2, T, E)
    documents = torch.arange(len(lengths), device=lengths.device)
    documents = documents.repeat_interleave(lengths, output_size=router_logits.shape[1])  # known, so that nobody need wait for it
    chosen, probabilities = per_token.new_zeros(2, len(lengths), per_token.shape[2]).index_add(1, documents, per_token)
    return per_token.shape[2] * (chosen * probabilities / lengths[:, None]).sum()


def linear_logps(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None,
                 scale: float = 1.0, softcap: float | None = None, uniform: bool = False, fuse: bool = False) -> torch.Tensor:
    """Log-probabilities of labels under a vocabulary head, without ever holding the (N, V) logits. Equals

        logits = (hidden @ weight.T + bias) * scale                 # then, with a softcap: softcap * tanh(logits / softcap)
        logps = logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    hidden (N, H), weight (V, H), bias (V,), all fp32 or all bf16; labels (N,) int64 in [0, V). Returns (N,) fp32.

    With p = softmax(z) of a row's logits z and g the gradient of the loss to its logp:
        logp      = z[label] - log sum exp z
        d/dz      = g (onehot(label) - p)
        d/dhidden = d/dz @ weight
        d/dweight = d/dz.T @ hidden, summed over the rows
    The rows go through in chunks, whose logits become probabilities and then gradients in one preallocated buffer.

    When is the gradient made? If `uniform`, which promises that the loss is c * logps.sum() for some c, at once in the
    forward, while p is at hand, and the backward only multiplies it by c: three matmuls a chunk (logits, hidden, weight).
    With a frozen head likewise, for any g, since g only scales the rows of d/dhidden: two matmuls, and (N, H) is kept.
    Otherwise g must be known first, and the backward makes the logits again: four matmuls.

    `fuse` compiles what lies between the matmuls, which on a GPU would else take as long as they do; a CPU gains nothing by it.
    """
    return LinearLogps.apply(hidden, weight, bias, labels, scale, softcap, uniform, fuse)


class LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, uniform, fuse):
        ctx.head, ctx.uniform, ctx.spent = (scale, softcap, fuse), uniform, False
        wanted = ctx.needs_input_grad[:3]
        ctx.made = any(wanted) and (uniform or not any(wanted[1:]))
        logps, *grads = sweep(hidden, weight, bias, labels, *ctx.head, None, wanted if ctx.made else (False,) * 3)
        ctx.save_for_backward(*(grads if ctx.made else (hidden, weight, bias, labels)))
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        if not ctx.made:
            _, *grads = sweep(*ctx.saved_tensors, *ctx.head, grad_logps, ctx.needs_input_grad[:3])
        elif ctx.uniform:
            if grad_logps.numel() > 1 and grad_logps.stride(0) != 0:  # what sum() hands back is one number, expanded
                raise RuntimeError("linear_logps(uniform=True) takes a loss of c * logps.sum() only: write logps.mean() "
                                   "as logps.sum() / n, and set uniform=False where tokens weigh differently")
            if ctx.spent:
                raise RuntimeError("linear_logps(uniform=True) keeps its gradients for one backward, which scales them in place")
            ctx.spent = True
            c = grad_logps[:1].sum()  # 0 where there are no rows
            grads = [None if grad is None else grad.mul_(c) for grad in ctx.saved_tensors]
        else:
            grads = [ctx.saved_tensors[0] * grad_logps[:, None].to(ctx.saved_tensors[0].dtype), None, None]
        return *grads, None, None, None, None, None


def sweep(hidden, weight, bias, labels, scale, softcap, fuse, grad_logps, wanted):
    """One pass over the rows in chunks: (logps, d/dhidden, d/dweight, d/dbias), None for the gradients not wanted.

    grad_logps (N,) is g above; None stands for ones.
    """
    (n_rows, _), vocabulary, fp32 = hidden.shape, len(weight), torch.promote_types(hidden.dtype, torch.float32)
    size = chunk_rows(hidden, vocabulary)
    # On a CPU the matmuls are faster where the logits lie column by column.
    logits = torch.empty_strided((size, vocabulary), (vocabulary, 1) if hidden.is_cuda else (1, size), dtype=fp32,
                                 device=hidden.device)
    logps = hidden.new_empty(n_rows, dtype=fp32)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=fp32) if wanted[1] else None
    grad_bias = torch.zeros_like(bias, dtype=fp32) if wanted[2] else None
    differentiate = compiled_differentiate() if fuse else differentiate_in_place

    for start in range(0, n_rows, size):
        rows = slice(start, start + size)
        h, g = hidden[rows], None if grad_logps is None else grad_logps[rows, None]
        z = add_matmul(logits[:len(h)], h, weight.T, beta=0)
        logps[rows], minus_dz = differentiate(z, bias, labels[rows, None], scale, softcap, g, any(wanted))
        if wanted[2]:
            grad_bias -= minus_dz.sum(0)
        minus_dz = minus_dz.to(hidden.dtype) if any(wanted) else None
        if wanted[0]:
            torch.addmm(grad_hidden[rows], minus_dz, weight, beta=0, alpha=-1, out=grad_hidden[rows])
        if wanted[1]:
            add_matmul(grad_weight, minus_dz.T, h, alpha=-1)
    if wanted[1]:
        grad_weight = grad_weight.to(weight.dtype)
    if wanted[2]:
        grad_bias = grad_bias.to(bias.dtype)
    return logps, grad_hidden, grad_weight, grad_bias


def differentiate_in_place(z, bias, label, scale, softcap, g, wanted):
    """The chunk's hidden @ weight.T (n, V) → (logps (n,), the negative of its own gradient (n, V), in z's memory)."""
    if bias is not None:
        z += bias
    if scale != 1:
        z *= scale
    if softcap:
        z.div_(softcap).tanh_()
        slope = 1 - z.square() if wanted else None  # of softcap * tanh(z / softcap)
        z *= softcap
    if z.stride(1) == 1:
        logps = torch.log_softmax(z, 1, out=z).gather(1, label)
        z.exp_()
    else:  # torch's own is slow over columns
        of_label, top = z.gather(1, label), z.amax(1, keepdim=True)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        logps = of_label - top - total.log()
        z /= total
    if not wanted:
        return logps.squeeze(1), None
    minus_dz = z.scatter_add_(1, label, torch.full_like(logps, -1.0))  # p - onehot
    if softcap:
        minus_dz *= slope
    if g is not None:
        minus_dz *= g
    if scale != 1:
        minus_dz *= scale
    return logps.squeeze(1), minus_dz


def differentiate_functionally(z, bias, label, scale, softcap, g, wanted):
    """differentiate_in_place, written for a compiler: two passes over the logits on a GPU instead of seven."""
    z = z if bias is None else z + bias
    z = z * scale
    slope = 1.0
    if softcap:
        z = torch.tanh(z / softcap)
        slope = 1 - z.square()
        z = z * softcap
    logps = z.log_softmax(-1)
    minus_dz = (logps.exp() - (torch.arange(z.shape[1], device=z.device) == label).to(z.dtype)) * slope * scale
    return logps.gather(1, label).squeeze(1), (minus_dz if g is None else minus_dz * g) if wanted else None


@functools.cache  # once a process, not once a microbatch; and not at import, which would wait for the compiler's own
def compiled_differentiate():
    return torch.compile(differentiate_functionally, dynamic=True)


def add_matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """out = beta * out + alpha * a @ b, in place and in out's precision also where a and b are bf16."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)


def chunk_rows(hidden: torch.Tensor, vocabulary: int) -> int:
    """Rows a chunk: enough for the matmuls to run at full speed, few enough for the logits to be small beside the model."""
    budget = (512 if hidden.is_cuda else 96) << 20  # bytes of fp32 logits
    most = max(256, budget // (4 * vocabulary) // 128 * 128)
    n_rows = max(1, len(hidden))
    size = math.ceil(n_rows / math.ceil(n_rows / most))  # so that the last is not a small one
    return min(n_rows, math.ceil(size / 128) * 128)  # matmuls are made of tiles of as many
