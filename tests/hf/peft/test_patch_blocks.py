"""A patched model inside ``prefix_batch`` and ``shared_prompt``, and prompts beside sliding windows."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import fastprefix
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.peft_models import ids, made

peft = pytest.importorskip("peft")


def two(kind: str, tokens: int = 5) -> Any:
    """A patched model with the adapters ``default`` and ``b``."""
    model = made(True, kind).eval()
    config = copy.deepcopy(model.peft_config["default"])
    config.num_virtual_tokens = tokens
    torch.manual_seed(7)
    model.add_adapter("b", config)
    return model


def alone(model: Any, name: str | None, **inputs: Any) -> torch.Tensor:
    if name is None:
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    try:
        return model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
    finally:
        model.set_adapter("default")


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("positions", [False, True])
def test_prefix_batch(kind: str, positions: bool) -> None:
    model, rows = two(kind, tokens=7), ids()
    batch = {"input_ids": rows}
    if positions:
        batch["position_ids"] = torch.arange(rows.shape[1]).expand(len(rows), -1)
    names = ["b", None, "default"][: len(rows)]
    want = [alone(model, n, **{k: x[i : i + 1] for k, x in batch.items()}) for i, n in enumerate(names)]
    with fastprefix.prefix_batch(model, names):
        got = model(**batch).logits
        with model.disable_adapter():
            bare = model(**batch).logits
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bare, alone(model, None, **batch), rtol=1e-4, atol=1e-4)
    with fastprefix.prefix_batch(model, ["b"] * len(rows)):
        got = model(**batch).logits
    torch.testing.assert_close(got[:, -rows.shape[1] :], alone(model, "b", **batch), rtol=1e-4, atol=1e-4)


def test_gated_prompts_and_a_shared_one_are_refused() -> None:
    model = made(True, "adaption")
    with pytest.raises(ValueError, match="model: got one with gated prompts"), fastprefix.shared_prompt(model, [5, 6]):
        pass


def test_a_generation_that_may_outgrow_a_window_is_peft_s() -> None:
    theirs, ours = (made(on, "prompt", base=ROWS["mistral_window"].build()).eval() for on in (False, True))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = theirs.generate(input_ids=ids(), **options)
    with pytest.warns(UserWarning, match="concatenated to every row, not shared: it may outgrow a window of 4"):
        got = ours.generate(input_ids=ids(), **options)
    assert torch.equal(got, want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.peft is None])
def test_every_model_that_peft_has_right(name: str) -> None:
    task = "CAUSAL_LM" if ROWS[name].generates else "FEATURE_EXTRACTION"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(ROWS[name].build(), config).eval()
    ours = fastprefix.patch(copy.deepcopy(theirs))
    want, got = (m(input_ids=ids(), attention_mask=torch.ones_like(ids()))[0] for m in (theirs, ours))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    grads = [
        torch.autograd.grad(x.square().mean(), m.prompt_encoder.parameters()) for x, m in ((want, theirs), (got, ours))
    ]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
