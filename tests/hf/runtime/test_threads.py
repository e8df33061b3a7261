"""Models in several threads: two models at once, one model in turns, and blocks that choose for their thread."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.assets.cache import no_progress_bars
from fastprefix.hf.adapters import trial_forward
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.model import probing
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")

from transformers.utils import logging as transformers_logging

IDS = torch.arange(3, 19).view(2, 8)
CONFIGS: dict[str, Any] = {
    "direct": lambda: PrefixConfig(3, init=init.normal(0.5)),
    "projected": lambda: PrefixConfig(3, prefix_projection=True, encoder_hidden_size=5),
    "prompt": lambda: PromptConfig(3),
    "encoded": lambda: PromptConfig(3, encoder="lstm", encoder_hidden_size=5),
}


def attached(kind: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    model = tiny_model()
    fastprefix.attach(model, CONFIGS[kind]())
    return model


def together(*jobs: Callable[[], Any]) -> None:
    """Run jobs in a thread each, started at once; the first error is raised."""
    errors: list[BaseException] = []
    gate = threading.Barrier(len(jobs))

    def guarded(job: Callable[[], Any]) -> None:
        gate.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def refused(model: Any) -> None:
    """A forward of this thread, while another one has a block open."""
    with pytest.raises(RuntimeError, match="another thread has a block open on this model"):
        model(IDS)


@pytest.mark.parametrize("kinds", [("direct", "prompt"), ("projected", "direct")], ids=str)
def test_two_models_at_once(kinds: tuple[str, str]) -> None:
    def steps(model: Any) -> list[torch.Tensor]:
        found = []
        for _ in range(6):
            model(IDS, labels=IDS).loss.backward()
            trained = [p for p in model.parameters() if p.requires_grad]
            found += [p.grad.clone() for p in trained if p.grad is not None]
            with torch.no_grad():
                found += [model.generate(IDS, max_new_tokens=3, do_sample=False)]
            model.zero_grad()
        return found

    models = [attached(kind, seed) for seed, kind in enumerate(kinds)]
    want = [steps(model) for model in models]
    got: dict[int, list[torch.Tensor]] = {}
    together(*(lambda i=i: got.update({i: steps(models[i])}) for i in range(2)))  # type: ignore[misc]
    for i in range(2):
        assert len(got[i]) == len(want[i]) > 6
        assert all(torch.equal(a, b) for a, b in zip(got[i], want[i]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_model_serves_two_threads(kind: str) -> None:
    model = attached(kind)
    rows = [IDS, IDS.flip(1)[:1]]
    with torch.no_grad():
        want = [(model(x).logits, model.generate(x, max_new_tokens=4, do_sample=False)) for x in rows]

    @torch.no_grad()
    def serve(i: int) -> None:
        for _ in range(12):
            assert torch.equal(model(rows[i]).logits, want[i][0])
            assert torch.equal(model.generate(rows[i], max_new_tokens=4, do_sample=False), want[i][1])

    together(*(lambda i=i: serve(i) for i in (0, 1, 0)))  # type: ignore[misc]


@pytest.mark.parametrize("row", ["bart", "m2m_100"])
def test_tables_of_positions_are_moved_for_one_forward(row: str) -> None:
    model = ENCODER_DECODERS[row].build()
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)))
    assert require_installation(model).hooks[-1].shifted_table is not None
    rows = [IDS, IDS.flip(1)[:1, :5]]
    with torch.no_grad():
        want = [model(x, decoder_input_ids=x).logits for x in rows]

    @torch.no_grad()
    def serve(i: int) -> None:
        for _ in range(30):
            assert torch.equal(model(rows[i], decoder_input_ids=rows[i]).logits, want[i])

    together(*(lambda i=i: serve(i) for i in (0, 1)))  # type: ignore[misc]


def test_one_threads_training_beside_anothers_use() -> None:
    model = attached("projected")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    prefix = list(model._fastprefix.selection.prefixes["default"].parameters())
    with torch.no_grad():
        logits = model(IDS).logits
    want = torch.autograd.grad(model(IDS, labels=IDS).loss, prefix)

    def train() -> None:
        for _ in range(8):
            got = torch.autograd.grad(model(IDS, labels=IDS).loss, prefix)
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, want, strict=True))

    @torch.no_grad()
    def use() -> None:
        for _ in range(16):
            assert torch.equal(model(IDS).logits, logits)

    together(train, use)


def test_a_block_chooses_for_its_own_thread() -> None:
    model = attached("direct")
    fastprefix.attach(model, CONFIGS["direct"](), "other")
    with torch.no_grad():
        want = model(IDS).logits

    def forward() -> None:
        refused(model)
        block = fastprefix.prefix_batch(model, ["default", None])
        with pytest.raises(ValueError, match="model: got one on which another thread has a block open"):
            block.__enter__()
        with pytest.raises(ValueError, match="inside a block of prefix_batch"):
            fastprefix.set_prefix(model, "default")

    with torch.no_grad(), fastprefix.prefix_batch(model, ["other", None]):
        mixed = model(IDS).logits
        together(forward)
        assert torch.equal(model(IDS).logits, mixed) and not torch.equal(mixed, want)
    with fastprefix.shared_prompt(model, torch.arange(3, 6)):
        together(lambda: refused(model))

    def after() -> None:
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, want)

    together(after)


def test_a_refused_forward_does_not_touch_the_one_that_runs() -> None:
    """The other thread's hooks run after its error, while this one is between two layers."""
    model = attached("prompt")
    names = ["default", None]
    with torch.no_grad(), fastprefix.prefix_batch(model, names):
        want = model(IDS).logits
        hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: together(lambda: refused(model)))
        # The prompt's own forward passes the layer too.
        assert torch.equal(model(IDS).logits, want)
        hook.remove()


