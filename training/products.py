"""Products with frozen weights, by the fastest of the libraries that torch brings.

On a CPU torch multiplies float32 by MKL, which leaves AVX-512 alone on other makers' processors
than Intel's; oneDNN uses it, at 2.1 to 2.4 times the speed on those with 150 rows and widths of
576 to 3,072 (Zen 5, one thread), with the same numbers but for rounding.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perennial.infra.settings import bound_onednn_cache


def times(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b, (..., O), computed in the dtype of W and given in that of x; without gradient.

    W is contiguous or the transpose of what is: oneDNN reads columns of a wider matrix very slowly.
    """
    if is_by_onednn() and x.is_cpu and x.dtype == weight_OD.dtype == torch.float32:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OD, bias_O, "none", [], "")
        return product
    return functional.linear(x.to(weight_OD.dtype), weight_OD, bias_O).to(x.dtype)


@cache
def is_by_onednn() -> bool:
    """Whether oneDNN is the faster one on this CPU."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch


def frozen_linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`times`, with a gradient for x alone."""
    product: Tensor = _FrozenLinear.apply(  # type: ignore[no-untyped-call]  # torch
        x, weight_OD, bias_O
    )
    return product


def speed_up(model: nn.Module) -> None:
    """Have the frozen linear layers of `model` multiply by `frozen_linear` from now on."""
    bound_onednn_cache()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OD)
        return times(x, weight_OD, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # Any: torch
        (weight_OD,) = ctx.saved_tensors
        return times(grads[0], weight_OD.T), None, None
