"""What a class's top-level forward is given: texts with and without a mask, labels, and what else it reads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.sweep.models import content
from tests.sweep.models.tiny_configs import VOCAB

B, S, TARGET = 2, 7, 6


@dataclass
class Case:
    """One way to call a model."""

    name: str
    inputs: dict[str, Any]
    real: Tensor | None = None  # [B, S], which places of the result count; all of them if None
    optional: tuple[str, ...] = ()  # left out again where the bare model cannot take them


def cases(model: Any) -> list[Case]:
    """Every case that the bare model itself can run, the plain text first; raises what the first one raised."""
    found, first = [], None
    for case in _proposed(model):
        try:
            found.append(_runnable(model, case))
        except Exception as error:
            first = first or error
    if not found:
        raise first or ValueError("nothing is known that its forward takes")
    return found


def _runnable(model: Any, case: Case) -> Case:
    """The case, without labels where those fail."""
    for drop in ((), *((name,) for name in case.optional), case.optional):
        inputs = {k: v for k, v in case.inputs.items() if k not in drop}
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:
            if drop == case.optional:
                raise
            continue
        return Case(case.name, inputs, case.real)
    raise AssertionError


def ordinary(config: Any) -> list[int]:
    """Token ids that no field of a config gives a meaning."""
    special: set[int] = set(range(3))
    stack = [config.to_dict()]
    while stack:
        for field, value in stack.pop().items():
            key = str(field)
            if isinstance(value, dict):
                stack.append(value)
            elif isinstance(value, int) and ("token" in key or key.endswith(("_id", "_index"))):
                special.add(value)
            elif isinstance(value, list) and "token" in key:
                special |= {x for x in value if isinstance(x, int)}
    return [i for i in range(3, min(VOCAB, 100)) if i not in special]


def ids(config: Any, rows: int = B, columns: int = S, seed: int = 1) -> Tensor:
    """Random ordinary tokens."""
    known = torch.tensor(ordinary(config))
    picked = torch.randint(0, len(known), (rows, columns), generator=torch.Generator().manual_seed(seed))
    return known[picked]


def takes(model: Any, name: str) -> bool:
    """Whether the forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def _labels(model: Any, targets: Tensor) -> dict[str, Tensor]:
    name = type(model).__name__
    if not takes(model, "labels") or name == "ElectraForPreTraining":  # its loss ignores no label
        return {}
    if name.endswith(("ForSequenceClassification", "ForImageClassification", "ForMultipleChoice")):
        return {"labels": torch.tensor([0, 1])}
    if name.endswith(("ForTokenClassification",)):
        return {"labels": targets % 2}
    labels = targets.clone()
    return {"labels": labels}


def _proposed(model: Any) -> list[Case]:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return _of_encoder_decoder(model)
    if model.main_input_name != "input_ids" or takes(model, "grid_thw"):
        return content.alone(model)
    text = ids(config)
    if type(model).__name__.endswith("ForMultipleChoice"):
        return [
            Case("text", {"input_ids": ids(config, 2 * B).view(B, 2, S), **_labels(model, text)}, None, ("labels",))
        ]
    labels = _labels(model, text)
    found = [Case("text", {"input_ids": text, **labels}, None, ("labels",))]
    if takes(model, "attention_mask"):
        mask = torch.ones(B, S, dtype=torch.long)
        full = {"input_ids": text, "attention_mask": mask, **labels}
        found.append(Case("full mask", full, None, ("labels",)))
        mask = mask.clone()
        mask[1, S - 2 :] = 0
        padded = dict(labels)
        if "labels" in padded and padded["labels"].dim() == 2:
            padded["labels"] = padded["labels"].masked_fill(mask == 0, -100)
        pad = getattr(config.get_text_config(), "pad_token_id", None) or 0
        row = {"input_ids": text.masked_fill(mask == 0, pad), "attention_mask": mask, **padded}
        found.append(Case("padded", row, mask.bool(), ("labels",)))
    for name, inputs in content.beside(model, text):
        found.append(Case(name, {**inputs, **_labels(model, inputs["input_ids"])}, None, ("labels",)))
        if takes(model, "attention_mask"):
            masked = {**found[-1].inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
            found.append(Case(f"{name}, full mask", masked, None, ("labels",)))
    return found


def _of_encoder_decoder(model: Any) -> list[Case]:
    """A source of whatever the encoder reads, and targets."""
    config = model.config
    targets = ids(config, B, TARGET, seed=2)
    sources = (
        [Case("text", {"input_ids": ids(config)})] if model.main_input_name == "input_ids" else content.alone(model)
    )
    found = []
    for source in sources:
        beside = {"decoder_input_ids": targets, **_labels(model, targets)}
        if not takes(model, "decoder_input_ids"):
            beside.pop("decoder_input_ids")
        found.append(Case(source.name, {**source.inputs, **beside}, None, ("labels",)))
    if model.main_input_name == "input_ids" and takes(model, "attention_mask"):
        mask = torch.ones(B, S, dtype=torch.long)
        mask[1, S - 2 :] = 0
        text = found[0].inputs["input_ids"].masked_fill(mask == 0, getattr(config, "pad_token_id", None) or 0)
        found.append(Case("padded", {**found[0].inputs, "input_ids": text, "attention_mask": mask}, None, ("labels",)))
    return found