def test_choosing_waits_for_the_forward_that_runs() -> None:
    model = attached("direct")
    fastprefix.attach(model, CONFIGS["projected"](), "other")
    with torch.no_grad():
        want = {}
        for name in ("default", "other", None):
            fastprefix.set_prefix(model, name)
            want[name] = model(IDS).logits

    @torch.no_grad()
    def use() -> None:
        for _ in range(40):
            got = model(IDS).logits
            assert any(torch.equal(got, one) for one in want.values())

    def choose() -> None:
        for name in (*want, *want, *want):
            fastprefix.set_prefix(model, name)

    together(use, choose)


def test_an_interrupted_forward_keeps_nobody_waiting() -> None:
    model = attached("direct")
    with torch.no_grad():
        want = model(IDS).logits

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    handle.remove()

    def forward() -> None:
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(IDS).logits, want)

    together(forward)
    together(forward, forward)
    forward()


def test_settings_of_the_process_outlive_threads_that_attach() -> None:
    """The first of two threads to begin ends first: it must not restore what the second one then restores to."""
    filters = list(warnings.filters)
    blocks = [probing.evaluating, trial_forward._silent, no_progress_bars]
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    bars = transformers_logging.is_progress_bar_enabled()

    def block() -> ExitStack:
        stack = ExitStack()
        for make in blocks:
            stack.enter_context(make(nn.Linear(1, 1)) if make is probing.evaluating else make())
        return stack

    def first() -> None:
        with block():
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second() -> None:
        assert first_in.wait(60)
        with block():
            second_in.set()
            assert first_out.wait(60)
            assert not compiles() and not transformers_logging.is_progress_bar_enabled()

    together(first, second)
    assert compiles()
    assert list(warnings.filters) == filters
    assert transformers_logging.is_progress_bar_enabled() == bars


def compiles() -> bool:
    """Whether a function that is to be compiled is."""

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch.compiler.is_compiling() else x

    return bool(compiled(torch.zeros(1)).item())
