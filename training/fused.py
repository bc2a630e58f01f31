"""Decoder layers with LoRA in few passes over memory; the numbers are those of the plain modules.

Projections of one input share a matrix product, a frozen weight has no gradient, and each packed
row attends to the shared prefix and to itself instead of to a masked whole. For decoders built like
Llama; `trunk` runs all others, and DoRA, through transformers and PEFT.

Shapes: N packed tokens, D width, O outputs of a group of projections, R the group's ranks together,
H heads, E size of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perennial.training.products import frozen_linear, times

LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_ADAPTER = "default"


def can_fuse(model: Any) -> bool:  # Any: transformers
    """True where the layers are Llama's in fp32 or bf16 and the adapter, if any, is plain LoRA."""
    config = model.config
    dora = any(getattr(module, "use_dora", {}).get(_ADAPTER) for module in model.modules())
    is_known = config.model_type in LLAMA_LIKE and config.hidden_act == "silu"
    return is_known and model.dtype in (torch.float32, torch.bfloat16) and not dora


class FusedLayer:
    """One decoder layer over packed tokens; reads the modules' weights, owns none of its own."""

    def __init__(self, layer: Any, head_size: int) -> None:  # Any: transformers
        attention, mlp = layer.self_attn, layer.mlp
        self._head_size = head_size
        self._num_values = attention.v_proj.out_features // head_size
        self._qkv = _Group([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = _Group([attention.o_proj])
        self._gate_up = _Group([mlp.gate_proj, mlp.up_proj])
        self._down = _Group([mlp.down_proj])
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]

    def __call__(self, hidden_ND: Tensor, rotary: tuple[Tensor, Tensor], rows: "Rows") -> Tensor:
        """The layer's output, (N, D)."""
        heads_NHE = self._qkv(_norm(hidden_ND, self._norms[0]))
        heads_NHE = heads_NHE.view(len(hidden_ND), -1, self._head_size)
        num_turned = heads_NHE.shape[1] - self._num_values
        turned_NHE, value_NHE = torch.split(heads_NHE, [num_turned, self._num_values], 1)
        num_queries = num_turned - self._num_values
        if self._head_norms[0] is not None:
            parts = torch.split(turned_NHE, [num_queries, self._num_values], 1)
            turned_NHE = torch.cat(
                [_norm(part, norm) for part, norm in zip(parts, self._head_norms, strict=True)], 1
            )
        turned_NHE = _Rotate.apply(turned_NHE, *rotary)  # type: ignore[no-untyped-call]  # torch
        query_NHE, key_NHE = torch.split(turned_NHE, [num_queries, self._num_values], 1)
        mixed_NO = attend(query_NHE, key_NHE, value_NHE, rows).flatten(1)
        hidden_ND = self._out(mixed_NO, hidden_ND)
        both = self._gate_up(_norm(hidden_ND, self._norms[1]))
        return self._down(_SwiGlu.apply(both), hidden_ND)  # type: ignore[no-untyped-call]  # torch


class Rows:
    """How packed tokens fall into the shared prefix and the rows; each row's mask, made once.

    Masks have the device and the dtype of `like`.
    """

    def __init__(self, num_prefix: int, sizes: Sequence[int], like: Tensor) -> None:
        self.num_prefix = num_prefix
        self.sizes = tuple(sizes)
        self.masks = [_mask(num_prefix, size, like) for size in sizes] if num_prefix else None


def attend(query_NHE: Tensor, key_NHE: Tensor, value_NHE: Tensor, rows: Rows) -> Tensor:
    """Causal attention of each row to the prefix and itself, (N, H, E).

    The work is the sum of the rows' squares; a masked whole would cost the square of their sum.
    """
    sizes = [rows.num_prefix, *rows.sizes]
    parts = [
        torch.split(part.transpose(0, 1)[None], sizes, dim=2)
        for part in (query_NHE, key_NHE, value_NHE)
    ]
    (head, *queries), (first_key, *keys), (first_value, *values) = parts
    found = [_attend(head, first_key, first_value, None)] if rows.num_prefix else []
    for index, query in enumerate(queries):
        key, value, mask = keys[index], values[index], None
        if rows.masks is not None:
            key = torch.cat([first_key, key], dim=2)
            value = torch.cat([first_value, value], dim=2)
            mask = rows.masks[index]
        found.append(_attend(query, key, value, mask))
    return torch.cat(found, dim=2)[0].transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and query.is_cuda:
        # Flash attention takes no mask, the memory-efficient one no groups of queries.
        num = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(num, 1), value.repeat_interleave(num, 1)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def _mask(num_prefix: int, size: int, like: Tensor) -> Tensor:
    hidden = like.new_ones(size, num_prefix + size, dtype=torch.bool).triu(num_prefix + 1)
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _norm(hidden: Tensor, module: Any) -> Tensor:  # Any: transformers
    scaled: Tensor = _RmsNorm.apply(  # type: ignore[no-untyped-call]  # torch
        hidden, module.weight, module.variance_epsilon
    )
    return scaled


class _Group:
    """Linear layers of one input. Their frozen weights become views of one matrix."""

    def __init__(self, modules: Sequence[Any]) -> None:  # Any: peft or torch
        linears: list[nn.Linear] = [getattr(module, "base_layer", module) for module in modules]
        self._weight, self._bias = linears[0].weight.data, linears[0].bias
        if len(linears) > 1:
            self._weight = torch.cat([linear.weight.data for linear in linears])
            sizes = [linear.out_features for linear in linears]
            for linear, part in zip(linears, torch.split(self._weight, sizes), strict=True):
                linear.weight.data = part
            if self._bias is not None:
                self._bias = nn.Parameter(
                    torch.cat([linear.bias.data for linear in linears]), False
                )
        self._modules = [module for module in modules if hasattr(module, "lora_A")]

    def __call__(self, input_ND: Tensor, residual_NO: Tensor | None = None) -> Tensor:
        adapted = [module for module in self._modules if not module.disable_adapters]
        if not adapted:
            plain = frozen_linear(input_ND, self._weight, self._bias)
            return plain if residual_NO is None else plain + residual_NO
        found: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch
            input_ND,
            residual_NO,
            self._weight,
            self._bias,
            adapted[0].scaling[_ADAPTER],
            *(module.lora_A[_ADAPTER].weight for module in adapted),
            *(module.lora_B[_ADAPTER].weight for module in adapted),
        )
        return found


