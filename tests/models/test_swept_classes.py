"""Classes that the sweep found wrong once, each for a kind of its own; ``python -m tests.sweep`` looks at all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.models.test_sweep import check, fp64  # noqa: F401  a fixture that every test uses

# What prefix, soft prompt, PEFT's prefix and PEFT's prompt come to; None where PEFT's own forward does not run.
KINDS: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "Molmo2ForConditionalGeneration": ("masks of padding that an outer module made", ("right", "right", None, None)),
    "Qwen3VLForConditionalGeneration": ("positions on several axes", ("right", "right", "right", "right")),
    "Gemma3ForSequenceClassification": ("a head around such a model", ("right", "right", "right", "right")),
    "Kosmos2_5ForConditionalGeneration": ("positions that begin behind the padding id", ("right", "right", None, None)),
    "DPRContextEncoder": ("a head that pools the first token", ("right", "right", None, "right")),
    "VideoPrismTextModel": ("layers that are causal by their masks alone", ("right", "right", None, "right")),
    "MoshiForCausalLM": ("hidden states beside logits", ("right", "right", "right", None)),
    "Gemma3nForCausalLM": ("ids beside embeddings", ("right", "right", "right", "right")),
    "HunYuanVLForConditionalGeneration": ("images that stay in place", ("right", "refused", "refused", "refused")),
    "DeepseekV4ForCausalLM": ("keys that are no tokens'", ("refused", "refused", None, None)),
    "DeepseekV32ForCausalLM": ("masks that a layer reads", ("refused", "refused", None, "refused")),
    "Dinov2Backbone": ("outputs that are no hidden states", ("refused", "refused", None, None)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_is_right_or_refused(name: str) -> None:
    _, want = KINDS[name]
    result: dict[str, Any] = check(name)["checks"]
    got = [result[kind]["outcome"] for kind in ("prefix", "prompt", "peft prefix", "peft prompt")]
    said = {kind: (found["outcome"], found["message"][:200]) for kind, found in result.items()}
    assert [None if outcome == "PEFT refuses" else outcome for outcome in got] == list(want), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DeepseekV32ForCausalLM", "or reads masks of another form"),
        ("DeepseekV4ForCausalLM", r"8 tokens have \[8, 10\] keys"),
        ("Dinov2Backbone", "returns no hidden states first"),
        ("HunYuanVLForConditionalGeneration", "images have absolute positions"),
        ("CsmForConditionalGeneration", "CsmForConditionalGeneration"),
    ],
)
def test_what_is_refused_is_refused_for_a_true_reason(name: str, reason: str) -> None:
    found = check(name)["checks"]["prompt"]
    assert found["outcome"] == "refused"
    assert re.search(reason, found["message"]), found["message"]


def test_a_loss_that_reads_the_mask_beside_longer_labels_is_peft_s() -> None:
    """Qwen2-Audio's counts where the mask says so; attached, the model is refused."""
    import peft
    import transformers

    import fastprefix
    from tests.sweep.models.build import build
    from tests.sweep.models.inputs import ids

    bare = build(transformers.Qwen2AudioForConditionalGeneration)
    inputs = {"input_ids": ids(bare.config), "labels": ids(bare.config)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model = peft.get_peft_model(bare, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    want = model(**inputs).loss
    fastprefix.patch(model)
    with pytest.warns(UserWarning, match="its loss reads the mask beside the labels"):
        torch.testing.assert_close(model(**inputs).loss, want)
