"""Does it fit? The memory of a run on each of its GPUs, and its time, before any is rented: no GPU and no weights are needed.

    python will_it_fit.py --config configs/llama.py                            # on 1, 2, 4, 8 and 16 GPUs
    python will_it_fit.py --config configs/llama.py --gpus 4 --gib 80          # and what would make it fit
    python will_it_fit.py --config configs/llama.py --gpus 1 model.use_peft=true model.max_length=4096

It takes sft.py's arguments, or dpo.py's, and sends the script's own code (the model's class, sharding, loss, optimizer,
evaluation, answers, export) through fake tensors: see fake_gpu.py. It takes documents of max_length tokens, as many as a
microbatch may have, of each of which the last half are targets. A compiled run is counted as if it were not, of which it takes
a little less. The time is that of the steps; before them dpo.py takes as long as a third of an epoch, for its reference.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

from configs.base import Config, ConfigError, DPOConfig, load_config
from script import Options, fail, one_line

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is here is not asked

import numpy as np
import torch
import transformers
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

import dpo
import logps
import model_utils
import sft
from data import collate_packed, collate_padded, to_device
from fake_gpu import DEVICE, META, FakeGPU, fake_gpu
from fsdp_utils import ModelError, clip_gradients, gather_in_parts, make_mesh, shard_model
from hub import CONTROL_TOKENS, access_problem
from log import PEAK_FLOPS, count_flops
from lora import n_weights
from model_utils import Unallocated, compute_dtype, generate, load_tokenizer, make_model, make_new_model, make_outline
from trial import enable_packing

GIB = 2 ** 30
# GiB that a card of so many GB has. Of these the CUDA context, NCCL and cuBLAS take ROOM; between tensors the allocator leaves
# gaps, with expandable segments about a twentieth.
CARDS, ROOM, GAPS = {16: 15.6, 24: 23.5, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.8}, 1.5, 1.05
PROCESS = 1.5 * GIB  # of the host's memory, for Python, torch and transformers
# Whose configuration it is → (documents of an example, its make_optimizer, its get_batch_metrics(model, batch, mode, config))
SCRIPTS = {Config: (1, sft.make_optimizer, lambda model, batch, mode, config: sft.get_batch_metrics(model, batch, mode, 1)),
           DPOConfig: (2, dpo.make_optimizer, dpo.get_batch_metrics)}
# What may make a run fit, the cheapest first
CHECKPOINTING, SMALLER = "model.activation_checkpointing=true", "model.microbatch_tokens={max_length}"
LORA, ON_HOST = "model.use_peft=true", ("model.activation_offload=true", "model.cpu_offload=true")
REMEDIES = [[SMALLER], [CHECKPOINTING], [CHECKPOINTING, SMALLER], [LORA], [LORA, CHECKPOINTING],
            [LORA, "model.peft.quantise=true", CHECKPOINTING, SMALLER], [CHECKPOINTING, SMALLER, *ON_HOST]]


@dataclasses.dataclass
class Forecast:
    """What a run takes, bytes: on each GPU at the peak of each phase, and what the highest is made of; on the host; on the disk.

    flops is what a step needs, of all GPUs together.
    """

    peaks: dict[str, int]
    parts: dict[str, int]
    host: int
    checkpoint: int
    flops: float
    n_parameters: int

    @property
    def needed(self) -> float:
        """GiB that a GPU must have."""
        return max(self.peaks.values()) / GIB * GAPS + ROOM


class NoTokenizer:
    """In the place of one that can't be had: no token of it is new to the model."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self) -> int:
        return 0


def make_unallocated(config: Config, gpu: FakeGPU):
    """Returns the model as make_model does, but without memory for its weights."""
    wanted = config.model
    try:
        tokenizer = load_tokenizer(wanted.tokenizer_name_or_path or wanted.name_or_path, config.cache_dir,
                                   CONTROL_TOKENS if config.conditional else (), wanted.chat_template)
    except ModelError:
        tokenizer = NoTokenizer()
    gpu.meta_means = META
    with gpu.device, Unallocated():
        model = make_model(wanted, tokenizer, [], config.cache_dir, gpu.device, load_outline)
    gpu.meta_means = gpu.device
    return model


def load_outline(name_or_path: str, random_init: dict | None, tokenizer, stop_ids: list[int], cache_dir: str, dtype: torch.dtype,
                 sliced: bool, fuse: bool):
    """load_model, of whose files it needs the configuration alone."""
    if random_init:
        model = make_new_model(random_init, tokenizer, dtype)
    else:
        try:
            model = make_outline(name_or_path, cache_dir, dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"{name_or_path}: no config.json can be had: {one_line(error)}") from error
    model.weight_files = {}
    return model_utils.set_up(model, tokenizer, stop_ids, model_utils.grow(model, len(tokenizer)), fuse=False)


