"""Training of a patched model: where PEFT's arrives, in every mode that a trainer has."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.model_zoo.architectures import ROWS  # noqa: E402
from tests.model_zoo.inputs import without_dropout  # noqa: E402
from tests.model_zoo.peft_models import (  # noqa: E402
    KINDS,
    PREFIX,
    gradient,
    ids,
    made,
    tasks,
    train,
    trained,
    trainer,
    tuned,
)
from tests.support.tiny_models import tiny_model  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = ("prompt", "mlp", "lstm", "multitask")


def both(kind: str) -> tuple[Any, Any]:
    """PEFT's and the patched one, in train mode."""
    theirs, ours = (made(on, kind).train() for on in (False, True))
    return theirs, ours


@pytest.mark.parametrize("kind", KINDS)
def test_training_leads_to_the_same_parameters(kind: str) -> None:
    theirs, ours = both(kind)
    before = {name: p.detach().clone() for name, p in trained(theirs).items()}
    want, got = (train(m, 5, torch.optim.AdamW, 1e-2, **tasks(kind)) for m in (theirs, ours))
    assert got == pytest.approx(want, abs=1e-4) and want[-1] < want[0]
    for name, p in trained(theirs).items():
        assert not torch.equal(p, before[name])
        torch.testing.assert_close(trained(ours)[name], p, **CLOSE)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "adaption"])
def test_a_base_model_in_bf16(kind: str) -> None:
    """The adapter stays in fp32, as in PEFT; rounding is all that differs."""
    theirs, ours = (made(on, kind, base=ROWS["llama_gqa"].build(torch.bfloat16)).train() for on in (False, True))
    exact, _ = both(kind)
    with torch.no_grad():
        for name, p in trained(exact).items():
            p.copy_(trained(theirs)[name])
    want, got, truth = (m(input_ids=ids(), labels=ids()).logits.float() for m in (theirs, ours, exact))
    assert (got - truth).abs().max() < 2 * (want - truth).abs().max()
    gradients = [gradient(m, input_ids=ids(), labels=ids()).float() for m in (theirs, ours, exact)]
    assert (gradients[1] - gradients[2]).norm() < 2 * (gradients[0] - gradients[2]).norm()
    assert {p.dtype for p in trained(ours).values()} == {p.dtype for p in trained(theirs).values()}


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    """Rotary positions leave a prompt's keys in fp32 beside values in bf16."""
    if kind == "lstm" and not runs_bf16_lstm():
        pytest.skip("this CPU's torch has no LSTM in bf16")
    theirs, ours = both(kind)
    batch = {"input_ids": ids(), "labels": ids(), **tasks(kind)}
    truth = theirs(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (m(**batch) for m in (theirs, ours))
    got.loss.backward()
    assert got.logits.dtype == want.logits.dtype
    assert (got.logits.float() - truth).abs().max() < 2 * (want.logits.float() - truth).abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(ours).values())


def runs_bf16_lstm() -> bool:
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(8, 8, bidirectional=True, batch_first=True)(torch.zeros(2, 3, 8))
    except RuntimeError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefix", "prompt", "multitask"])
def test_compiles_in_one_graph(kind: str) -> None:
    """As PEFT's do; but which tasks a batch has is read from their tensor, which breaks the graph."""
    batch = {"input_ids": ids(), "labels": ids(), **tasks(kind)}
    want = gradient(made(False, kind), **batch)
    model = made(True, kind).train()
    torch.compile(model, fullgraph=kind != "multitask", backend="aot_eager")(**batch).loss.backward()
    got = torch.cat([p.grad.flatten() for p in trained(model).values()])
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.slow
def test_compiles_and_checkpoints() -> None:
    batch = {"input_ids": ids(), "labels": ids(), "use_cache": False}
    want = gradient(tuned(False), **batch)
    model = tuned(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.compile(model, backend="aot_eager")(**batch).loss.backward()
    got = torch.cat([p.grad.flatten() for p in trained(model).values()])
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_under_dropout_goes_peft_s_own_way_and_says_so_once(kind: str) -> None:
    theirs, ours = (made(on, kind, "gpt2").train() for on in (False, True))
    batch = {"input_ids": ids(), "labels": ids(), **tasks(kind)}
    with pytest.warns(UserWarning, match=r"concatenated to every row, not shared: dropout is active"):
        ours(**batch)
    torch.manual_seed(4)
    want = theirs(**batch)
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprefix")
        got = ours(**batch)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)


def test_a_prefix_under_dropout_drops_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers are drawn in another order; over many draws the mean output is the same."""
    theirs, ours = (tuned(on, PREFIX, "gpt2").train() for on in (False, True))
    means = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        draws = torch.stack([model(input_ids=ids()).logits.detach() for _ in range(100)])
        means.append((draws.mean(0), draws.var(0).mean().item()))
    assert (means[0][0] - means[1][0]).abs().mean() < 0.1 * means[0][0].abs().mean()
    assert means[1][1] == pytest.approx(means[0][1], rel=0.2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("row", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_in_both_modes(kind: str, row: str, reentrant: bool) -> None:
    batch = {"input_ids": ids(), "labels": ids(), **tasks(kind)}
    want = gradient(without_dropout(made(False, kind, row)), **batch)
    model = without_dropout(made(True, kind, row))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradient(model, **batch), want, rtol=1e-4, atol=1e-4)
    assert want.abs().max() > 0


@pytest.mark.slow
def test_trainer_with_checkpointing_learns_the_same(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        model = tuned(True, base=tiny_model())
        trainer(model, tmp_path / str(on), 3, gradient_checkpointing=on).train()
        found.append(model.prompt_encoder.default.embedding.weight)
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "multitask"])
def test_trainer_arrives_where_peft_s_does(kind: str, tmp_path: Path) -> None:
    models = [made(on, kind, base=tiny_model()) for on in (False, True)]
    for on, model in enumerate(models):
        trainer(model, tmp_path / str(on), 4, save_strategy="no", gradient_accumulation_steps=2).train()
    for name, p in trained(models[0]).items():
        torch.testing.assert_close(trained(models[1])[name], p, rtol=1e-4, atol=1e-5)
    runs = [trainer(model, tmp_path / "predict", 1) for model in models]
    want, got = (run.predict(run.eval_dataset) for run in runs)
    torch.testing.assert_close(torch.tensor(got.predictions), torch.tensor(want.predictions), rtol=1e-4, atol=1e-4)
