"""Each forward reads the prefix as it is then, however it was changed after an earlier forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastprefix
from fastprefix import PrefixConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB

P = 5


def attached() -> tuple[Any, Any]:
    model = ROWS["llama_gqa"].build()
    return model, fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6)))


@torch.no_grad()
def _in_place(model: Any, prefix: Any) -> None:
    for p in prefix.parameters():
        p.mul_(-2.0)


def _data(model: Any, prefix: Any) -> None:
    for p in prefix.parameters():
        p.data = -p.data


def _swapped(model: Any, prefix: Any) -> None:
    for layer in prefix.layers:
        layer.k, layer.v = nn.Parameter(layer.k.detach() + 1.0), nn.Parameter(layer.v.detach() - 1.0)


def _stepped(model: Any, prefix: Any) -> None:
    optimizer = torch.optim.SGD(prefix.parameters(), lr=5.0)
    model(torch.arange(3, 9)[None]).logits.sin().sum().backward()
    optimizer.step()


def _replaced(model: Any, prefix: Any) -> None:
    prefix.set_direct(*([x.detach() * 2.0 for x in xs] for xs in zip(*prefix.key_values(), strict=True)))
    for layer, module in zip(prefix.layers, model.modules_with_slots, strict=True):
        module.fastprefix.prefixes["default"] = layer


def _retyped(model: Any, prefix: Any) -> None:
    model.double()
    _in_place(model, prefix)


CHANGES = {f.__name__[1:]: f for f in (_in_place, _data, _swapped, _stepped, _replaced, _retyped)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_prefix_is_seen(change: str) -> None:
    model, prefix = attached()
    model.modules_with_slots = [layer.self_attn for layer in model.model.layers]
    ids = torch.randint(3, VOCAB, (2, 7))
    with torch.no_grad():
        before = model(ids).logits
    CHANGES[change](model, prefix)
    with torch.no_grad():
        got = model(ids).logits
    other = ROWS["llama_gqa"].build().to(got.dtype)
    other.load_state_dict({n: x for n, x in model.state_dict().items() if "fastprefix" not in n})
    fastprefix.attach(other, PrefixConfig(P, init=init.normal(0.6)), weights=_copy_of(prefix))
    with torch.no_grad():
        want = other.to(got.dtype)(ids).logits
    assert not torch.allclose(got.float(), before, atol=1e-3)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("hooked", ["layer", "slot"])
def test_a_hook_on_what_holds_the_prefix_runs(hooked: str) -> None:
    """Pruning and sharding set parameters in such hooks."""
    model, prefix = attached()
    ids = torch.randint(3, VOCAB, (2, 7))
    with torch.no_grad():
        model(ids)
        ran: list[nn.Module] = []
        slots = [layer.self_attn.fastprefix for layer in model.model.layers]
        modules = slots if hooked == "slot" else list(prefix.layers)
        handles = [m.register_forward_pre_hook(lambda m, args: ran.append(m)) for m in modules]
        model(ids)
        assert ran == modules
        for handle in handles:
            handle.remove()
        want = model(ids).logits
        handles = [m.register_forward_hook(lambda m, args, kv: kv._replace(k=-kv.k)) for m in modules]
        hidden = model(ids).logits
        for handle in handles:
            handle.remove()
        assert not torch.allclose(hidden, want, atol=1e-3)
        torch.testing.assert_close(model(ids).logits, want)


def _copy_of(prefix: Any) -> Callable[[Any], None]:
    def fill(fresh: Any) -> None:
        fresh.load_state_dict({n: x.detach().clone() for n, x in prefix.state_dict().items()})

    return fill
