"""Positions of the content: where they begin, in any precision, and queries that layers scale by them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.row import GQA
from tests.sweep.models import build as sweep

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # rotary angles are fp32


class TestQueriesScaledByPosition:
    """Llama 4's layers without rotary positions count places in the cache themselves."""

    P, S = 5, 6

    def model(self) -> Any:
        model = ROWS["llama4"].build(torch.float64)
        for module in model.modules():
            if hasattr(module, "floor_scale"):
                module.floor_scale, module.attn_scale = 3, 0.7
        model.config.attention_chunk_size = 64
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.attention_chunk_size = 64
        return model

    @pytest.mark.parametrize("config", [PrefixConfig, PromptConfig])
    def test_equal_the_text_in_context(self, config: Any) -> None:
        bare = self.model()
        model = copy.deepcopy(bare)
        text, ids = torch.arange(3, 3 + self.P), torch.arange(20, 20 + self.S)[None]
        fastprefix.attach(model, config(init=init.token_ids(text)))
        with torch.no_grad():
            want = bare(input_ids=torch.cat([text[None], ids], 1)).logits[:, self.P :]
            torch.testing.assert_close(model(input_ids=ids).logits, want, **CLOSE)
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
            got = model(input_ids=ids[:, 4:], past_key_values=cache).logits
            torch.testing.assert_close(got, want[:, 4:], **CLOSE)

    def test_are_recomputed_so(self) -> None:
        model = self.model()
        prefix = fastprefix.attach(model, PrefixConfig(self.P, init=init.normal(1.0)))
        ids = torch.arange(20, 20 + self.S)[None]

        def gradient() -> Tensor:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(prefix.parameters()))])

        want = gradient()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(gradient(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_moved_in_any_precision(dtype: torch.dtype) -> None:
    """Whether position ids move anything is told from few tokens of a model whose weights may be small."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA)).to(dtype)
    fastprefix.attach(model, PrefixConfig(4))
    installation = require_installation(model)
    assert installation.facts.layers.main.takes_positions and installation.hooks[-1].first_position == 0


def test_positions_that_begin_elsewhere_are_found() -> None:
    """Kosmos-2.5's text begins one behind its padding token; CSM's depth decoder reads no positions of a text."""
    model = sweep.build(transformers.Kosmos2_5ForConditionalGeneration)
    fastprefix.attach(model, PrefixConfig(4))
    assert require_installation(model).hooks[-1].first_position == 1 + model.config.get_text_config().pad_token_id
    model = sweep.build(transformers.CsmDepthDecoderModel)
    fastprefix.attach(model, PrefixConfig(4))
    assert not require_installation(model).facts.layers.main.takes_positions
    with pytest.raises(ValueError, match="CsmDepthDecoderModel, whose position_ids move nothing"):
        fastprefix.attach(model, PromptConfig(4), "prompt")
