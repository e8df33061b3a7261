"""A whole training step under torch.compile: forward, loss, backward and optimizer, and nothing compiled anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB

P, S = 5, 9
BATCHES = (S, S, S + 2, S, S + 5, S)  # tokens; from the third on the size is a variable


def step_of(projected: bool) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    model = ROWS["llama_gqa"].build().train()
    prefix = fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6), prefix_projection=projected))
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.05)

    def step(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        for p in prefix.parameters():
            p.grad = None
        return loss.detach()

    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "projected"),
    [
        ("aot_eager", False),
        ("inductor", True),
        pytest.param("aot_eager", True, marks=pytest.mark.exhaustive),
        pytest.param("inductor", False, marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_step(backend: str, projected: bool) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles C++ on a CPU: no g++ here")
    batches = [torch.randint(3, VOCAB, (2, n)) for n in BATCHES]
    eager = step_of(projected)
    want = [eager(ids).item() for ids in batches]
    torch._dynamo.reset()
    counters: Any = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(step_of(projected), backend=backend)
    got = [compiled(ids).item() for ids in batches[:3]]
    assert counters["stats"]["unique_graphs"] > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        got += [compiled(ids).item() for ids in batches[3:]]
    assert got == pytest.approx(want, rel=1e-4)
