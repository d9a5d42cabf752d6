"""A GPU of make-believe, for machines that have none: a second device whose numbers stay in host memory.

It computes nothing that a CPU would not. It has the rules that a CPU lacks, and that code written on a CPU breaks unnoticed:
tensors of two devices do not meet in one operation; what the host reads it waits for (`waits`); recording a CUDA graph computes nothing,
may not wait and may not copy from the host's memory; replaying one repeats the recorded kernels at the recorded addresses.
It has no streams, no garbage in fresh memory, no limits of single kernels, and no gradients.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# What takes indices from either device, as PyTorch does: those of the host are copied.
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default)
# What the host must know the result of, be it only how large it is.
WAITS = (
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default,
    aten.unique_consecutive.default, aten.unique_dim.default, aten.bincount.default, aten.repeat_interleave.Tensor,
)  # fmt: skip


class OnGPU(Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        how = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": GPU}
        made = Tensor._make_wrapper_subclass(cls, held.shape, **how)
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGPU({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = OnGPU(self.held.clone())
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"got {func} on the simulated GPU outside of it")


class Recorded:
    """In the place of torch.cuda.CUDAGraph: the kernels of one recording, each with the tensors that it read and wrote."""

    gpu: SimulatedGPU

    def __init__(self) -> None:
        self.kernels: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.gpu.graphs.append(self)

    def replay(self) -> None:
        self.gpu.replays += 1
        for func, args, kwargs, outs in self.kernels:
            new = func(*args, **kwargs)
            for out, value in zip(outs, leaves(new), strict=True):
                if isinstance(value, Tensor) and value.data_ptr() != out.data_ptr():
                    out.copy_(value)


class SimulatedGPU(TorchDispatchMode):
    """What `simulated_gpu` gives.

    waits: where the host waited for the device, by operation. uploads: copies from the host, by operation. launches, replays, graphs: how
    many kernels were launched one by one, how many graphs were replayed, and all that were recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.uploads = Counter[str](), Counter[str]()
        self.launches = self.replays = 0
        self.graphs: list[Recorded] = []
        self.whole: set[Any] = set()  # operations that are not made of others
        self.recording: Recorded | None = None
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> (a view of all of it, its numbers before the recording)

    def cuda(self) -> dict[str, Any]:
        stream = mock.Mock(name="stream")
        return {
            "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "synchronize": lambda *_: self.wait("synchronize"), "get_device_name": lambda *_: "simulated",
            "Stream": lambda *_: stream, "current_stream": lambda *_: stream, "set_stream": lambda _: None,
            "stream": lambda _: ExitStack(), "CUDAGraph": type("Graph", (Recorded,), {"gpu": self}), "graph": self.record,
            "mem_get_info": lambda *_: (10**11, 10**11), "memory_reserved": lambda *_: 0, "memory_allocated": lambda *_: 0,
        }  # fmt: skip

    def wait(self, name: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} waits for the device")
        self.waits[name] += 1

    def upload(self, name: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} copies from pageable memory")
        self.uploads[name] += 1

    @contextmanager
    def record(self, graph: Recorded, **_: Any) -> Iterator[None]:
        """As torch.cuda.graph: what was written meanwhile is as before."""
        self.recording, self.kept = graph, {}
        try:
            yield
        finally:
            self.recording = None
            for whole, before in self.kept.values():
                whole.copy_(before)
            self.kept = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**kwargs, "pin_memory": False} if kwargs and kwargs.get("pin_memory") else kwargs or {}
        flat = [*leaves(args), *leaves(kwargs)]
        given = [x for x in flat if isinstance(x, Tensor)]
        device = next((x for x in flat if isinstance(x, torch.device)), None)
        ours = any(isinstance(x, OnGPU) for x in given)
        if not ours and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if func not in self.whole:
            with self:
                parts = func.decompose(*args, **kwargs)  # of smaller ones, as inference mode hands it over
            if parts is not NotImplemented:
                return parts
            self.whole.add(func)
        self._check(func, flat, given, device)
        bare_args, bare = each(_bare, args), each(_bare, {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs)
        if self.recording is not None and func._schema.is_mutable:
            self._keep(bare_args, bare)
        out = func(*bare_args, **bare)
        if func is aten.copy_.default and not isinstance(args[0], OnGPU):
            return args[0]
        if device is not None and device.type == "cpu":
            return out
        self.launches += self.recording is None
        if self.recording is not None:
            self.recording.kernels.append((func, bare_args, bare, leaves(out)))
        of = {id(x.held): x for x in given if isinstance(x, OnGPU)}
        view = func.is_view and not args[0].is_inference()  # in inference mode, what is seen of weights is no tensor of it either
        with torch.inference_mode(torch.is_inference_mode_enabled() and not view):
            return each(lambda x: of[id(x)] if id(x) in of else OnGPU(x) if isinstance(x, Tensor) else x, out)

    def _check(self, func: Any, flat: list[Any], given: list[Tensor], device: torch.device | None) -> None:
        """Counts waits and copies, and raises where two devices meet."""
        name = str(func)
        if any(isinstance(x, torch.Generator) for x in flat):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")
        host = [x for x in given if not isinstance(x, OnGPU)]
        if func in WAITS:
            self.wait(name)
        elif func is aten._to_copy.default and device is not None:
            if device.type == "cpu":
                self.wait(name)
            elif host:
                self.upload(name)
            return
        elif func is aten.copy_.default and host:
            if isinstance(given[0], OnGPU):
                self.upload(name)
            else:
                self.wait(name)
            return
        elif func in INDEXED:
            if any(x.dtype == torch.bool for x in given[1:]):
                self.wait(name)
            if isinstance(given[0], OnGPU) and host:
                self.upload(name)
                return
        pointwise = torch.Tag.pointwise in func.tags or func in (aten.masked_fill.Tensor, aten.fill_.Tensor, aten.masked_fill_.Tensor)
        if any(x.dim() or not pointwise for x in host):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})")

    def _keep(self, args: Any, kwargs: Any) -> None:
        for x in leaves((args, kwargs)):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload]
                self.kept.setdefault(storage.data_ptr(), (whole, whole.clone()))


