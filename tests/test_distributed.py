"""DDP, FSDP2 and tensor parallelism in two processes: the losses and gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init
from tests import distributed
from tests.tiny import save_tiny, tiny_model

P, STEPS, LR = 3, 3, 0.05
KINDS: dict[str, dict[str, Any]] = {"direct": {"num_frozen_tokens": 1}, "projected": {"prefix_projection": True}}


def attached(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = tiny_model()
    if options.pop("prompt", False):
        return model, fastprefix.attach(model, fastprefix.PromptConfig(P))
    return model, fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6), **options))


def batch() -> Tensor:
    return torch.randint(3, 32, (4, 9), generator=torch.Generator().manual_seed(5))


def loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model: Any, prefix: Any, ids: Tensor, steps: int = STEPS, optimizer: Any = None) -> dict[str, Any]:
    """Losses, the first step's gradients and the numbers at the end, whole."""
    optimizer = optimizer or torch.optim.AdamW(prefix.parameters(), lr=LR)
    losses, grads = [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, ids)
        value.backward()
        grads = grads or {name: whole(p.grad).clone() for name, p in prefix.named_parameters()}
        optimizer.step()
        losses.append(value.item())
    return {"losses": losses, "grads": grads, "numbers": numbers(prefix)}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()


def numbers(prefix: Any) -> dict[str, Tensor]:
    return {name: whole(x).clone() for name, x in prefix.state_dict().items()}


def mean_losses(results: list[dict[str, Any]]) -> list[float]:
    return [sum(each) / len(each) for each in zip(*(r["losses"] for r in results), strict=True)]


def assert_alone(results: list[dict[str, Any]], want: dict[str, Any]) -> None:
    """Every process got what one process gets of the whole batch."""
    assert mean_losses(results) == pytest.approx(want["losses"], abs=1e-5)
    for result in results:
        for what in ("grads", "numbers"):
            assert result[what].keys() == want[what].keys()
            for name, x in want[what].items():
                torch.testing.assert_close(result[what][name], x, rtol=1e-3, atol=1e-4)


def ddp(rank: int, kind: str) -> dict[str, Any]:
    from accelerate import Accelerator

    model, prefix = attached(**KINDS[kind])
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=LR)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return train(model, prefix, batch().chunk(2)[rank], optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ddp(kind: str, tmp_path: Path) -> None:
    assert_alone(distributed.run(ddp, tmp_path, kind), train(*attached(**KINDS[kind]), batch()))
