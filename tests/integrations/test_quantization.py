"""A quantised base: the same numbers as the same quantised model with the prefix concatenated in front."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.support.concat_oracle import concatenating

P, S = 5, 7


def quantised(model: Any) -> Any:
    """int8 weights in every linear layer, as torchao makes them of a model in memory."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ != "Parameter"
    return model


def loss(model: Any, ids: Tensor, **inputs: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("first", ["quantised", "attached"])
def test_torchao_int8(first: str, projected: bool) -> None:
    config = PrefixConfig(P, init=init.normal(0.6), prefix_projection=projected)
    model, bare = ROWS["llama_gqa"].build(), quantised(ROWS["llama_gqa"].build())
    model = quantised(model) if first == "quantised" else model
    prefix = fastprefix.attach(model, config)
    model = quantised(model) if first == "attached" else model
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in prefix.parameters())
    ids = torch.randint(3, VOCAB, (2, S))
    parameters = list(prefix.parameters())
    got = loss(model, ids)
    grads = torch.autograd.grad(got, parameters)
    names = [name for name, m in bare.named_modules() if name.endswith("self_attn")]
    positions = (torch.arange(S) + P).expand(2, -1)
    with concatenating(bare, dict(zip(names, prefix.key_values(), strict=True))) as twin:
        want = loss(twin, ids, position_ids=positions)
        wanted = torch.autograd.grad(want, parameters)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)
        assert grad.abs().max() > 0
    assert not torch.allclose(got, loss(bare, ids), atol=1e-3)
    want = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, want)
    fastprefix.detach(model)
    assert torch.equal(model(ids).logits, bare(ids).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' 4-bit weights: no CUDA device here")
@pytest.mark.parametrize("projected", [False, True])
def test_bitsandbytes_4_bit(projected: bool, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    ROWS["llama_gqa"].build().save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": four, "device_map": {"": 0}, "dtype": torch.float32}
    model, bare = (AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval() for _ in range(2))
    config = PrefixConfig(P, init=init.normal(0.6), prefix_projection=projected)
    prefix = fastprefix.attach(model, config)
    ids = torch.randint(3, VOCAB, (2, S), device="cuda")
    parameters = list(prefix.parameters())
    got = loss(model, ids)
    grads = torch.autograd.grad(got, parameters)
    names = [name for name, m in bare.named_modules() if name.endswith("self_attn")]
    positions = (torch.arange(S, device="cuda") + P).expand(2, -1)
    with concatenating(bare, dict(zip(names, prefix.key_values(), strict=True))) as twin:
        want = loss(twin, ids, position_ids=positions)
        wanted = torch.autograd.grad(want, parameters)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-4)
