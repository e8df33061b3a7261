"""What PEFT gets wrong, each beside what a patched model does; when PEFT is right about one, a test here says so."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.model_zoo.architectures import ROWS  # noqa: E402
from tests.model_zoo.inputs import without_dropout  # noqa: E402
from tests.model_zoo.peft_models import (  # noqa: E402
    GREEDY,
    PREFIX,
    PROMPT,
    B,
    P,
    S,
    add,
    concatenated,
    gradient,
    ids,
    made,
    padding,
    trained,
    tuned,
)
from tests.project import peft_defects  # noqa: E402
from tests.project.peft_defect_cases import RIGHT  # noqa: E402

PEFT = {
    "checkpointing-add": "ValueError: PREFIX_TUNING does not work with gradient checkpointing",
    "checkpointing": "RuntimeError: The size of tensor",
    "left-PREFIX_TUNING": r"logits off by \d",
    "left-PROMPT_TUNING": r"logits off by \d",
    "left-generate-PROMPT_TUNING": "other tokens",
    "packed-PREFIX_TUNING": r"logits off by \d",
    "packed-PROMPT_TUNING": r"logits off by \d",
    "second-PREFIX_TUNING": "RuntimeError",
    "second-PROMPT_TUNING": "other tokens",
    "static-PREFIX_TUNING": "AttributeError",
    "static-PROMPT_TUNING": "IndexError",
    "no-cache": "RuntimeError",
    "lookup-PREFIX_TUNING": "RuntimeError",
    "lookup-PROMPT_TUNING": "RuntimeError",
    "embeds": "ValueError",
    "names": r"logits off by \d",
    "names-generate": "ValueError",
    "window": "late tokens never see it",
    "zero": f"after 5 steps {P} tokens of rank 1",
    "resume-PREFIX_TUNING": "ValueError: Cannot set a prompt learning adapter to trainable",
    "resume-P_TUNING": "ValueError: Cannot set a prompt learning adapter to trainable",
    "trainer-PREFIX_TUNING": "RuntimeError: Error.* in loading state_dict",
    "trainer-P_TUNING": r"weights off by \d",
    "best": "RuntimeError",
    "disabled": "UnboundLocalError",
    "unwrapped": "the prefix vanishes",
    "slots": "2 of 4 slots are never trained",
    "no-past": "the prefix is ignored",
    "no-past-classifier": "ValueError: Model does not support past key values",
}


EACH = pytest.mark.parametrize("defect", peft_defects.DEFECTS, ids=lambda defect: defect.key)


@EACH
def test_peft_is_wrong(defect: peft_defects.Defect) -> None:
    assert re.match(PEFT[defect.key], defect.outcome(False)), f"PEFT has changed here: {defect.outcome(False)}"
    row = peft_defects.line(defect, defect.outcome(False), RIGHT)
    assert row in peft_defects.PAGE.read_text(), "run python -m tests.project.peft_defects"


@EACH
def test_patched_is_right(defect: peft_defects.Defect) -> None:
    assert defect.outcome(True) == RIGHT


def test_the_page_has_every_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    page = peft_defects.PAGE.read_text()
    lines = page.split(peft_defects.BEGIN)[1].split(peft_defects.END)[0].strip().splitlines()
    assert len(lines) == 2 + len(PEFT), "run python -m tests.project.peft_defects"
    monkeypatch.setattr(peft_defects, "DEFECTS", peft_defects.DEFECTS[2:4])
    assert peft_defects.fill("no table") == "no table"
    filled = peft_defects.fill(f"a\n{peft_defects.BEGIN}\nold\n{peft_defects.END}\nb")
    assert filled == f"a\n{peft_defects.BEGIN}\n\n{peft_defects.table()}\n\n{peft_defects.END}\nb"
    rows = [row for row in filled.splitlines() if row.startswith("| left-padded")]
    assert [row.split(" | ")[-1] for row in rows] == ["right |", "right |"]


@pytest.mark.parametrize("cls", [PREFIX, PROMPT])
@pytest.mark.parametrize("row", ["llama_gqa", "gpt2", "qwen3", "opt"])
def test_left_padded_rows_are_themselves_in_forward_and_generate(row: str, cls: Any) -> None:
    model, alone = tuned(True, cls, row), tuned(False, cls, row)
    mask = padding("left")
    out = model.generate(input_ids=ids(), attention_mask=mask, **GREEDY)
    text_mask = torch.cat([mask, torch.ones(B, out.shape[1] - S, dtype=torch.long)], 1)
    logits = model(input_ids=out, attention_mask=text_mask).logits[:, -out.shape[1] :]
    assert torch.equal(logits[:, S - 1 : -1].argmax(-1), out[:, S:])
    for i, n in enumerate((4, 1, 0)):
        want = alone(input_ids=out[i : i + 1, n:]).logits[0, n - out.shape[1] :]
        torch.testing.assert_close(logits[i, n:], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [PREFIX, PROMPT])
@pytest.mark.parametrize("row", ["llama_gqa", "gpt2", "qwen3"])
def test_packed_documents_train_as_rows_of_their_own(row: str, cls: Any) -> None:
    """The loss of documents next to each other, and its gradient. Labels are shifted within the row: masked there."""
    labels = ids(2).clone()
    labels[1, 0] = -100
    positions = torch.arange(S).repeat(2)[None]
    want = gradient(without_dropout(tuned(False, cls, row)), input_ids=ids(2), labels=labels)
    model = without_dropout(tuned(True, cls, row))
    got = gradient(model, input_ids=ids(2).view(1, -1), position_ids=positions, labels=labels.view(1, -1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_packed_documents_are_refused_where_the_model_cannot_keep_them_apart() -> None:
    positions = torch.arange(S).repeat(2)[None]
    with pytest.raises(ValueError, match=r"packed documents.*expected one document a row"):
        tuned(True, row="opt")(input_ids=ids(2).view(1, -1), position_ids=positions)


@pytest.mark.parametrize("row", ["llama_gqa", "gpt2", "mistral_window"])
def test_every_cache_gives_the_tokens_of_concatenation(row: str) -> None:
    model, base = tuned(True, row=row), ROWS[row].build()
    want = ids()
    for _ in range(5):
        logits = concatenated(model, base, input_ids=want, use_cache=False).logits
        want = torch.cat([want, logits[:, -1].argmax(-1, keepdim=True)], 1)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(input_ids=ids(), **options, **GREEDY), want), options


def test_adapter_names_train_each_its_own_adapter() -> None:
    model, alone = tuned(True), tuned(False)
    for x in (model, alone):
        add(x)
    names = ["other", None, "default"]
    model(input_ids=ids(), adapter_names=names).logits[..., 0].sum().backward()
    for i, name in enumerate(names):
        if name is not None:
            alone.set_adapter(name)
            alone(input_ids=ids()[i : i + 1]).logits[..., 0].sum().backward()
    for name in ("default", "other"):
        got, want = (x.prompt_encoder[name].embedding.weight.grad for x in (model, alone))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_adapter_names_with_beams(options: dict[str, Any]) -> None:
    model, alone, names = tuned(True), tuned(False), ["other", "default"]
    for x in (model, alone):
        add(x)
    got = model.generate(input_ids=ids(2), adapter_names=names, **options, **GREEDY)
    want: list[Tensor] = []
    for i, name in enumerate(names):
        alone.set_adapter(name)
        want.append(alone.generate(input_ids=ids(2)[i : i + 1], **options, **GREEDY))
    assert torch.equal(got, torch.cat(want))


def test_adapter_names_choose_their_heads() -> None:
    base = replace(ROWS["llama_gqa"], cls="LlamaForSequenceClassification")
    model, alone = (tuned(on, base=base.build(), task_type="SEQ_CLS") for on in (True, False))
    for x in (model, alone):
        add(x, task_type="SEQ_CLS")
        with torch.no_grad():
            x.base_model.score.modules_to_save["other"].weight.mul_(-2)
    got = model(input_ids=ids(2), adapter_names=["default", "other"]).logits
    for i, name in enumerate(["default", "other"]):
        alone.set_adapter(name)
        torch.testing.assert_close(got[i], alone(input_ids=ids(2)[i : i + 1]).logits[0], rtol=1e-4, atol=1e-4)


def test_adapter_names_of_adaption_prompts_are_not_ignored() -> None:
    """One batch has one gate: they work or raise."""
    model = made(True, "adaption")
    bare = ROWS["llama_gqa"].build()(input_ids=ids()).logits
    try:
        got = model(input_ids=ids(), adapter_names=["default", None, "default"]).logits
    except ValueError:
        return
    torch.testing.assert_close(got[1], bare[1], rtol=1e-4, atol=1e-4)


def test_no_names_at_all() -> None:
    with pytest.raises(ValueError, match="names"):
        tuned(True)(input_ids=ids(), adapter_names=[])


def test_names_that_nobody_has_or_too_few() -> None:
    with pytest.raises(ValueError, match=r"names: got 2 names, expected one for each of the batch's 3 rows"):
        tuned(True)(input_ids=ids(), adapter_names=["default", None])
    message = "adapter_names: got 'x', expected '__base__', None or one of ['default']"
    with pytest.raises(ValueError, match=re.escape(message)):
        tuned(True)(input_ids=ids(), adapter_names=["default", "x", None])


@pytest.mark.parametrize("row", ["mistral_window", "gemma2", "gemma3"])
def test_windows_never_hide_the_prefix(row: str) -> None:
    model = tuned(True, row=row)
    want = concatenated(model, ROWS[row].build(), input_ids=ids()).logits
    torch.testing.assert_close(model(input_ids=ids()).logits, want, rtol=1e-4, atol=1e-4)


def test_tokens_that_start_equal_are_said_to_start_elsewhere() -> None:
    with pytest.warns(UserWarning, match="init_weights='zero' makes all prefix tokens equal"):
        model = tuned(True, init_weights="zero")
    assert 0.01 < model.prompt_encoder.default.embedding.weight.std() < 0.03
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprefix")
        assert not tuned(True, init_weights="zero", num_virtual_tokens=1).prompt_encoder.default.embedding.weight.any()
    model = tuned(True)
    with pytest.warns(UserWarning, match="init_weights='zero'"):
        add(model, init_weights="zero")


def test_an_unwrapped_model_reads_the_prefix_until_it_is_disabled() -> None:
    model, bare = tuned(True), ROWS["llama_gqa"].build()(input_ids=ids()).logits
    for inner in (model.base_model, model.get_base_model()):
        torch.testing.assert_close(inner(input_ids=ids()).logits, model(input_ids=ids()).logits)
        with model.disable_adapter():
            assert torch.equal(inner(input_ids=ids()).logits, bare)
            assert torch.equal(model(input_ids=ids()).logits, bare)
    loss = model.base_model(input_ids=ids(), labels=ids()).loss
    (got,) = torch.autograd.grad(loss, list(trained(model).values()))
    torch.testing.assert_close(
        got.flatten(), gradient(tuned(False), input_ids=ids(), labels=ids()), rtol=1e-4, atol=1e-4
    )
