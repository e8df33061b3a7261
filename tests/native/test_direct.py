"""Calls that one C++ function checks and computes, and those of which Python or torch has something to see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix import prefix_attention, validation
from fastprefix.backends import native
from fastprefix.calls import transforms
from fastprefix.functional import to_args
from fastprefix.verification import store
from tests.support.operator_calls import make_call

pytestmark = pytest.mark.usefixtures("native")
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")


def leaves(**sizes: Any) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in make_call(**sizes).leaves.items()}


def attend(x: dict[str, Tensor], backend: str = "native", return_lse: Any = False, **options: Any) -> Any:
    names = ("scale", "key_padding_mask", "segment_ids", "q_start", "window", "softcap", "sinks", "bias")
    rest = [options.get(name) for name in (*names, "prefix_ids", "prefix_lens", "prefix_bias")]
    return native.attend(*(x[name] for name in NAMES), options.get("causal", True), *rest, backend, return_lse)


def test_a_plain_call_is_direct() -> None:
    x = leaves()
    o, lse = attend(x, return_lse=True)
    assert torch.equal(o, attend(x)) and torch.equal(o, prefix_attention(**x, backend="native"))
    expected, expected_lse = prefix_attention(**x, backend="reference", return_lse=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert o.transpose(1, 2).is_contiguous()


def test_the_direct_call_is_the_one_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients nothing of torch's dispatcher runs; with them everything does."""
    x = leaves()

    def never(*args: Any) -> None:
        raise AssertionError("not direct")

    monkeypatch.setattr(transforms, "call", never)
    prefix_attention(**x, backend="native")
    x["q"].requires_grad_()
    with pytest.raises(AssertionError, match="not direct"):
        prefix_attention(**x, backend="native")
    with torch.no_grad():
        prefix_attention(**x, backend="native")
    with torch.inference_mode():
        assert prefix_attention(**x, backend="native").is_inference()


class Subclass(Tensor):
    pass


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def computed(found: Any) -> bool:
    """Whether ``attend`` has computed a call, instead of leaving it to Python."""
    return isinstance(found, (Tensor, tuple))


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_a_subclass_or_a_tangent_is_seen(name: str) -> None:
    x = leaves()
    assert not computed(attend({**x, name: x[name].clone().requires_grad_()}))
    assert not computed(attend({**x, name: x[name].as_subclass(Subclass)}))  # type: ignore[dict-item]
    assert not computed(attend({**x, name: x[name].to("meta")}))
    assert not computed(attend({**x, name: torch._neg_view(x[name])}))
    with forward_ad.dual_level():
        assert not computed(attend({**x, name: forward_ad.make_dual(x[name], x[name])}))
    assert computed(attend({**x, name: torch.nn.Parameter(x[name], requires_grad=False)}))


def test_modes_and_transforms_are_seen() -> None:
    x = leaves()
    for mode in (Watching(), Dispatched(), torch.autocast("cpu"), torch.device("meta")):
        with mode:
            assert not computed(attend(x)), mode
    found = []
    torch.vmap(lambda q: (found.append(computed(attend({**x, "q": q}))), q)[1])(x["q"][None])
    torch.jit.trace(lambda q: (found.append(computed(attend({**x, "q": q}))), q)[1], x["q"], check_trace=False)
    torch.func.grad(lambda q: (found.append(computed(attend({**x, "q": q}))), q.sum())[1])(x["q"])
    assert len(found) >= 3 and not any(found)


def test_a_compiled_call_stays_one_graph() -> None:
    x = leaves()

    torch._dynamo.reset()  # other tests count towards its limit of recompilations

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(q: Tensor) -> Any:
        return prefix_attention(**{**x, "q": q}, backend="native") + 1

    torch.testing.assert_close(compiled(x["q"]), prefix_attention(**x, backend="native") + 1)


