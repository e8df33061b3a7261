"""``patch`` of what PEFT makes of a class: the numbers are PEFT's own, or the truth where PEFT's are not."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init
from tests.sweep import oracles
from tests.sweep.checks import own_differences
from tests.sweep.models.build import as_built
from tests.sweep.models.inputs import Case
from tests.sweep.oracles import P
from tests.sweep.outcome import DIFFERS, ORACLE, PEFT, RAISED, RIGHT, Outcome, compare, line, tensors
from tests.sweep.running import attached as attach_in_fp64
from tests.sweep.running import only_real, refused, run, with_gradients

_TASKS = [
    ("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"), ("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "CAUSAL_LM"),
]  # fmt: skip


def task(model: Any) -> str:
    """PEFT's name for what a class is for."""
    name = type(model).__name__
    found = next((task for suffix, task in _TASKS if name.endswith(suffix)), "FEATURE_EXTRACTION")
    if getattr(model.config, "is_encoder_decoder", False) and found in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        return "SEQ_2_SEQ_LM" if found == "CAUSAL_LM" else found
    return found


def patched(bare: Any, case: Case, kind: Any, attached: Outcome) -> Outcome:
    """One unpadded batch through PEFT, then through the same model patched; ``attached``: how attach did."""
    if said := own_differences(bare, [case]):
        return Outcome(ORACLE, f"transformers' own implementations of attention differ: {said}")
    length = case.inputs["input_ids"].shape[1] if "input_ids" in case.inputs else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(4)
            model = peft.get_peft_model(as_built(bare), kind(task_type=task(bare), num_virtual_tokens=P))
            model = model.to(torch.float64).eval()
            weight = model.prompt_encoder["default"].embedding.weight
            with torch.no_grad():
                weight.normal_()
            want = with_gradients(_run(model, case, length), [weight])
        except Exception as error:
            return Outcome(PEFT, line(error))
        if all(torch.equal(w, r) for w, r in zip(want.values(), _plain(bare, case).values())):
            return Outcome(PEFT, "PEFT's own forward ignores the prefix")
        try:
            fastprefix.patch(model)
        except ValueError as error:
            return refused(bare, " ".join(str(error).split()))
        except Exception as error:
            return Outcome(RAISED, "patch: " + line(error))
        try:
            weight = model.prompt_encoder["default"].embedding.weight
            got = with_gradients(_run(model, case, length), [weight])
        except Exception as error:
            return Outcome(RAISED, line(error))
        said = compare(got, want)
        if said.outcome != DIFFERS:
            return said
        return _who(bare, case, kind, weight, got, said, attached)


def _run(model: Any, case: Case, length: int) -> dict[str, Tensor]:
    output = tensors(model(**case.inputs))
    return only_real(oracles.behind(output, length), case)


def _plain(bare: Any, case: Case) -> dict[str, Tensor]:
    with torch.no_grad():
        return run(bare, case)


def _who(
    bare: Any, case: Case, kind: Any, weight: Tensor, got: dict[str, Tensor], said: Outcome, attached: Outcome
) -> Outcome:
    """Where the two differ a third opinion decides: embeddings in front, or the same prefix attached to the model.

    PEFT puts prefixes in a cache, which some models read in other ways than a text in their context.
    """
    try:
        if kind is peft.PromptTuningConfig:
            leaf = weight.detach().clone().requires_grad_()
            output = tensors(oracles.embedded(bare, case.inputs, leaf))
            length = case.inputs["input_ids"].shape[1]
            third = compare(got, with_gradients(only_real(oracles.behind(output, length), case), [leaf]))
        elif str(attached.cases.get(case.name)).startswith(RIGHT):
            layers = bare.config.get_text_config().num_hidden_layers
            packed = weight.detach().view(P, layers, 2, -1, _head_dim(bare)).permute(1, 2, 3, 0, 4)
            keys, values = [x[0] for x in packed], [x[1] for x in packed]
            model, _ = attach_in_fp64(bare, PrefixConfig(P, init=init.kv(keys, values)))
            with torch.no_grad():
                want = run(model, case)
            third = compare({k: x for k, x in got.items() if k in want}, want)
        else:
            third = said
    except Exception:
        third = said
    if third.outcome == DIFFERS and third is not said:
        return Outcome(DIFFERS, f"from PEFT: {said.message}; from embeddings in front: {third.message}")
    if third.outcome == RIGHT:
        return Outcome(RIGHT, f"PEFT's own forward differs from concatenation ({said.message})")
    return said


def _head_dim(bare: Any) -> int:
    config = bare.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
