"""Linear layers whose matrices are stored in 4 or 8 bits, for machines that do not hold a model in bf16. The only file that imports
bitsandbytes.

Shape legend: I / O input and output size of a linear layer.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hyperbagel.core.errors import InputError

# nf4: 4-bit NormalFloat in blocks of 64, their scales quantised too (QLoRA, Dettmers et al. 2023): 4.13 bits a weight, 9 % away from it
# (relative L2 of normal numbers). int8: equal steps up to the largest weight of each row, 8 bits, 0.9 % away (3,584 in a row).
Codes = Literal["int8", "nf4"]
CODES: tuple[Codes, ...] = ("int8", "nf4")
_BLOCK = 64
_FEW = 16  # rows up to which a CPU multiplies by int8 codes: there about as fast as unpacking W; a lone request's drafts are no more
_STEP = 64  # what its rows must be a multiple of, since PyTorch's kernel reads whole vectors and does not look where a row ends
_TILE = 2**20  # weights that a CPU unpacks at a time, since they stay in its cache: 59 ms in place of 458 (18,944 x 3,584, 16 rows, AVX2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def numbers(name: str | torch.dtype | None, device: torch.device) -> tuple[torch.dtype, Codes | None]:
    """(what is computed in, how the decoder's matrices are stored) for a dtype's name; None: float32 on a CPU, bfloat16 on a GPU, and so
    codes are computed with. Raises InputError for another name, or for nf4 where bitsandbytes does not work."""
    usual, asked = DTYPES["bfloat16" if device.type == "cuda" else "float32"], str(name or "").removeprefix("torch.")
    if isinstance(name, str) and name in CODES:
        if name == "nf4":
            _check_library(device)
        return usual, name
    if asked and asked not in DTYPES:
        raise InputError(f"got dtype {asked!r}, expected one of {', '.join([*DTYPES, *CODES])}")
    return DTYPES.get(asked, usual), None


def bytes_of_a_weight(codes: Codes, inner: int) -> float:
    """With its scales, in rows of `inner`: one in bf16 a row of int8; one in 8 bits a block of nf4, 256 of which have one in fp32."""
    return 1 + 2 / inner if codes == "int8" else 0.5 + (1 + 4 / 256) / _BLOCK


def _check_library(device: torch.device) -> None:
    """Raises InputError if bitsandbytes does not work on this device: without a library for its CUDA version it fails at the first call."""
    try:
        _library().functional.quantize_4bit(torch.zeros(1, _BLOCK, device=device), blocksize=_BLOCK, quant_type="nf4")
    except RuntimeError as error:
        told = f"got weights to store as nf4, which bitsandbytes cannot do on {device} ({error})"
        raise InputError(f"{told}; install its version for this machine, or take int8, float32 or bfloat16") from error


@cache
def _library() -> Any:
    """bitsandbytes; looked up once, since every product asks. Raises InputError if it is not installed."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns of a kernel that is not used here
    try:
        import bitsandbytes
    except ImportError as error:
        told = f"got weights to store as nf4, which needs bitsandbytes ({error})"
        raise InputError(f"{told}; install it (pip install 'hyperbagel[quantized]'), or take int8, float32 or bfloat16") from error
    return bitsandbytes


def quantize(layer: nn.Linear, weight: Tensor, codes: Codes) -> QuantizedLinear:
    """The layer with `weight` [O, I] as codes. layer: gives shape and bias. weight: on the device and in the dtype to compute with."""
    return (Int8Linear if codes == "int8" else Nf4Linear)(layer, weight)


class QuantizedLinear(nn.Linear, ABC):
    """x W^T + b, [..., I] -> [..., O], with W stored as codes. W is frozen; gradients pass to x (QLoRA, Dettmers et al. 2023, eq. 5)."""

    kind: Codes

    def __init__(self, layer: nn.Linear, weight: Tensor) -> None:
        """See `quantize`."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bias = layer.bias
        self.sample = sample_of(weight)  # of the weights as they were: by these a checkpoint is known
        self.weight = nn.Parameter(self._pack(weight), requires_grad=False)

    @abstractmethod
    def _pack(self, weight: Tensor) -> Tensor:
        """The codes; keeps their scales."""

    @abstractmethod
    def unpacked(self) -> Tensor:
        """W as the codes give it, [O, I], in the dtype to compute with."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)  # type: ignore[no-any-return]
        return self._product(x)

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """As `forward`, where no gradient is wanted."""

    def product_unpacked(self, x: Tensor) -> Tensor:
        """As `forward`, by the unpacked matrix."""
        return F.linear(x, self.unpacked(), self.bias)

    def plain(self) -> nn.Linear:
        """An ordinary layer with the unpacked matrix."""
        weight = self.unpacked()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=weight.device, dtype=weight.dtype)
        layer.load_state_dict({"weight": weight} | ({} if self.bias is None else {"bias": self.bias}))
        return layer

    def _apply(self, *args: Any, **how: Any) -> Any:
        raise NotImplementedError("the scales of codes are no buffers, so they do not move with a layer; load the model where it is to run")


