"""The operator as torch sees it: two schemas, their fakes and the one autograd formula.

Registered when this module is imported, from torch alone. Layouts are part of the schema: ``o`` and the gradients of
q, k and v lie in [B, S, H, D] storage, as models hold them; ``lse`` and the gradients of the prefix are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as fwad
from torch.nn import Parameter

from . import dispatch, reference
from ._ops import add_op_namespace_prefix, ops
from .types import AttentionArgs, Grads, Needs, lse_dtype, to_bshd
from .verification import first_use

# The inputs of both operators; no other line of the package gives their order. ``q_start`` is a number or a tensor and
# has an input for each; neither means T - S.
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? sinks, Tensor? bias, "
    "Tensor? key_padding_mask, Tensor? segment_ids, Tensor? q_start_tensor, Tensor? prefix_ids, Tensor? prefix_lens, "
    "Tensor? prefix_bias, Tensor? dropout_seed, SymInt? q_start, bool causal, float scale, SymInt? window, "
    "float? softcap, float dropout_p, bool bias_grad, str backend"
)
_NAMES = tuple(part.split()[-1] for part in _SCHEMA.split(", "))
# The field of AttentionArgs that each input holds; the last input, the backend's name, is no field.
_FIELDS = tuple("q_start" if name == "q_start_tensor" else name for name in _NAMES[:-1])
_START_TENSOR, _START_NUMBER = (i for i, field in enumerate(_FIELDS) if field == "q_start")
TENSORS = _NAMES.index("q_start")  # so many inputs, the first, are tensors; the others are numbers, bools and a name
NEEDED = (
    *range(5),
    *(_NAMES.index(name) for name in ("bias", "prefix_bias", "sinks")),
)  # in the order of the op's needs

library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")
library.define(f"prefix_attn_fwd({_SCHEMA}) -> (Tensor o, Tensor lse)")
# One tensor for each True in needs, which has the order of Needs, and at last sinks.
library.define(f"prefix_attn_bwd({_SCHEMA}, Tensor o, Tensor lse, Tensor do, bool[] needs) -> Tensor[]")


def to_op_inputs(args: AttentionArgs, backend: str) -> list[Any]:
    """The operators' inputs, in the schema's order, of a call on a backend (a name, or ``auto``)."""
    values = [getattr(args, field) for field in _FIELDS]
    values[_START_NUMBER if isinstance(args.q_start, Tensor) else _START_TENSOR] = None
    values.append(backend)
    return values


def from_op_inputs(values: Sequence[Any]) -> tuple[AttentionArgs, str]:
    """The call and its backend: the inverse of :func:`to_op_inputs`."""
    *values, backend = values
    fields = dict(zip(_FIELDS, values, strict=True))  # of q_start's two inputs, the number: it comes last
    if values[_START_TENSOR] is not None:
        fields["q_start"] = values[_START_TENSOR]
    return AttentionArgs(**fields), backend


def _fwd(*values: Any) -> tuple[Tensor, Tensor]:
    return _chosen_fwd(*from_op_inputs(values))


def _chosen_fwd(args: AttentionArgs, backend: str) -> tuple[Tensor, Tensor]:
    backend_module, route = dispatch.choose(args, backend)
    with _without_autocast(args):
        o, lse = backend_module.fwd(args, route)
        return to_bshd(o), lse.contiguous()


def _without_autocast(args: AttentionArgs) -> AbstractContextManager[object]:
    """Autocast has been applied to the inputs; inside, it would turn a backend's fp32 products into bf16 ones."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(args.q.device.type, enabled=False)
    return nullcontext()


def needs_no_operator(args: AttentionArgs) -> bool:
    """Whether nobody would notice that a call is none of a torch operator: no gradient, mode, transform or subclass.

    An operator written in Python costs 10 us a call, a tenth of a step of decoding.
    """
    trained = (args.q, args.k, args.v, args.prefix_k, args.prefix_v, args.sinks, args.bias, args.prefix_bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trained):
        return False
    if args.q.device.type == "meta":  # only the operator's fake knows how to run there
        return False
    watched = first_use.is_traced() or torch._C._len_torch_function_stack() or fwad._current_level >= 0
    if watched or torch._C._are_functorch_transforms_active():
        return False
    others = (args.key_padding_mask, args.segment_ids, args.q_start, args.prefix_ids, args.prefix_lens)
    return all(x is None or type(x) in (Tensor, Parameter, int) for x in (*trained, *others))


def forward(args: AttentionArgs, backend: str) -> tuple[Tensor, Tensor]:
    """What ``prefix_attn_fwd`` computes, without the operator."""
    with torch._C._AutoDispatchBelowADInplaceOrView():  # as an operator's: its views may be modified in place
        return _chosen_fwd(args, backend)