def test_what_does_not_fit_is_left_to_the_checks_that_can_say_why() -> None:
    x, one = leaves(), torch.ones(1)
    wrong: list[dict[str, Any]] = [
        {name: value}
        for name in NAMES
        for value in (x[name][0], x[name][..., :-1], x[name].double(), x[name].long(), x[name].to_sparse(), one)
    ]
    for change in wrong:
        assert attend({**x, **change}) is None, {n: v.shape for n, v in change.items()}
    options: list[dict[str, Any]] = [
        *({name: "text"} for name in ("causal", "scale", "q_start", "window", "softcap", "bias", "sinks")),
        *({name: True} for name in ("scale", "q_start", "window", "softcap")),
        *({name: float("nan")} for name in ("scale", "softcap")),
        {"key_padding_mask": torch.ones(2, 5)}, {"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)},
        {"segment_ids": torch.ones(2, 5)}, {"segment_ids": torch.ones(5, dtype=torch.long)},
        {"q_start": torch.ones(3, dtype=torch.long)}, {"q_start": 2**63}, {"q_start": 2**62 + 1}, {"q_start": one},
        {"window": 0}, {"window": 3, "causal": False}, {"softcap": 0.0}, {"softcap": -1.0}, {"sinks": torch.ones(5)},
        {"bias": torch.ones(7)}, {"bias": torch.ones(1, 1, 1, 1, 1)}, {"bias": torch.ones(5, dtype=torch.long)},
        {"prefix_lens": torch.ones(1, dtype=torch.long)}, {"prefix_ids": torch.zeros(2, dtype=torch.long)},
        {"prefix_bias": torch.zeros(2, 6)}, {"prefix_bias": torch.zeros(1, 2, 7)},
        {"prefix_bias": torch.zeros(2, 7) > 0},
    ]  # fmt: skip
    for option in options:
        assert attend(x, **option) is None, option
    bank = leaves(N=3)
    for ids in ([0, 3], [-2, 0], [0]):
        assert attend(bank, prefix_ids=torch.tensor(ids)) is None, ids
    ids = torch.tensor([0, 2])
    assert attend(bank, prefix_ids=ids) is not None and attend(bank) is None
    for lens in ([1, 2], [1, 2, 8], [-1, 2, 3]):
        assert attend(bank, prefix_ids=ids, prefix_lens=torch.tensor(lens)) is None, lens
    packed = leaves(packed=(3, 0, 4))
    assert attend(packed, prefix_ids=ids, prefix_lens=torch.tensor([3, 0, 4])) is not None
    assert attend(packed, prefix_ids=ids, prefix_lens=torch.tensor([3, 0, 3])) is None
    assert attend(packed, prefix_ids=ids) is None
    assert attend(x, backend="nativ") is True and attend(x, backend="aten") is True and attend(x, return_lse=1) is None


def test_what_fits_is_taken() -> None:
    """Each argument, or the refusals above would prove nothing."""
    whole = torch.zeros(2, dtype=torch.long)
    options: list[dict[str, Any]] = [
        {"causal": False}, {"scale": 0.3}, {"scale": 1}, {"q_start": 3}, {"q_start": whole},
        {"q_start": whole[0].int()},
        {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}, {"segment_ids": torch.zeros(2, 5, dtype=torch.int)},
        {"window": 2}, {"softcap": 3.0}, {"softcap": 3}, {"sinks": torch.zeros(6)}, {"sinks": torch.zeros(6).double()},
        {"bias": torch.zeros(5, 5)}, {"bias": torch.zeros(2, 1, 1, 5) > 0}, {"bias": torch.zeros(()).bfloat16()},
        {"prefix_bias": torch.zeros(2, 7)}, {"prefix_bias": torch.zeros(2, 7).half()},
    ]  # fmt: skip
    x = leaves()
    for option in options:
        assert attend(x, **option) is not None, option
    bank = leaves(N=3)
    assert attend(bank, prefix_ids=torch.zeros(2, 5, dtype=torch.int), prefix_lens=torch.tensor([7, 0, 3])) is not None
    for dtype in (torch.float16, torch.bfloat16):
        half = {name: value.to(dtype) for name, value in x.items()}
        assert attend(half) is not None
        assert attend({**half, "prefix_k": x["prefix_k"], "prefix_v": x["prefix_v"]}) is not None


def test_what_fits_passes_the_checks_that_are_left_out() -> None:
    """The checks in C++ stand for Python's: a call that they pass is right, and none that is right fails them."""
    base = leaves(H=4, H_kv=2, S=3, T=5, P=7, D=16, D_v=8)
    changes: list[tuple[str, Any]] = [(name, None) for name in base]
    for name, x in base.items():
        changes += [(name, x.to(torch.float64)), (name, x.to(torch.int32)), (name, x[0]), (name, x.unsqueeze(0))]
        changes += [(name, x.narrow(dim, 0, x.shape[dim] - 1)) for dim in range(x.dim())]
        changes += [(name, x.narrow(dim, 0, 0)) for dim in range(x.dim())]
        changes += [(name, x.to("meta")), (name, x.to_sparse()), (name, x.tolist()), (name, x.requires_grad_())]
    for name, changed in changes:
        given = {**base, name: changed}
        try:
            to_args(**given)
            right = True
        except ValueError:
            right = False
        found = attend(given)
        assert found is None or right, (name, getattr(changed, "shape", changed))
        if right and all(x.numel() for x in given.values()):
            assert found is not None, (name, changed.shape)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_call_with_gradients_or_on_another_device_is_checked_in_cpp(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = {name: value.to(device).requires_grad_() for name, value in leaves().items()}
    assert attend(x) is True
    monkeypatch.setattr(validation, "check_content", None)
    o = prefix_attention(**x)
    assert o.shape == x["q"].shape and o.requires_grad
    mixed = {**x, "prefix_k": torch.zeros_like(x["prefix_k"], device="meta" if device == "cpu" else "cpu")}
    assert attend(mixed) is None
    with pytest.raises(TypeError):  # the check is asked
        prefix_attention(**mixed)


def test_a_bank_on_another_device_is_not_read() -> None:
    bank = {name: value.to("meta") for name, value in leaves(N=3).items()}
    assert attend(bank, prefix_ids=torch.zeros(2, dtype=torch.long, device="meta")) is True


def test_the_profiler_sees_it() -> None:
    x = leaves()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        prefix_attention(**x, backend="native")
    assert [event.count for event in found.key_averages() if event.key == "fastprefix::native_forward"] == [1]


def test_wrong_numbers_of_arguments_are_told() -> None:
    with pytest.raises(TypeError, match="attend: got 1 arguments, expected 19"):
        native.attend(1)


class TestAuto:
    """``auto`` takes the direct call once it has decided for these kernels, and until something is wrong."""

    def test_it_is_decided_first(self) -> None:
        store.forget()
        x = leaves(S=3)
        assert attend(x, "auto") is True
        o = prefix_attention(**x)
        assert torch.equal(attend(x, "auto"), o)
        assert attend(leaves(S=4), "auto") is True, "another shape is another decision"
        store.forget_decisions()
        assert attend(x, "auto") is True

    def test_the_environment_overrules_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = leaves(S=3)
        prefix_attention(**x)
        monkeypatch.setenv("FASTPREFIX_BACKEND", "reference")
        assert attend(x, "auto") is True
        monkeypatch.setenv("FASTPREFIX_BACKEND", "native")
        assert computed(attend(leaves(S=9), "auto"))
