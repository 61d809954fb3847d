"""GPUs that are not there: a run's own code on fake tensors, which have a shape, a dtype and a device, and take no memory.

What a GPU would do is heard, not done: what it holds, where the host waits for it, what it sends to the others. will_it_fit.py
forecasts by it, and the tests send every branch of a GPU through it. It leans on what is private to torch; all of that is here.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools import fake_collectives  # noqa: F401 (collectives of tensors that hold nothing)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.overrides import _get_current_function_mode_stack
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

DEVICE, META = torch.device("cuda", 0), torch.device("meta")
# The operator's name → what it is, and which argument is the whole tensor
COLLECTIVES = {"_allgather_base_": ("gather", 0), "_reduce_scatter_base_": ("reduce", 1), "allreduce_": ("all-reduce", 0),
               "all_reduce": ("all-reduce", 0)}
# What gives a tensor whose shape only the numbers of another tell
DYNAMIC = {"nonzero", "masked_select", "repeat_interleave", "bincount", "_unique2", "unique_consecutive", "unique_dim"}


class Memory:
    """Bytes that tensors hold, by what they are held for, and the most that they have held at once."""

    def __init__(self):
        self.held, self.peak, self.at_peak = Counter(), 0, {}

    def add(self, part: str, size: int) -> None:
        self.held[part] += size
        if (total := self.held.total()) > self.peak:
            self.peak, self.at_peak = total, dict(self.held)

    def start_anew(self) -> None:
        self.peak, self.at_peak = self.held.total(), dict(self.held)


class FakeGPU(TorchDispatchMode):
    """Hears every operation on tensors.

    Small tensors of integers have values all the same, computed on the CPU, since lengths and positions decide what a run does.
    What follows from other numbers is taken for 0.

    waits         {line of this project: how often the host has waited there for the GPU}
    collectives   [(kind, bytes of the whole tensor)]
    here, host    what tensors hold on the device, and elsewhere
    meta_means    the device that C++ means by meta, or META while weights are made without memory
    part          what memory is now taken for, the last of the list; None is for nothing
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.waits, self.collectives, self.values = Counter(), [], WeakTensorKeyDictionary()
        self.meta_means, self.here, self.host, self.part = device, Memory(), Memory(), ["other"]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes again as what it does to the shards
        if function is torch.ops.prim.device.default:
            return device_below(args)
        name, kwargs = function.overloadpacket.__name__, dict(kwargs or {})
        if kwargs.get("device") == META:
            kwargs["device"] = self.meta_means
        if name == "index" and any(tensor.dtype == torch.bool for tensor in tensors_of(args[1])):
            self.wait()
            args = args[0], [index for mask in args[1] for index in self.places_of(mask)]
        self.hear(name, args, kwargs)
        if name == "_varlen_attn" and not all(ends.is_contiguous() for ends in args[3:5]):
            raise RuntimeError("cu_seqlens must be contiguous")  # as the kernel does; its fake asks nothing of them
        if name == "_to_copy" and kwargs.get("device") == DEVICE:
            return self.copy_to_gpu(*args, **kwargs)
        if "out" in kwargs and "dtype" in function._overloadname:
            return kwargs["out"]  # torch 2.11 knows not its shape, which is there
        known = self.known((args, kwargs)) if function.namespace == "aten" else None
        if name == "_local_scalar_dense":
            return compute(function, known) if known else 0.0
        if known and name in DYNAMIC:
            value = compute(function, known)
            out = torch.empty(value.shape, dtype=value.dtype, device=args[0].device)
        else:
            out = function(*args, **kwargs)
            value = compute(function, known) if known and all(map(is_small, tensors_of(out))) else None
        outs = [tensor for tensor in tensors_of(out) if isinstance(tensor, FakeTensor)]
        for tensor, its_value in zip(outs, tensors_of(value) or [None] * len(outs)):
            self.note(tensor, its_value)
        return out

    def hear(self, name: str, args: tuple, kwargs: dict) -> None:
        """Notes what is sent to other ranks, and that the host waits for numbers, or for a shape that they tell."""
        if name in COLLECTIVES:
            kind, place = COLLECTIVES[name]
            self.collectives.append((kind, sum(tensor.nbytes for tensor in tensors_of(args[place]))))
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu") and not kwargs.get("non_blocking")
        is_dynamic = name in DYNAMIC and not kwargs.get("output_size")
        if (to_host or is_dynamic or name == "_local_scalar_dense") and any(tensor.is_cuda for tensor in tensors_of(args)):
            self.wait()

    def copy_to_gpu(self, source: torch.Tensor, dtype: torch.dtype | None = None, **_) -> torch.Tensor:
        if source.is_cuda and dtype in (None, source.dtype):
            return torch.ops.aten.alias(source)  # it is there already
        out = torch.empty(source.shape, dtype=dtype or source.dtype, device=DEVICE)
        if known := self.known(([source], {})):
            with unset_fake_temporarily():
                known = known[0][0].to(dtype or source.dtype)
        self.note(out, known)
        return out

    def note(self, tensor: FakeTensor, value: torch.Tensor | None) -> None:
        """Notes what memory an operation's result has taken, and its value."""
        storage, part = tensor.untyped_storage(), self.part[-1]
        if part and not hasattr(storage, "memory") and tensor.fake_device.type != "meta":
            storage.memory = self.here if tensor.fake_device.type == self.device.type else self.host
            storage.part, storage.held = part, storage.nbytes()
            storage.memory.add(part, storage.held)
            weakref.finalize(storage, lambda it: it["memory"].add(it["part"], -it["held"]), storage.__dict__)
        if value is None and is_small(tensor) and tensor not in self.values and not tensor.is_floating_point():
            with unset_fake_temporarily():
                value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if value is not None:
            self.values[tensor] = value

    def resize(self, storage, size: int) -> None:
        """Notes that FSDP2 frees gathered weights, or makes room for them, in a storage that stays."""
        if hasattr(storage, "memory"):
            storage.memory.add(storage.part, -storage.held)
            storage.part, storage.held = self.part[-1] if size else storage.part, size
            storage.memory.add(storage.part, size)

    def known(self, arguments):
        """Returns the arguments of an operation with values in the place of tensors, or None where one has none."""
        tensors = tensors_of(arguments)
        if not all(is_small(tensor) and (tensor in self.values or not isinstance(tensor, FakeTensor) and tensor.device != META)
                   for tensor in tensors):
            return None
        return tree_map_only(torch.Tensor, lambda tensor: self.values.get(tensor, tensor), arguments)

    def places_of(self, index) -> list:
        """Returns the indices that a mask, which an index may be, stands for."""
        if not torch.is_tensor(index) or index.dtype != torch.bool:
            return [index]
        with unset_fake_temporarily():
            places = self.values[index].nonzero().unbind(1)
        return [torch.empty(place.shape, dtype=place.dtype, device=index.device) for place in places]

    def counted_as(self, part: str | None, function):
        """Returns the function, during which memory is taken for that part."""
        def inner(*args, **kwargs):
            self.part.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.part.pop()
        return inner

    def wait(self) -> None:
        """Notes that the host waits for the GPU, by the innermost line of this project."""
        here = str(Path(__file__).parent)
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(here) and frame.filename != __file__]
        self.waits[f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"] += 1


def compute(function, arguments):
    """Returns what an operation gives on the CPU, or None where it has none for this type."""
    args, kwargs = arguments
    with unset_fake_temporarily(), contextlib.suppress(NotImplementedError):
        return function(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))


