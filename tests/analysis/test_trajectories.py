"""``activations`` of a model with a prefix, with none active and with none at all; and its wrong calls."""

from __future__ import annotations

import pytest
import torch

import fastprefix
from fastprefix import analysis
from tests.analysis.dense import attached
from tests.model_zoo.inputs import inputs


def test_activations_with_and_without_a_prefix_and_wrong_calls() -> None:
    model, _ = attached("llama_gqa")
    batch = inputs("llama_gqa")
    with_prefix = analysis.activations(model, {"a": batch})
    fastprefix.set_prefix(model, None)
    without = analysis.activations(model, {"a": batch})
    assert not torch.allclose(with_prefix.points, without.points)
    torch.testing.assert_close(analysis.activations(model, {"a": batch}, "default").points, with_prefix.points)
    fastprefix.detach(model)
    model.train()
    torch.testing.assert_close(analysis.activations(model, {"a": batch}).points, without.points)
    assert model.training
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a prefix"):
        analysis.activations(model, {"a": batch}, "default")
    model, _ = attached("llama_gqa")
    for wrong, said in (
        ({"batches": {}}, r"batches: got {}, expected a mapping of tasks' names"),
        ({"batches": {"a": 3}}, "batch: got int, expected a mapping of tensors"),
        ({"batches": {"a": batch}, "at": "first"}, "at: got 'first', expected 'last' or 'mean'"),
        ({"batches": {"a": batch}, "name": "other"}, "name: got 'other', expected None or one of"),
    ):
        with pytest.raises(ValueError, match=said):
            analysis.activations(model, **wrong)