def _bwd(*values: Any) -> list[Tensor]:
    *inputs, o, lse, do, needs = values
    args, backend = from_op_inputs(inputs)
    *needs, sinks = needs
    found: list[Tensor] = []
    if any(needs):
        asked = Needs(*needs)
        backend_module, route = dispatch.choose(args, backend, "backward" if asked.content else "lowest")
        with _without_autocast(args):
            grads: Grads = backend_module.bwd(args, o, lse, do, asked, route)
        found = [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]
    content = sum(needs[:3])  # q, k and v come first
    found = [to_bshd(grad) if i < content else grad.contiguous() for i, grad in enumerate(found)]
    return [*found, _sinks_grad(args, o, lse, do)] if sinks else found


def _sinks_grad(args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor) -> Tensor:
    """A sink is a key whose value is 0: its score's gradient is ``-A_sink * delta``, delta = rowsum(do * o)."""
    assert args.sinks is not None
    delta = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)  # [B, H, S]
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    mass = torch.exp(args.sinks.to(lse.dtype)[None, :, None] - lse)
    return -(mass * delta).sum((0, 2)).to(args.sinks.dtype)


def _fake_fwd(*values: Any) -> tuple[Tensor, Tensor]:
    q, v = values[0], values[2]
    batch, heads, seq, _ = q.shape
    o = q.new_empty(batch, seq, heads, v.shape[3]).transpose(1, 2)
    return o, q.new_empty(batch, heads, seq, dtype=lse_dtype(q.dtype))


def _fake_bwd(*values: Any) -> list[Tensor]:
    inputs, needs = values[: len(_NAMES)], values[-1]
    content = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in inputs[:3]]
    rest = [None if inputs[i] is None else inputs[i].new_empty(inputs[i].shape) for i in NEEDED[3:]]
    return [grad for grad, need in zip([*content, *rest], needs, strict=True) if need and grad is not None]


class _PrefixAttention(torch.autograd.Function):
    """The one autograd formula. ``lse`` is not differentiable."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        o, lse = _below_autograd(ops.prefix_attn_fwd.default, *inputs)
        ctx.save_for_backward(*inputs[:TENSORS], o, lse)
        ctx.scalars = inputs[TENSORS:]
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: None = None) -> tuple[Tensor | None, ...]:
        *tensors, o, lse = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(_NAMES)
        if do is None:
            return tuple(grads)
        needs = [bool(ctx.needs_input_grad[i]) for i in NEEDED]
        if any(needs):
            found = ops.prefix_attn_bwd(*tensors, *ctx.scalars, o, lse, do, needs)
            for i, grad in zip([i for i, need in zip(NEEDED, needs, strict=True) if need], found, strict=True):
                grads[i] = grad
        return tuple(grads)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_below_autograd(ops.prefix_attn_bwd.default, *inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("fastprefix: prefix_attention has no second derivative (double backward is not offered)")


def _below_autograd(op: Any, *inputs: Any) -> Any:
    # Below views, too: the [B, H, S, D] view of [B, S, H, D] storage must not count as a view made by the Function,
    # which could not be modified in place.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op(*inputs)


def _differentiated(inputs: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def check_backward(inputs: Sequence[Any]) -> None:
    """Raise UnsupportedError where gradients are wanted by the name of a backend that computes none of such a call.

    At the forward: until its backward runs, a program may do hours of work.
    """
    trained = any(inputs[i] is not None and inputs[i].requires_grad for i in NEEDED[:-1])  # sinks need no backend
    # The one whose backward takes less than its forward; on meta tensors no backend runs.
    if inputs[-1] == "cuda" and trained and inputs[0].device.type != "meta":
        dispatch.choose(from_op_inputs(inputs)[0], inputs[-1], "backward")


def _refuse_forward_mode(inputs: tuple[Any, ...]) -> None:
    if fwad._current_level < 0:
        return
    if any(isinstance(x, Tensor) and fwad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError("fastprefix: prefix_attention has no forward-mode derivative")


def _autograd_fwd(*inputs: Any) -> tuple[Tensor, Tensor]:
    _refuse_forward_mode(inputs)
    if _differentiated(inputs):
        check_backward(inputs)
        return _PrefixAttention.apply(*inputs)
    return _below_autograd(ops.prefix_attn_fwd.default, *inputs)


def _autograd_bwd(*inputs: Any) -> list[Tensor]:
    if _differentiated(inputs):
        return list(_NoSecondDerivative.apply(*inputs))
    return _below_autograd(ops.prefix_attn_bwd.default, *inputs)


# Functions of our own at the autograd key: torch.library.register_autograd costs 100 us more a call.
for _name, _impl, _fake, _autograd in (
    ("prefix_attn_fwd", _fwd, _fake_fwd, _autograd_fwd),
    ("prefix_attn_bwd", _bwd, _fake_bwd, _autograd_bwd),
):
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    library.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=library)

prefix_attn_fwd = ops.prefix_attn_fwd


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operator as the oracle's algebra in plain ones, for exporters that know those alone (ONNX).

    A table for ``torch.export.ExportedProgram.run_decompositions``. It is not in torch's own, where ``torch.compile``
    looks: there the operator stays one.
    """

    def plain(*values: Any) -> tuple[Tensor, Tensor]:
        args, _ = from_op_inputs(values)
        o, lse = reference.fwd(args)
        return to_bshd(o), lse.contiguous()

    return {prefix_attn_fwd.default: plain}
