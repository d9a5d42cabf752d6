"""Linear layers whose matrices are stored in 4 or 8 bits, for GPUs that do not hold a model in bf16. The only file that imports
bitsandbytes.

Shape legend: I / O input and output size of a linear layer.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hyperbagel.core.errors import InputError

# nf4: 4-bit NormalFloat in blocks of 64, their scales quantised too (QLoRA, Dettmers et al. 2023): 4.13 bits a weight, 9 % away from it
# (relative L2 of normal numbers). int8: equal steps up to the largest of each block of 256: 8.13 bits, 0.7 % away.
Codes = Literal["int8", "nf4"]
CODES: tuple[Codes, ...] = ("int8", "nf4")
_BLOCK = {"int8": 256, "nf4": 64}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def numbers(name: str | torch.dtype | None, device: torch.device) -> tuple[torch.dtype, Codes | None]:
    """(what is computed in, how the decoder's matrices are stored) for a dtype's name; None: float32 on a CPU, bfloat16 on a GPU, and so
    codes are computed with. Raises InputError for another name."""
    usual, asked = DTYPES["bfloat16" if device.type == "cuda" else "float32"], str(name or "").removeprefix("torch.")
    if isinstance(name, str) and name in CODES:
        _check_library(device)
        return usual, name
    if asked and asked not in DTYPES:
        raise InputError(f"got dtype {asked!r}, expected one of {', '.join([*DTYPES, *CODES])}")
    return DTYPES.get(asked, usual), None


def bytes_of_a_weight(codes: Codes) -> float:
    """With the scales of its block: one in fp32, of nf4 one in 8 bits, 256 of which have one in fp32."""
    return 1 + 4 / _BLOCK[codes] if codes == "int8" else 0.5 + (1 + 4 / 256) / _BLOCK[codes]


def _check_library(device: torch.device) -> None:
    """Raises InputError if bitsandbytes does not work on this device: without a library for its CUDA version it fails at the first call."""
    try:
        _library().functional.quantize_blockwise(torch.zeros(_BLOCK["int8"], device=device), blocksize=_BLOCK["int8"])
    except RuntimeError as error:
        told = f"got weights to store as {' or '.join(CODES)}, which bitsandbytes cannot do on {device} ({error})"
        raise InputError(f"{told}; install its version for this machine or take float32 or bfloat16") from error


@cache
def _library() -> Any:
    """bitsandbytes; looked up once, since every product asks. Raises InputError if it is not installed."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns of a kernel that is not used here
    try:
        import bitsandbytes
    except ImportError as error:
        told = f"got weights to store as {' or '.join(CODES)}, which needs bitsandbytes ({error})"
        raise InputError(f"{told}; install it (pip install 'hyperbagel[quantized]') or take float32 or bfloat16") from error
    return bitsandbytes


class QuantizedLinear(nn.Linear):
    """x W^T + b, [..., I] -> [..., O], with W unpacked from its codes in every product.

    Products are those of a linear layer that holds the unpacked matrix (`plain`). On a GPU bitsandbytes multiplies up to some tens of rows
    by nf4 codes without unpacking them (how many depends on the GPU and on the shape), which rounds otherwise. W is frozen; gradients pass
    to x (QLoRA, Dettmers et al. 2023, eq. 5).
    """

    def __init__(self, layer: nn.Linear, weight: Tensor, codes: Codes) -> None:
        """layer: gives shape and bias. weight [O, I]: on the device and in the dtype to compute with."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bias, self.kind = layer.bias, codes
        self.sample = sample_of(weight)  # of the weights as they were: by these a checkpoint is known
        flat, how = weight.contiguous(), _library().functional
        if codes == "nf4":
            packed, self.state = how.quantize_4bit(flat, blocksize=_BLOCK[codes], quant_type=codes, compress_statistics=True)
        else:
            steps = how.create_linear_map(signed=True, total_bits=8).to(weight.device)
            packed, self.state = how.quantize_blockwise(flat, code=steps, blocksize=_BLOCK[codes])
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)  # type: ignore[no-any-return]
        if self.kind == "nf4":
            return _library().matmul_4bit(x, self.weight.t(), bias=self.bias, quant_state=self.state)
        return F.linear(x, self.unpacked(), self.bias)

    def unpacked(self) -> Tensor:
        """W as the codes give it, [O, I], in the dtype to compute with."""
        how = _library().functional
        return (how.dequantize_4bit if self.kind == "nf4" else how.dequantize_blockwise)(self.weight, self.state)

    def plain(self) -> nn.Linear:
        """An ordinary layer with the unpacked matrix."""
        weight = self.unpacked()
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=weight.device, dtype=weight.dtype)
        layer.load_state_dict({"weight": weight} | ({} if self.bias is None else {"bias": self.bias}))
        return layer

    def _apply(self, *args: Any, **how: Any) -> Any:
        raise NotImplementedError("the scales of codes are no buffers, so they do not move with a layer; load the model where it is to run")


class _Product(torch.autograd.Function):
    """x W^T + b and, for dL/dy, dL/dx = dL/dy W. It keeps the layer and no tensor: W is unpacked again for the gradient, since the unpacked
    matrices of all layers between a forward and its backward pass are the model that was not to be in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(), layer.bias)

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