class Int8Linear(QuantizedLinear):
    """W = scale[o] codes[o, i], codes of -127 to 127.

    Served on a CPU, up to _FEW rows are multiplied by the codes themselves, x and result in bf16: decoding text takes its time to read W,
    of which there is a quarter. A row's result is the same however many there are. For more rows W is unpacked, on a CPU tile by tile.
    """

    kind = "int8"

    def _pack(self, weight: Tensor) -> Tensor:
        self.dtype, self.scale = weight.dtype, weight.new_empty(self.out_features, 1, dtype=torch.bfloat16)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        tiles = (x.split(self._tile) for x in (weight, self.scale, codes))
        for given, scale, made in zip(*tiles, strict=True):
            largest = given.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-20)  # a row of zeros has a scale, too
            scale.copy_(largest / 127)
            made.copy_((given.float() / scale.float()).round().clamp(-127, 127))
        return codes

    @property
    def _tile(self) -> int:
        """Rows of W in a tile."""
        return max(1, _TILE // self.in_features)

    def unpacked(self) -> Tensor:
        return self.weight * self.scale.to(self.dtype)

    def _product(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        served = x.device.type == "cpu" and torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        if not served or not 0 < rows <= _FEW or self.in_features % _STEP:
            return self.product_unpacked(x)
        flat = x.reshape(rows, -1).to(torch.bfloat16)
        y = torch._weight_int8pack_mm(flat, self.weight, self.scale[:, 0]).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def product_unpacked(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self._tile >= self.out_features:
            return super().product_unpacked(x)
        codes, scales = (part.split(self._tile) for part in (self.weight, self.scale.to(self.dtype)))
        biases = [None] * len(codes) if self.bias is None else self.bias.split(self._tile)
        return torch.cat([F.linear(x, *tile) for tile in zip(map(torch.mul, codes, scales), biases, strict=True)], dim=-1)


class Nf4Linear(QuantizedLinear):
    """Products are those of a linear layer that holds the unpacked matrix (`plain`). On a GPU bitsandbytes multiplies up to some tens of
    rows by the codes without unpacking them (how many depends on the GPU and on the shape), which rounds otherwise."""

    kind = "nf4"

    def _pack(self, weight: Tensor) -> Tensor:
        how = _library().functional
        packed, self.state = how.quantize_4bit(weight.contiguous(), blocksize=_BLOCK, quant_type="nf4", compress_statistics=True)
        return packed  # type: ignore[no-any-return]

    def unpacked(self) -> Tensor:
        return _library().functional.dequantize_4bit(self.weight, self.state)  # type: ignore[no-any-return]

    def _product(self, x: Tensor) -> Tensor:
        return _library().matmul_4bit(x, self.weight.t(), bias=self.bias, quant_state=self.state)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """x W^T + b and, for dL/dy, dL/dx = dL/dy W. It keeps the layer and no tensor: W is unpacked again for the gradient, since the unpacked
    matrices of all layers between a forward and its backward pass are the model that was not to be in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product_unpacked(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpacked().to(grad.dtype), None


def plain_layer(layer: nn.Module) -> nn.Module:
    """The layer itself or, if its matrix is stored as codes, an ordinary one with the unpacked matrix."""
    return layer.plain() if isinstance(layer, QuantizedLinear) else layer


def matrix_of(layer: nn.Linear) -> Tensor:
    """The matrix [O, I] that a layer multiplies by, unpacked if it is stored as codes."""
    return layer.unpacked() if isinstance(layer, QuantizedLinear) else layer.weight


def sample_of(tensor: Tensor) -> tuple[list[int], Tensor]:
    """(shape, up to 64 values in bf16) of a tensor: what a checkpoint is known by (model.student.fingerprint)."""
    flat = tensor.detach().flatten()
    return list(tensor.shape), flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).contiguous()
