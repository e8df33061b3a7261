"""``fastprefix.patch`` where PEFT is right: the same losses, outputs, gradients and training, in fp32."""

from __future__ import annotations

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
    KINDS,
    B,
    S,
    ids,
    made,
    padding,
    tasks,
    trained,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = ("prompt", "mlp", "lstm", "multitask")
ADAPTED = ("llama_gqa", "mistral", "gpt2")  # the models that PEFT's adaption prompts know
CAUSAL = [
    (row, kind)
    for row in ("llama_gqa", "gpt2", "opt", "qwen3", "mistral")
    for kind in KINDS
    if (row in ADAPTED if kind == "adaption" else row != "mistral")
]


def base(row: str, cls: str | None = None) -> Any:
    """A bare model; Mistral without its window."""
    if row == "mistral":
        whole = ROWS["mistral_window"]
        return replace(whole, options={**whole.options, "sliding_window": None}).build()
    return replace(ROWS[row], cls=cls or ROWS[row].cls).build()


def both(kind: str, row: str, cls: str | None = None, **options: Any) -> tuple[Any, Any]:
    """PEFT's and the patched one, in train mode without dropout."""
    theirs, ours = (made(on, kind, base=base(row, cls), **options) for on in (False, True))
    return without_dropout(theirs).train(), without_dropout(ours).train()


def step(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """A step's output and gradients."""
    output = model(**inputs)
    loss = output["loss"] if "loss" in output else output[0].sin().sum()
    loss.backward()
    return output, {name: p.grad for name, p in trained(model).items()}


def assert_same(theirs: Any, ours: Any, mask: Tensor | None = None, **inputs: Any) -> None:
    """The outputs of real tokens and, relative to the largest, the gradients."""
    if mask is not None:
        inputs["attention_mask"] = mask
    (want, wanted), (got, gotten) = step(theirs, **inputs), step(ours, **inputs)
    assert list(got.keys()) == list(want.keys()) and gotten.keys() == wanted.keys()
    for name, x in want.items():
        if isinstance(x, Tensor):
            assert got[name].shape == x.shape
            real: Any = ...
            if mask is not None and x.dim() > 1 and x.shape[1] >= S:  # prompts have their own positions in front
                real = torch.cat([mask.new_ones(B, x.shape[1] - S), mask], 1).bool()
            torch.testing.assert_close(got[name][real], x[real], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    for name, x in wanted.items():
        assert (gotten[name] is None) == (x is None), name
        if x is not None:
            torch.testing.assert_close(gotten[name], x, rtol=1e-4, atol=1e-4 * x.abs().max().item() + 1e-7)
    assert any(x is not None and x.any() for x in wanted.values())


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize(("row", "kind"), CAUSAL)
def test_language_models(row: str, kind: str, side: str) -> None:
    mask = padding(side) if side == "right" else None
    labels = ids() if mask is None else ids().masked_fill(mask == 0, -100)
    assert_same(*both(kind, row), mask, input_ids=ids(), labels=labels, **tasks(kind))


TASKS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "SEQ_CLS": ("ForSequenceClassification", {"labels": torch.tensor([0, 1, 1])}),
    "TOKEN_CLS": ("ForTokenClassification", {"labels": ids() % 2}),
    "QUESTION_ANS": (
        "ForQuestionAnswering",
        {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 4, 3])},
    ),
    "FEATURE_EXTRACTION": ("Model", {}),
}
# PEFT itself raises for a soft prompt in front of labelled tokens, and passes no task ids on for these tasks.
HEADS = [
    (task, kind)
    for task in TASKS
    for kind in KINDS
    if kind != "adaption"
    and not (task == "TOKEN_CLS" and kind in PROMPTS)
    and not (task in ("QUESTION_ANS", "FEATURE_EXTRACTION") and kind == "multitask")
]


@pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")
@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize(("task", "kind"), HEADS)
def test_heads_on_an_encoder(task: str, kind: str, side: str) -> None:
    head, labels = TASKS[task]
    models = both(kind, "bert", f"Bert{head}", task_type=task)
    assert_same(*models, padding(side) if side == "right" else None, input_ids=ids(), **labels, **tasks(kind))


@pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")
@pytest.mark.parametrize(("task", "kind"), HEADS)
def test_heads_on_a_decoder(task: str, kind: str) -> None:
    head, labels = TASKS[task]
    models = both(kind, "llama_gqa", f"Llama{head}", task_type=task)
    assert_same(*models, input_ids=ids(), **labels, **tasks(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_optional_arguments_and_outputs(kind: str) -> None:
    """Embeddings in place of ids, hidden states, tuples, positional arguments."""
    theirs, ours = both(kind, "llama_gqa")
    embeds = theirs.get_input_embeddings()(ids())
    own = tasks(kind)
    for call in (
        lambda m: m(inputs_embeds=embeds, output_hidden_states=True, **own),
        lambda m: m(input_ids=ids(), labels=ids(), return_dict=False, **own),
        lambda m: m(ids(), padding("right"), **own),
    ):
        want, got = call(theirs), call(ours)
        assert type(got) is type(want) and len(got) == len(want)
        for x, y in zip(_tensors(got), _tensors(want), strict=True):
            torch.testing.assert_close(x[-1:] if x.dim() else x, y[-1:] if y.dim() else y, **CLOSE)


def _tensors(output: Any) -> list[Tensor]:
    """Of an output, those of its tuples too, without caches."""
    values = list(output.values() if isinstance(output, dict) else output)
    found = [x for x in values if isinstance(x, Tensor)]
    return found + [x for xs in values if isinstance(xs, tuple) for x in xs if isinstance(x, Tensor)]