class _Functions(TorchFunctionMode):
    """What has to be caught before PyTorch takes it apart for the device."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and (func.__name__ == "__get__" or all(isinstance(x, Tensor | int) for x in args)) and func is not Tensor.tolist:
            return func(*args)
        # PyTorch would ask the guard below for the current device
        args, kwargs = each(_numbered, args), each(_numbered, kwargs or {})
        first = args[0] if args else None
        if func is Tensor.tolist and isinstance(first, OnGPU):
            self.gpu.wait("tolist")
            return first.held.tolist()
        asked = kwargs.get("device") or (first.device if func is Tensor.new_tensor else None)
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and asked is not None and torch.device(asked).type == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(first, OnGPU):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = first, tuple(torch.tensor(x) if isinstance(x, list) else x for x in index), *args[2:]
        if func is F.scaled_dot_product_attention and isinstance(first, OnGPU):
            return self._attention(func, args, kwargs)
        return func(*args, **kwargs)

    def _attention(self, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """One kernel. Those that take a mask take no groups."""
        given = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert all(isinstance(x, OnGPU) for x in given), "got attention over two devices"
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        assert mask is None or not kwargs.get("enable_gqa"), "got a mask and groups, which no fused CUDA kernel takes"
        assert not torch.is_grad_enabled() or not any(x.requires_grad for x in given), "attention of the simulated GPU has no gradient"

        def kernel(*held: Any, **named: Any) -> Tensor:
            return func(*held, **named)

        bare_args, bare = each(_bare, args), each(_bare, kwargs)
        out = kernel(*bare_args, **bare)
        self.gpu.launches += self.gpu.recording is None
        if self.gpu.recording is not None:
            self.gpu.recording.kernels.append((kernel, bare_args, bare, [out]))
        return OnGPU(out)


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGPU]:
    """Inside, device "cuda" exists."""
    _guard_devices()
    gpu = SimulatedGPU()
    with ExitStack() as stack:
        for name, value in gpu.cuda().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # Module.to() must then take the moved tensor itself, not only its numbers.
        replace = torch.__future__.set_overwrite_module_params_on_conversion
        stack.callback(replace, torch.__future__.get_overwrite_module_params_on_conversion())
        replace(True)
        stack.enter_context(_Functions(gpu))
        stack.enter_context(gpu)
        yield gpu


def each(change: Callable[[Any], Any], x: Any) -> Any:
    """The same structure with every leaf changed. (PyTorch's own does more, and takes most of the time here.)"""
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([each(change, y) for y in x])
    if kind is dict:
        return {key: each(change, y) for key, y in x.items()}
    return change(x)


def leaves(x: Any) -> list[Any]:
    found: list[Any] = []
    each(found.append, x)
    return found


def _bare(x: Any) -> Any:
    return x.held if isinstance(x, OnGPU) else x


def _numbered(x: Any) -> Any:
    return GPU if isinstance(x, str | torch.device) and str(x) == "cuda" else x


def _guard_devices() -> None:
    """PyTorch without CUDA has nothing that changes its current device. The CPU's own, which does nothing, serves for both."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[0]  # DeviceType::CUDA, DeviceType::CPU
