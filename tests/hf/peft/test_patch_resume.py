"""Training of a patched model stops, is written, and goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fastprefix  # noqa: E402
from tests.model_zoo.architectures import ROWS  # noqa: E402
from tests.model_zoo.peft_models import (  # noqa: E402
    ENCODERS,
    KINDS,
    PREFIX,
    P,
    add,
    ids,
    made,
    tasks,
    train,
    trained,
    tuned,
)

FILE = "prompt_encoder.safetensors"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adaption"])
def test_goes_on_where_it_stopped(kind: str, tmp_path: Path) -> None:
    """Into a model that was made anew, and as an adapter that a model did not have."""
    whole, first, again = (made(on, kind) for on in (False, True, True))
    want = train(whole, 5, **tasks(kind))
    assert train(first, 3, **tasks(kind)) == pytest.approx(want[:3], abs=1e-5)
    first.save_pretrained(tmp_path)
    with torch.no_grad():
        for p in again.prompt_encoder.parameters():
            p.zero_()
    objects = [id(p) for p in trained(again).values()]
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert [id(p) for p in trained(again).values()] == objects  # an optimizer made before has them
    other = made(True, kind)
    other.load_adapter(tmp_path, "loaded", is_trainable=True)
    other.set_adapter("loaded")
    for model in (again, other):
        assert not model.active_peft_config.inference_mode
        assert train(model, 2, **tasks(kind)) == pytest.approx(want[3:], abs=1e-5)


def test_a_classification_head_goes_on_too(tmp_path: Path) -> None:
    row = replace(ROWS["llama_gqa"], cls="LlamaForSequenceClassification")
    first, again = (made(True, "projection", base=row.build(), task_type="SEQ_CLS") for _ in range(2))
    with torch.no_grad():
        first.base_model.score.modules_to_save["default"].weight.normal_()
    first.save_pretrained(tmp_path)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(again(input_ids=ids()).logits, first(input_ids=ids()).logits)


def test_every_adapter_has_an_encoder_of_its_own(tmp_path: Path) -> None:
    model = made(True, "projection")
    add(model, **ENCODERS[PREFIX])
    model.save_pretrained(tmp_path / "chosen", selected_adapters=["other"])
    model.save_pretrained(tmp_path / "all")
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob(FILE))
    assert found == [f"all/other/{FILE}", f"all/{FILE}", f"chosen/other/{FILE}"]
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.add_(1)
    want = {name: x.clone() for name, x in model.state_dict().items() if "prompt_encoder" in name}
    model.save_pretrained(tmp_path / "all")
    again = made(True, "projection")
    again.load_adapter(tmp_path / "all", "default", is_trainable=True)
    again.load_adapter(tmp_path / "all" / "other", "other", is_trainable=True)
    assert all(torch.equal(again.state_dict()[name], x) for name, x in want.items())


def test_no_encoder_stays_behind_what_is_written_over_it(tmp_path: Path) -> None:
    made(True, "projection").save_pretrained(tmp_path)
    made(True, "prefix").save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


WRITTEN = "the encoder that training goes on with (written by a patched model's save_pretrained)"
WRONG: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "PEFT wrote it": (
        lambda: made(False, "projection"),
        lambda: made(True, "projection"),
        f"model_id: got no file {{folder}}/{FILE}, expected {WRITTEN}",
    ),
    "another hidden size": (
        lambda: made(True, "projection"),
        lambda: tuned(True, prefix_projection=True, encoder_hidden_size=5),
        f"{{folder}}/{FILE}: transform.0.weight: got shape [8, 16], expected shape [5, 16]",
    ),
    "another encoder": (
        lambda: made(True, "mlp"),
        lambda: made(True, "lstm"),
        f"{{folder}}/{FILE}: lstm_head.weight_ih_l0: got no such tensor, expected shape [32, 32]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named_and_nothing_is_changed(what: str, tmp_path: Path) -> None:
    write, make, message = WRONG[what]
    write().save_pretrained(tmp_path)
    model = make()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message.format(folder=tmp_path))):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())


def test_loaded_for_use_is_peft_s(tmp_path: Path) -> None:
    made(True, "projection").save_pretrained(tmp_path)
    theirs, ours = tuned(False), tuned(True)
    for model in (theirs, ours):
        model.load_adapter(tmp_path, "loaded")
        model.set_adapter("loaded")
        assert model.active_peft_config.inference_mode
    torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits, rtol=1e-4, atol=1e-4)
    assert isinstance(fastprefix.unpatch(ours), peft.PeftModelForCausalLM)


def test_only_missing_parameters_of_the_adapter_are_told(tmp_path: Path) -> None:
    told = []
    for on in (False, True):
        model = tuned(on)
        model.save_pretrained(tmp_path)
        told.append(model.load_adapter(tmp_path, "default").missing_keys)
    assert told[1] == told[0] == []


def test_initialised_from_text_as_peft_does_it() -> None:
    """PEFT runs the model without the adapter for that."""
    from tests.support.tiny_models import tiny_model, tiny_tokenizer

    text = "the colour of grass is green the colour of sky is blue"
    theirs, ours = (made(on, "cartridge", base=tiny_model()) for on in (False, True))
    want, got = (peft.initialize_kv_prefix_from_text(m, tiny_tokenizer(), text=text) for m in (theirs, ours))
    assert got.shape[0] == P and torch.equal(got, want)
    batch = ids(vocab=32)
    torch.testing.assert_close(ours(input_ids=batch).logits, theirs(input_ids=batch).logits, rtol=1e-4, atol=1e-4)
