"""500 steps of training with everything else in between leave no object, no hook and no memory behind."""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig
from fastprefix.hf.adapters.installation import Installation
from fastprefix.prefixes.prefix import LayerSlot, Prefix
from fastprefix.prefixes.prompt import SoftPrompt
from tests.support.saved_adapters import state
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")

IDS = torch.arange(3, 19).view(2, 8)


def alive() -> dict[str, int]:
    """How many of our objects, and how many tensors, the interpreter holds."""
    gc.collect()
    kinds = (
        Installation,
        LayerSlot,
        Prefix,
        SoftPrompt,
        torch.utils.hooks.RemovableHandle,
        torch.nn.Module,
        torch.Tensor,
    )
    objects = gc.get_objects()
    found = {kind.__name__: sum(issubclass(type(x), kind) for x in objects) for kind in kinds}
    return {**found, "bytes": sum(map(size, objects))}


def size(x: Any) -> int:
    """Bytes of a tensor's storage; others tests' sparse ones, which lie about, have none."""
    dense = issubclass(type(x), torch.Tensor) and x.layout == torch.strided
    return x.untyped_storage().nbytes() if dense else 0


def resident() -> int:
    """Bytes of memory that the process takes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def soak(tmp_path: Path) -> None:
    """Training with everything else in between: after ten rounds and after fifty the same things are alive."""
    model = tiny_model()
    bare, counts, memory = state(model), [], []

    def train(prefix: Any, steps: int) -> None:
        optimizer = torch.optim.AdamW([p for p in prefix.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()

    for turn in range(50):
        config: Any = (
            PrefixConfig(3),
            PrefixConfig(3, prefix_projection=True, encoder_hidden_size=5),
            PromptConfig(3),
        )[turn % 3]
        train(fastprefix.attach(model, config), 5)
        fastprefix.save(model, tmp_path)
        train(fastprefix.load(model, tmp_path, "again"), 5)
        fastprefix.set_prefix(model, "default")
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        with fastprefix.prefix_batch(model, ["again", None]):
            model.generate(IDS, max_new_tokens=3, do_sample=False)
        fastprefix.set_prefix(model, None)
        with fastprefix.shared_prompt(model, torch.arange(3, 6)):
            model(IDS)
        fastprefix.register(model, {"disk": tmp_path}, max_resident=1)
        fastprefix.set_prefix(model, "disk")
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        fastprefix.detach(model)
        assert state(model) == bare
        if turn in (9, 49):
            counts.append(alive())
            memory.append(resident())
    assert counts[0] == counts[1] and counts[0]["Installation"] == 0
    assert memory[1] - memory[0] < 32 * 2**20, f"{(memory[1] - memory[0]) / 2**20:.0f} MiB more"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_500_steps_leave_nothing_behind(tmp_path: Path) -> None:
    """In a process of its own: what other tests have compiled comes and goes in this one."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        alone.submit(soak, tmp_path).result()