def tensors_of(arguments) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if torch.is_tensor(leaf)]


def is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (1 if tensor.is_floating_point() else 2 ** 17)


def device_below(args) -> torch.device:
    """Returns the device that C++ is told: it would compute no gradients on a GPU that is not there."""
    device = args[0].fake_device
    return META if device.type == "cuda" else device


class Stream:
    """A stream or an event: nothing is left to wait for."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch's scaled_dot_product_attention as a GPU has it: without whole scores."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, dropout_p, is_causal,
                                                                  scale=scale)[0]


choose = torch.where


def where(condition, *values, **kwargs):
    """torch.where, of whose numbers C++ would make tensors on meta; torch's own backwards call it with some."""
    made = [value if torch.is_tensor(value) else torch.full((), value, dtype=torch.result_type(*values), device=condition.device)
            for value in values]
    return choose(condition, *made, **kwargs)


def really(function):
    """Returns the function, done on real tensors: C++ reads the numbers."""
    def inner(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)
    return inner


def is_gpu(device) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def asked_of(device_of) -> dict:
    return {"is_cuda": property(lambda tensor: device_of(tensor).type == "cuda"),
            "is_meta": property(lambda tensor: device_of(tensor).type == "meta")}


def replacements(hears: FakeGPU, n_ranks: int) -> dict:
    """Returns {owner: {name: what stands there while GPUs are pretended}}: all that would need a driver, or read numbers."""
    make, to, resize, stream = torch.tensor, torch.Tensor.to, torch.UntypedStorage.resize_, Stream()
    shapes_of = ShardingPropagator._propagate_tensor_meta_non_cached  # makes whole tensors, fake ones also on a GPU that is there

    def tensor(data, *, device=None, **kwargs):
        contexts = [mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
        on_gpu = is_gpu(device or (contexts[-1] if contexts else None))
        with torch._C.DisableTorchFunction():  # else `with device:` would ask for one that is not there
            made = make(data, device="cpu" if on_gpu else device, **kwargs)
        if on_gpu:
            hears.wait()
        return made.to(DEVICE) if on_gpu else made

    def new_tensor(like, data, dtype=None, device=None):
        return tensor(data, dtype=dtype or like.dtype, device=device or like.device)

    def move(source, *args, **kwargs):
        args = [DEVICE if is_gpu(value) else value for value in args]
        if args == [DEVICE] == [source.device] and not kwargs.get("dtype"):
            return source
        return to(source, *args, **kwargs | ({"device": DEVICE} if is_gpu(kwargs.get("device")) else {}))

    def to_list(source):
        if source.is_cuda:
            hears.wait()
        with unset_fake_temporarily():
            return hears.values.get(source, torch.zeros(source.shape)).tolist()

    def gather_objects(objects, value, group=None):
        hears.wait()
        objects[:] = [value] * len(objects)

    def resize_(storage, size):
        hears.resize(storage, size)
        return resize(storage, size)

    cuda = {"is_available": lambda: hears.device == DEVICE, "is_initialized": lambda: True, "device_count": lambda: n_ranks,
            "is_bf16_supported": lambda **_: True, "current_device": lambda: 0, "set_device": lambda device: None,
            "get_device_name": lambda device=None: "H100", "get_device_capability": lambda device=None: (9, 0),
            "max_memory_allocated": lambda device=None: hears.here.peak, "is_current_stream_capturing": lambda: False,
            "synchronize": hears.wait, "Stream": Stream, "Event": Stream, "current_stream": lambda device=None: stream,
            "stream": lambda stream: stream}
    return {
        torch: {"tensor": tensor, "where": where}, torch.cuda: cuda, torch.UntypedStorage: {"resize_": resize_},
        torch.accelerator: {"current_stream": cuda["current_stream"]},
        torch.Tensor: {"to": move, "new_tensor": new_tensor, "pin_memory": lambda tensor: tensor,
                       "is_pinned": lambda tensor: True, "record_stream": lambda tensor, stream: None},
        torch.nn.functional: {"scaled_dot_product_attention": attend} if hears.device == DEVICE else {},
        FakeTensor: asked_of(lambda tensor: tensor.fake_device) | {"tolist": to_list},
        DTensor: asked_of(lambda tensor: tensor._local_tensor.device) | {
            "device": property(lambda tensor: tensor._local_tensor.device)},
        ShardingPropagator: {"_propagate_tensor_meta_non_cached": hears.counted_as(None, shapes_of)},
        dist: {"all_gather_object": gather_objects, "init_device_mesh": really(dist.init_device_mesh)},
        DeviceMesh: {"mesh": property(really(DeviceMesh.mesh.fget))}, fake_tensor: {"init_gpu_context": lambda device: None},
    }


@contextlib.contextmanager
def fake_gpu(n_ranks: int, device: torch.device = DEVICE) -> Iterator[FakeGPU]:
    """Has this process take itself for rank 0 of n_ranks, each with a GPU of its own, or on CPUs; yields what hears it."""
    hears = FakeGPU(device)
    _device_constructors()  # torch remembers for good what its functions are when this is first called
    with contextlib.ExitStack() as stack:
        for owner, functions in replacements(hears, n_ranks).items():
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(owner, name, function))
        stack.enter_context(mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {torch.ops.prim.device.default: device_below}))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(hears)