class _LoraLinear(torch.autograd.Function):
    """y = residual + x Wᵀ + b + s·[(x Aᵢᵀ) Bᵢᵀ]ᵢ with W, b frozen (Hu et al. 2021, eq. 3).

    A and B are fp32 and multiplied in the dtype of x, W in its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *given: Any) -> Tensor:  # Any: torch
        weight, bias, scale, *factors = given
        half = len(factors) // 2
        a_RD = torch.cat(factors[:half]).to(x.dtype)
        bs = [factor.to(x.dtype) for factor in factors[half:]]
        low_NR = times(x, a_RD)
        y = times(x, weight, bias)
        if residual is not None:
            y += residual
        for out, low, b in zip(_columns(y, bs), low_NR.chunk(half, 1), bs, strict=True):
            out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a_RD, low_NR, *bs)
        ctx.scale, ctx.has_residual = scale, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # Any: torch
        x, weight, a_RD, low_NR, *bs = ctx.saved_tensors
        grad_NO = grads[0]
        parts = _columns(grad_NO, bs)
        back_NR = torch.empty_like(low_NR)
        for out, grad, b in zip(back_NR.chunk(len(bs), 1), parts, bs, strict=True):
            out.addmm_(grad, b, beta=0, alpha=ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = times(grad_NO, weight.T).addmm_(back_NR, a_RD)
        grad_as = (back_NR.T @ x).float().chunk(len(bs))
        lows = low_NR.chunk(len(bs), 1)
        grad_bs = [
            torch.mm(grad.T, low).float().mul_(ctx.scale)
            for grad, low in zip(parts, lows, strict=True)
        ]
        residual = grad_NO if ctx.has_residual else None
        return (grad_x, residual, None, None, None, *grad_as, *grad_bs)


def _columns(whole_NO: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.split(whole_NO, [len(b) for b in bs], dim=1)


class _RmsNorm(torch.autograd.Function):
    """y = w·x / √(mean(x²) + ε) with w frozen, in fp32 (Zhang & Sennrich 2019, eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # Any: torch
        wide = x.float()
        norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # Any: torch
        x, weight, inverse = ctx.saved_tensors
        grad, wide = grads[0].float() * weight, x.float()
        along = (grad * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(x.shape[-1])
        return grad.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype), None, None


class _Rotate(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, eq. 34); the gradient turns the other way."""

    @staticmethod
    def forward(ctx: Any, x_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:  # Any: torch
        ctx.save_for_backward(cos_NE, sin_NE)
        return _turned(x_NHE, cos_NE, sin_NE)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # Any: torch
        cos_NE, sin_NE = ctx.saved_tensors
        return _turned(grads[0], cos_NE, -sin_NE), None, None


def _turned(x_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    cos, sin = cos_NE[:, None], sin_NE[:, None]
    half = x_NHE.shape[-1] // 2
    turned: Tensor = x_NHE * cos
    turned[..., :half].addcmul_(x_NHE[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x_NHE[..., :half], sin[..., half:])
    return turned


class _SwiGlu(torch.autograd.Function):
    """silu(gate)·up of [gate, up] side by side (Shazeer 2020, eq. 5)."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:  # Any: torch
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # Any: torch
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        found = torch.empty_like(both)
        for_gate, for_up = found.chunk(2, dim=-1)
        torch.mul(grads[0], functional.silu(gate), out=for_up)
        for_gate.copy_(torch.ops.aten.silu_backward(grads[0] * up, gate))
        return found
