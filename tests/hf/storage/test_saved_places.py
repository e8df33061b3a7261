"""Files of soft prompts with a place in the text: read back with it, and refused by PEFT, which has no such prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PromptConfig, init
from fastprefix.hf.trainer import restore
from fastprefix.prefixes.prompt import SoftPrompt
from tests.support.saved_adapters import CONFIG, OWN, numbers, same
from tests.support.tiny_models import tiny_model

peft = pytest.importorskip("peft")
IDS = torch.tensor([[3, 4, 7, 5, 6], [3, 7, 5, 8, 9]])


@pytest.mark.parametrize("encoder", [None, "mlp"])
@pytest.mark.parametrize("place", ["after", 7])
def test_there_and_back(place: Any, encoder: Any, tmp_path: Path) -> None:
    model = tiny_model()
    prompt = fastprefix.attach(model, PromptConfig(3, init=init.normal(0.5), place=place, encoder=encoder))
    want = model(input_ids=IDS).logits
    fastprefix.save(model, tmp_path)
    again = tiny_model()
    loaded = fastprefix.load(again, tmp_path)
    assert isinstance(loaded, SoftPrompt) and loaded.config.place == place
    assert same(numbers(loaded), numbers(prompt))
    torch.testing.assert_close(again(input_ids=IDS).logits, want)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    at = "after the given text" if place == "after" else "in place of the token 7 in the text"
    assert f"trained embeddings {at}" in card and "PEFT has no format" in card and "PeftModel" not in card
    assert f"- {'prompt-tuning' if encoder is None else 'p-tuning'}\n" in card
    with pytest.raises((KeyError, ValueError), match="FASTPREFIX"):
        peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    front = tiny_model()
    other = fastprefix.attach(front, PromptConfig(3, init=init.normal(0.5), encoder=encoder))
    with pytest.raises(ValueError, match=f"place: got {place}, expected None"):
        restore(other, tmp_path)


def test_the_front_has_no_field_of_its_own(tmp_path: Path) -> None:
    """Such files are what they were before there were places."""
    model = tiny_model()
    fastprefix.attach(model, PromptConfig(3))
    fastprefix.save(model, tmp_path)
    assert "place" not in json.loads((tmp_path / OWN).read_text())
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "PROMPT_TUNING"


@pytest.mark.parametrize("place", ["inside", -2, [1], True])
def test_a_place_of_no_known_meaning(place: Any, tmp_path: Path) -> None:
    model = tiny_model()
    fastprefix.attach(model, PromptConfig(3, place="after"))
    fastprefix.save(model, tmp_path)
    own = json.loads((tmp_path / OWN).read_text())
    (tmp_path / OWN).write_text(json.dumps({**own, "place": place}))
    with pytest.raises(ValueError, match=rf"{OWN}: place: got .*, expected 'before', 'after' or the id"):
        fastprefix.load(tiny_model(), tmp_path)
