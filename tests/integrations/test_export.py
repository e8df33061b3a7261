"""An attached model leaves Python: torch.export keeps the operator, ONNX gets plain ones; both equal to eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix
from fastprefix import PrefixConfig, init
from fastprefix.ops import decompositions
from tests.model_zoo.architectures import ROWS, VOCAB

P = 3
MODELS = {"llama_gqa": False, "gpt2": True, "gemma2": False}  # with an MLP or not


class Logits(nn.Module):
    """What is exported: ids and padding to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def attached(name: str) -> Logits:
    model = ROWS[name].build()
    fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6), prefix_projection=MODELS[name]))
    return Logits(model).eval().requires_grad_(False)


def batch(rows: int, tokens: int, padded: int) -> tuple[Tensor, Tensor]:
    ids, mask = torch.randint(3, VOCAB, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :padded] = 0
    return ids, mask


def sizes() -> Any:
    either = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=50)}
    return either, either


def assert_equal(module: Any, got: Tensor, ids: Tensor, mask: Tensor, tolerance: float) -> None:
    want = module(ids, mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=tolerance, atol=tolerance)
    fastprefix.set_prefix(module.model, None)
    assert not torch.allclose(got[mask.bool()], module(ids, mask)[mask.bool()], atol=1e-2)
    fastprefix.set_prefix(module.model, "default")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name: str) -> None:
    module, first, second = attached(name), batch(2, 9, 2), batch(3, 7, 4)
    exported = torch.export.export(module, first, dynamic_shapes=sizes(), strict=False)
    operators = {node.target for node in exported.graph.nodes}
    assert torch.ops.fastprefix.prefix_attn_fwd.default in operators
    for inputs in (first, second):
        assert_equal(module, exported.module()(*inputs), *inputs, tolerance=1e-5)
    plain = exported.run_decompositions(decompositions())
    assert not any("fastprefix" in str(node.target) for node in plain.graph.nodes if node.op == "call_function")
    assert_equal(module, plain.module()(*second), *second, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", pytest.param("gpt2", marks=pytest.mark.exhaustive)])
def test_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    module, first, second = attached(name), batch(2, 9, 2), batch(3, 7, 4)
    path = str(tmp_path / "model.onnx")
    program = torch.export.export(module, first, dynamic_shapes=sizes(), strict=False)
    torch.onnx.export(program.run_decompositions(decompositions()), (), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for ids, mask in (first, second):
        names = [x.name for x in session.get_inputs()]
        (found,) = session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
        assert_equal(module, torch.from_numpy(found), ids, mask, tolerance=1e-4)
