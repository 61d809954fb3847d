"""What a run takes for granted of a model is tried before the first step: its head, causality, positions, packing, padding."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import attention  # noqa: F401 (for transformers to know "documents")
from fsdp_utils import ModelError, is_of_another, name_of, say
from model_utils import compute_dtype
from script import one_line, timed


@timed("trial")
def try_model(model, device: torch.device, longest: int, packing: bool) -> bool:
    """Returns whether rows are packed, having tried all that is taken for granted; all ranks must call it.

    That is that a token depends on those before it alone, that the head is known, or else the model's own logits taken, that
    it has positions for rows of `longest` tokens, and that what shares a batch with a row does not change it. Raises ModelError.
    """
    check_head(model, device)
    check_positions(model, device, longest)
    if packing and enable_packing(model, device):
        return True
    check_padding(model, device)
    return False


@timed("trial")
@torch.compiler.set_stance("force_eager")
def check_gradients(model, device: torch.device, filled: bool = True) -> None:
    """Says which trainable weights the logits of a text do not depend on, and freezes those of adapters.

    A backward does not reach them: in vision towers, in attention to an encoder that is not there, in indexers that choose
    without a gradient. (Nor does it reach experts that these few tokens are not sent to.) All ranks must call it.
    Raises ModelError where there is no gradient to be had at all. Does nothing if the weights are not `filled` yet.
    """
    if not filled:
        return
    check_head(model, device)
    try:
        with in_mode(model, training=True):
            model.target_logps(whole_batch(first_ids(model, device, 24)))[0].sum().backward()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{name_of(model)} can't be trained here: {one_line(error)}") from error
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    idle = [name for name, parameter in trained.items() if parameter.grad is None and ".experts." not in name]
    for name in idle:
        if ".lora_" in name:
            trained[name].requires_grad_(False)
            if ".lora_B." in name:
                trained[name].data.zero_()  # not to be merged, if it came from elsewhere
    model.zero_grad()
    if idle:
        say(f"no gradient reaches {len(idle)} of {len(trained)} weights, which stay as they are; the first is {idle[0]}")


def first_ids(model, device: torch.device, n: int) -> torch.Tensor:
    """Returns the ids (1, n) of the vocabulary's first tokens, for a trial."""
    return torch.arange(n, device=device)[None] % model.config.get_text_config().vocab_size


@contextlib.contextmanager
def in_mode(model, training: bool) -> Iterator[None]:
    """Has the model in training or in evaluation, and then as it was."""
    was_training = model.training
    try:
        model.train(training)
        yield
    finally:
        model.train(was_training)