def make_batches(config: Config, n_ranks: int, packing: bool) -> list[dict]:
    """Returns the largest microbatch of a run, twice where a step may have several: gradients stay from one to the next."""
    model, n_documents = config.model, SCRIPTS[type(config)][0]
    most, examples = max(1, model.microbatch_tokens // model.max_length // n_documents), math.ceil(model.batch_size / n_ranks)
    several = model.gradient_accumulation_steps > 1 or examples > most
    n_examples = min(most, examples // model.gradient_accumulation_steps)
    n_documents *= n_examples
    document = np.zeros(model.max_length, np.int64), np.arange(model.max_length) >= model.max_length // 2
    batch = (collate_packed if packing else collate_padded)([document] * n_documents, 0)
    counts = {"n_documents": n_documents, "n_examples": n_examples, "global_token_count": n_documents * model.max_length}
    columns = {"reference": torch.zeros(n_documents), "n_targets": torch.ones(n_documents, dtype=torch.int32)}  # dpo.py's
    return [{**batch, **counts, **columns}] * (2 if several else 1)


@contextlib.contextmanager
def parts_named(gpu: FakeGPU) -> Iterator[None]:
    """Counts what FSDP2 and the log-prob kernel take as theirs."""
    group = _fsdp_param_group.FSDPParamGroup
    places = [(group, "unshard", "gathered weights"), (group, "wait_for_unshard", "gathered weights"),
              (_fsdp_param_group, "foreach_reduce", "gradients"), (logps, "sweep", "head")]
    with contextlib.ExitStack() as stack:
        for owner, name, part in places:
            function = gpu.counted_as(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def forecast(config: Config, n_ranks: int, device: torch.device = DEVICE) -> Forecast:
    """Sends a run on n_ranks GPUs through fake tensors: loading, a step, an evaluation, answers, and the gather for FINAL.

    On CPUs too, where it can be held against what a run really takes.
    """
    wanted, peaks, parts = config.model, {}, {}
    n_documents, make_optimizer, get_batch_metrics = SCRIPTS[type(config)]

    @contextlib.contextmanager
    def phase(name: str, part: str = "activations") -> Iterator[None]:
        gpu.here.start_anew()
        gpu.part.append(part)
        yield
        gpu.part.pop()
        if gpu.here.peak > max(peaks.values(), default=0):
            parts.update({part: gpu.here.at_peak.get(part, 0) for part in {*parts, *gpu.here.at_peak}})
        peaks[name] = gpu.here.peak

    with fake_gpu(n_ranks, device) as gpu, parts_named(gpu):
        with phase("loading", "weights"):
            model = make_unallocated(config, gpu)
            shard_model(model, make_mesh(device, wanted.replicas), "target_logps", dtype=compute_dtype(device),
                        recompute=wanted.activation_checkpointing, inputs_on_host=wanted.activation_offload,
                        offload=wanted.cpu_offload)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = make_optimizer(model, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay)
        with phase("the trial"):
            packing = wanted.packing and enable_packing(model, device)
        *others, batch = make_batches(config, n_ranks, packing)
        with phase("the optimizer's start", "gradients"):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            gpu.counted_as("optimizer", optimizer.step)()
        if not others:  # else the last microbatch finds the others' gradients
            optimizer.zero_grad()
        with phase("a step"):
            get_batch_metrics(model, to_device(batch, device), "train", config)[0].backward()
            clip_gradients(model.parameters(), wanted.max_grad_norm)
            gpu.counted_as("optimizer", optimizer.step)()
            optimizer.zero_grad()
        with phase("an evaluation"), torch.no_grad():
            get_batch_metrics(model.eval(), to_device(batch, device), "eval", config)
        if config.n_eval_answers:
            n_new = min(256, wanted.max_length - wanted.max_prompt_length)  # as answer in chat.py has it
            prompts = [[0] * (wanted.max_prompt_length + n_new - 1)] * min(64 * n_ranks, config.n_eval_answers)
            with phase("answers"):
                generate(model, prompts, 1)  # the last token of the answers
        with phase("writing FINAL", "gathered weights"):
            for part in gather_in_parts(model, 5e9):
                part = {name: tensor.to(torch.bfloat16) for name, tensor in part.items()}
            del part
        body, head, attention = count_flops(model)
        flops = wanted.max_length * (body + head / 2) + wanted.max_length ** 2 * attention  # of a document
        n_parameters = sum(map(n_weights, model.parameters()))
        checkpoint = 3 * sum(parameter.nbytes for parameter in trained)
        return Forecast(peaks, parts, gpu.host.peak, checkpoint, wanted.batch_size * n_documents * flops, n_parameters)


def try_out(argv: list[str], n_ranks: int) -> Forecast | str:
    """Returns the forecast for these arguments, or in a line why there is none."""
    transformers.utils.logging.set_verbosity_error()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            return forecast(load_config(argv, n_ranks, None, *SCRIPTS), n_ranks)
        except (ConfigError, ModelError) as error:
            return one_line(error)
        except Exception as error:  # a model may do what fake tensors can't
            return f"can't be foretold: {type(error).__name__}: {one_line(error)}"


def show(n_ranks: int, result: Forecast | str) -> None:
    """Prints a row of the table."""
    if isinstance(result, str):
        return print(f"{n_ranks:6}  {result}", flush=True)
    worst = max(result.peaks, key=result.peaks.get)
    cards = "/".join(str(card) for card, size in CARDS.items() if result.needed <= size) or "none"
    parts = sorted(((size / GIB, part) for part, size in result.parts.items()), reverse=True)
    made_of = ", ".join(f"{part} {size:.1f}" for size, part in parts if size >= 0.05)
    print(f"{n_ranks:6} {result.peaks[worst] / GIB:9.1f} {result.needed:11.1f} {cards:>18} {(result.host + PROCESS) / GIB:9.1f}  "
          f"{worst}: {made_of}", flush=True)


def show_remedies(pool, argv: list[str], n_ranks: int, gib: float, config: Config) -> None:
    """Tries what would make a run fit, and prints what comes out."""
    keys = [[key.format(max_length=config.model.max_length) for key in keys] for keys in REMEDIES]
    tries = []
    for more in keys:
        named = {key.partition("=")[0] for key in more}
        others = [argument for argument in argv if argument.lstrip("+-").partition("=")[0] not in named]
        tries.append((" ".join(more), pool.submit(try_out, others + more, n_ranks)))
    tries += [(f"--gpus {n}", pool.submit(try_out, argv, n)) for n in (2 * n_ranks, 4 * n_ranks)]
    for what, result in tries:
        result = result.result()
        told = result if isinstance(result, str) else f"{result.needed:.1f} GiB{', fits' if result.needed <= gib else ''}"
        print(f"  {what}: {told}", flush=True)


def show_time(result: Forecast, config: Config, n_ranks: int) -> None:
    """Prints how long a step takes, and the run, if it is told how many examples it has, and what it leaves on the disk."""
    wanted, n_tokens = config.model, SCRIPTS[type(config)][0] * config.model.max_length
    print(f"a step of {wanted.batch_size} rows of {n_tokens:,} tokens needs {result.flops / 1e12:,.0f} TFLOP; on {n_ranks} GPUs, "
          "at 40 and 50 % of what they can:")
    n_examples = config.n_examples or 100_000
    for card in ("A100", "H100", "H200"):
        slow, fast = (result.flops / (n_ranks * PEAK_FLOPS[card] * part) for part in (0.4, 0.5))
        hours = [seconds * n_examples / wanted.batch_size / 3600 for seconds in (slow, fast)]
        print(f"  {card}  {slow:.2f} to {fast:.2f} s; {n_examples:,} examples in {hours[0]:.1f} to {hours[1]:.1f} hours")
    print(f"on the disk: {config.keep_last + 1} checkpoints of {result.checkpoint / 1e9:.1f} GB, one of them while it is "
          f"written, and FINAL, {2 * result.n_parameters / 1e9:.1f} GB in bf16")


def find_problem(config: Config) -> str:
    """Returns in a line why the model's config.json can't be had, or ""; without a tokenizer it goes on, offline."""
    model = config.model
    name = model.load_from or ("" if model.random_init else model.name_or_path)
    if name and not os.path.isdir(name) and (problem := access_problem("model", name, config.cache_dir)):
        return f"{name}: {problem}; or have its config.json on the disk: model.name_or_path=FOLDER"
    if access_problem("model", model.tokenizer_name_or_path or model.name_or_path, config.cache_dir):
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that are started: no waiting for an answer
    return ""


def main() -> None:
    parser = Options(__doc__)
    parser.add_argument("--gpus", type=int, help="1, 2, 4, 8 and 16, if not given")
    parser.add_argument("--gib", type=float, help="what each has; where that is not enough, it is tried what would be")
    args, argv = parser.parse_known_args()
    if not (args.gpus is None or args.gpus > 0) or not (args.gib is None or args.gib > 0):
        parser.error("--gpus and --gib must be above 0")
    numbers = [args.gpus] if args.gpus else [1, 2, 4, 8, 16]
    try:
        config = load_config(argv, numbers[0], None, *SCRIPTS)
    except ConfigError as error:
        fail(error)
    if problem := find_problem(config):
        fail(problem)
    with ProcessPoolExecutor(max(1, os.cpu_count() // 2), multiprocessing.get_context("spawn")) as pool:
        results = [(n, pool.submit(try_out, argv, n)) for n in numbers]
        print("  GPUs  GiB each  with room   fits in cards of  host GiB  at its most in", flush=True)
        for n, result in [(n, result.result()) for n, result in results]:
            show(n, result)
            if args.gib and isinstance(result, Forecast) and result.needed > args.gib:
                show_remedies(pool, argv, n, args.gib, config)
    if not isinstance(result, str):
        show_time(result, config, n)


if __name__ == "__main__":
    main()
