"""Liger's kernels in the same model, applied before and after the prefix: the loss and gradients without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from torch import Tensor
from transformers.models.llama import modeling_llama

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.slow

P, S = 4, 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS: dict[str, Any] = {
    "direct": PrefixConfig(P, init=init.normal(0.6)),
    "projected": PrefixConfig(P, init=init.normal(0.6), prefix_projection=True),
    "prompt": PromptConfig(P),
}
LOSS = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
KERNELS: dict[str, dict[str, bool]] = {
    "loss": LOSS,
    "rope and loss": {**LOSS, "rope": True},
    "all": {"rope": True, "rms_norm": True, "swiglu": True, "fused_linear_cross_entropy": True},
}


@pytest.fixture(autouse=True)
def _own_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's is put in the module, for every model: take it out again."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


def trained(kernels: dict[str, bool] | None, first: str, config: Any) -> tuple[Tensor, list[Tensor], Any]:
    torch.manual_seed(1)
    model = tiny_model().to(DEVICE).train()
    if kernels is not None and first == "liger":
        apply_liger_kernel_to_llama(model=model, **kernels)
    prefix = fastprefix.attach(model, config)
    if kernels is not None and first == "prefix":
        apply_liger_kernel_to_llama(model=model, **kernels)
    ids = torch.randint(3, 32, (2, S), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    return output.loss, list(torch.autograd.grad(output.loss, list(prefix.parameters()))), output.logits


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("first", ["liger", "prefix"])
def test_liger(first: str, kernels: str, config: str) -> None:
    if kernels == "all" and DEVICE == "cpu":
        pytest.skip("liger's RMSNorm and SwiGLU: Triton's interpreter does not run them, and there is no CUDA device")
    want, grads, _ = trained(None, first, CONFIGS[config])
    before = modeling_llama.apply_rotary_pos_emb
    got, found, logits = trained(KERNELS[kernels], first, CONFIGS[config])
    assert logits is None  # the fused loss ran, which makes none
    assert (modeling_llama.apply_rotary_pos_emb is not before) == KERNELS[kernels]["rope"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for grad, expected in zip(found, grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)
        assert grad.abs().max() > 0