def whole_batch(ids: torch.Tensor, *ends: int) -> dict:
    """Returns a batch, as target_logps takes it, of ids (1, T), each of which is a target but for the first of a document.

    With several `ends`, where each document ends, they are packed; otherwise they are one padded row.
    """
    ends = torch.tensor([0, *(ends or [ids.shape[1]])], device=ids.device)
    lengths = ends.diff().tolist()
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    documents = torch.cat([torch.full((length,), i, device=ids.device) for i, length in enumerate(lengths)])
    targets = positions.nonzero().squeeze(1)
    packed = len(ends) > 2
    return {"target_combined_input_ids": ids, "target_combined_attention_mask": torch.ones_like(ids), "target_labels": ids,
            "target_positions": targets, "predicting_positions": targets - 1, "target_documents": documents[targets],
            "position_ids": positions[None], "document_ends": ends.int() if packed else None,
            "longest": ends.diff().max().item(), "n_documents": len(ends) - 1}


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def check_head(model, device: torch.device) -> None:
    """Has target_logps take the model's own logits where its head does more than linear_logps knows of, and says so.

    That is tried, in the precision that the run computes in. Raises ModelError where a token's logits depend on later tokens,
    of which no loss of the next token makes sense. All ranks must call it.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 56
    if most < 32:
        raise ModelError(f"{name_of(model)} has {most} positions, too few for a chat: 32 are needed at least")
    ids = first_ids(model, device, min(48, most - 8))  # some lose a few of them
    other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    with in_mode(model, training=False):
        try:
            logits, moved = (model(input_ids=rows, use_cache=False).logits[0, :-1].float() for rows in (ids, other))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if is_of_another(error):
                raise
            raise ModelError(f"{name_of(model)} can't be run here: {one_line(error)}") from error
        # Sums in another order differ by some roundings of what is summed; what a head does to its logits, by far more
        size = logits.nan_to_num(posinf=0, neginf=0).abs().max().item()
        rounding = (1e-5 if compute_dtype(device) == torch.float32 else 1e-2) * (1 + size)
        if (moved - logits).nan_to_num().abs().max().item() > rounding:  # weights that are not finite are the loop's to find
            raise ModelError(f"{name_of(model)}: its logits depend on later tokens: no causal language model")
        own = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        try:
            difference = (model.target_logps(whole_batch(ids))[0] - own).nan_to_num().square().mean().sqrt().item()
        except (AttributeError, TypeError, RuntimeError):
            difference = math.inf
    if not difference <= rounding / 4 and not model.uses_own_logits:
        model.uses_own_logits = True
        say(f"whole logits: {name_of(model)} makes them from its hidden states in a way of its own; this takes more memory")


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def enable_packing(model, device: torch.device) -> bool:
    """Switches the model to document_attention; where it can't be packed, leaves it as it was and says why.

    Whether it can is tried: two documents in one row must come out as they do apart, up to a hundredth of what they do
    when nothing keeps them apart; a tenth in bf16, whose roundings alone make two hundredths. Models that look at their
    neighbours otherwise than by attention (state spaces, convolutions) do not pass, nor those whose attention can't be
    replaced. All ranks must call it.
    """
    if not model._supports_attention_backend:
        say(f"not packed: {name_of(model)} has an attention of its own")
        return False
    ids = first_ids(model, device, 24)
    both = whole_batch(ids, 8, 24)
    try:
        with in_mode(model, training=False):
            apart = logps_apart(model, ids)
            model.set_attn_implementation("documents")
            packed, _ = model.target_logps(both)
            mixed, _ = model.target_logps({**both, "document_ends": both["document_ends"][::2].contiguous(), "longest": 24})
        most = (0.01 if compute_dtype(device) == torch.float32 else 0.1) * (mixed - apart).abs().max()
        problem = "mixes documents" if (packed - apart).abs().max() > most else None
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        problem = f"takes no other attention ({one_line(error)})"
    if problem:
        model.set_attn_implementation(model.own_attention)
        say(f"not packed: {name_of(model)} {problem}")
    return not problem


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def can_share_context(model, device: torch.device) -> bool:
    """Returns whether two packed documents may share the tokens that both begin with, having tried it; says why not.

    They must come out as they do apart, as for enable_packing. All ranks must call it.
    """
    ids, border = first_ids(model, device, 24), torch.arange(24, device=device)
    context, first, second = border[:8], border[8:16], border[16:]
    shared = whole_batch(ids, 16, 24)
    shared |= {"position_ids": torch.cat([border[:16], first])[None], "target_positions": border[1:],
               "predicting_positions": torch.cat([border[:15], border[7:8], second[:-1]]),
               "key_ends": torch.tensor([0, 16, 32], dtype=torch.int32, device=device),
               "key_positions": torch.cat([context, first, context, second])}
    own = {"key_ends": shared["document_ends"], "key_positions": border}  # without the context
    try:
        with in_mode(model, training=False):
            apart = [model.target_logps({**whole_batch(ids[:, rows]), "document_ends": shared["document_ends"][:2]})[0]
                     for rows in (border[:16], torch.cat([context, second]))]
            apart = torch.cat([apart[0], apart[1][7:]])
            together, alone = (model.target_logps({**shared, **keys})[0] for keys in ({}, own))
        most = (0.01 if compute_dtype(device) == torch.float32 else 0.1) * (alone - apart).abs().max()
        problem = "mixes them" if (together - apart).abs().max() > most else None
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        problem = one_line(error)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        problem = "its load balancing loss is of whole documents"
    if problem:
        say(f"a context is computed anew for each of its answers: {name_of(model)}: {problem}")
    return not problem


def logps_apart(model, ids: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities in two documents, of 8 ids and of the rest, each computed alone."""
    return torch.cat([model.target_logps(whole_batch(part))[0] for part in ids.split([8, ids.shape[1] - 8], dim=1)])


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def check_positions(model, device: torch.device, longest: int) -> None:
    """Raises ModelError where rows of `longest` tokens have no positions, or change those of the rows beside them."""
    config = model.config.get_text_config()
    most, ropes = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    for rope in [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]:
        border = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", most)
        if rope.get("rope_type") in ("longrope", "dynamic") and longest > border:
            raise ModelError(f"rows are up to {longest:,} tokens long; beyond {border:,} {name_of(model)} turns the positions of "
                             f"a whole batch by its longest row ({rope['rope_type']} RoPE): model.max_length={border}")
    if most and longest <= most - 8:  # some lose a few of them
        return

    ids = torch.full((1, longest), config.vocab_size // 2, device=device)  # which is no padding's
    try:
        with WithinTables():
            model.target_logps(whole_batch(ids))
        if most and longest > most:
            say(f"rows are up to {longest:,} tokens long: {name_of(model)} was made for {most:,}")
    except (IndexError, RuntimeError, ValueError) as error:
        raise ModelError(f"rows are up to {longest:,} tokens long, for which {name_of(model)} has no positions"
                         f"{f': model.max_length={min(most, longest - 1)} or less' if most else ''}") from error


class WithinTables(TorchFunctionMode):
    """Raises IndexError where an embedding has no such row, by which a GPU would be lost."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.embedding and args[0].max() >= len(args[1]):
            raise IndexError
        return function(*args, **(kwargs or {}))


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def check_padding(model, device: torch.device) -> None:
    """Raises ModelError where a row comes out otherwise beside a longer one than alone."""
    ids = first_ids(model, device, 24)
    short, long = ids.split([8, 16], dim=1)
    rows = torch.cat([F.pad(short, (0, 8)), long])
    targets = torch.cat([torch.arange(1, 8, device=device), torch.arange(17, 32, device=device)])
    padded = whole_batch(long) | {
        "target_combined_input_ids": rows, "target_labels": rows, "target_positions": targets,
        "predicting_positions": targets - 1, "n_documents": 2,
        "target_combined_attention_mask": torch.tensor([[1] * 8 + [0] * 8, [1] * 16], device=device)}
    with in_mode(model, training=False):
        apart = logps_apart(model, ids)
        difference = (model.target_logps(padded)[0] - apart).nan_to_num().abs().max().item()
    size = apart.nan_to_num(posinf=0, neginf=0).abs().max().item()
    if difference > (1e-3 if compute_dtype(device) == torch.float32 else 0.05) * (1 + size):
        raise ModelError(f"{name_of(model)}: padding changes its numbers, and its rows can't be packed")
