"""Whatever a model's configuration, a prompt is what it would be in front of every row, or an error says why not."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from tests.model_zoo.row import GQA, VOCAB
from tests.sweep.models import build as sweep

LONGEST = 16  # the length that rotary frequencies were made for
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": LONGEST},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": LONGEST},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LONGEST
    },
}  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # rotary angles are fp32


def build(rope: str, window: int | None = None, dropout: float = 0.0) -> Any:
    """A Mistral in fp64 with these frequencies."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **{**GQA, "max_position_embeddings": LONGEST if rope in ("dynamic", "default") else 64},
        sliding_window=window,
        attention_dropout=dropout,
        rope_parameters={"rope_type": rope, "rope_theta": 1e4, **ROPES[rope]},
    )
    model = transformers.MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.double().eval()


def padding(side: str, rows: int, length: int) -> Tensor | None:
    """``[B, S]``, row i with i places of it."""
    if side == "none":
        return None
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, slice(0, row) if side == "left" else slice(length - row, length)] = 0
    return mask


def concatenated(bare: Any, embedding: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The bare model's logits of rows behind the embeddings ``[P, d]``, positions that count real tokens."""
    whole = torch.cat([embedding.expand(len(ids), -1, -1), bare.get_input_embeddings()(ids)], 1)
    if mask is None:
        return bare(inputs_embeds=whole, use_cache=False).logits[:, len(embedding) :]
    mask = torch.cat([mask.new_ones(len(ids), embedding.shape[0]), mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = bare(inputs_embeds=whole, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits[:, len(embedding) :]


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rope=st.sampled_from(list(ROPES)),
    window=st.sampled_from([None, 4, 12]),
    tokens=st.integers(1, 20),
    length=st.integers(2, 10),
    side=st.sampled_from(["none", "left", "right"]),
    positions=st.booleans(),
    use_cache=st.booleans(),
    shared=st.booleans(),
)
def test_a_prompt_is_exact_or_refused(
    rope: str, window: int | None, tokens: int, length: int, side: str, positions: bool, use_cache: bool, shared: bool
) -> None:
    bare = build(rope, window)
    model = copy.deepcopy(bare)
    rows = 2
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = padding(side, rows, length)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if positions:
        inputs["position_ids"] = (torch.ones_like(ids) if mask is None else mask).cumsum(1).sub(1).clamp(min=0)
    if use_cache:
        inputs["past_key_values"] = transformers.DynamicCache()
    else:
        inputs["use_cache"] = False
    prompt = torch.arange(3, 3 + tokens)
    embedding = bare.get_input_embeddings()(prompt).detach()
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        try:
            if shared:
                with fastprefix.shared_prompt(model, prompt):
                    got = model(**inputs).logits
            else:
                fastprefix.attach(model, PromptConfig(init=init.token_ids(prompt))).double()
                got = model(**inputs).logits
        except ValueError as error:
            assert use_cache and "past_key_values: got a cache, where the prompt has to be concatenated" in str(error)
            assert tokens + length > (window or LONGEST - 1)
            return
    want = concatenated(bare, embedding, ids, mask)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(got[real], want[real], **CLOSE)
    spoken = [str(w.message) for w in said if "concatenated" in str(w.message)]
    if spoken:  # never without need
        grows = rope in ("dynamic", "longrope") and tokens + length >= LONGEST
        assert grows or (window is not None and tokens + length > window), spoken


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_generation_that_grows_out_of_its_frequencies_is_exact_or_raises(rope: str, use_cache: bool) -> None:
    bare = build(rope)
    model = copy.deepcopy(bare)
    prompt, ids = torch.arange(3, 9), torch.tensor([[20, 21, 22]])
    prefix = fastprefix.attach(model, PromptConfig(init=init.token_ids(prompt)))
    options = {"do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    if use_cache:
        model.generate(ids, max_new_tokens=4, **options)
        with pytest.raises(ValueError, match=r"past_key_values: got a cache.*use_cache=False"):
            model.generate(ids, max_new_tokens=12, **options)
        return
    with pytest.warns(UserWarning, match="rotary frequencies"):
        got = model.generate(ids, max_new_tokens=12, **options)
    embedding = prefix.embedding.double()
    for _ in range(12):
        ids = torch.cat([ids, concatenated(bare, embedding, ids, None)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)


def test_a_patched_generation_that_grows_out_of_them_is_peft_s() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    model = peft.get_peft_model(build("dynamic").float(), config).eval()
    ids = torch.tensor([[20, 21, 22]])
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
    want = model.generate(input_ids=ids, **options)
    fastprefix.patch(model)
    with pytest.warns(UserWarning, match="concatenated to every row, not shared: the model's rotary frequencies"):
        assert torch.equal(model.generate(input_ids=ids, **options), want)


def test_active_dropout_is_concatenated_in_training_alone() -> None:
    model = build("default", dropout=0.5)
    fastprefix.attach(model, PromptConfig(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=torch.tensor([[5, 6]]))
    with pytest.warns(UserWarning, match="dropout is active"):
        model.train()(input_ids=torch.tensor([[5, 6]]))


def test_layers_that_read_ids_beside_embeddings_have_all_embeddings_or_all_ids() -> None:
    """Gemma 3n: a soft prompt has no ids, so neither have the rows behind it; a text has, and so have they."""
    bare = sweep.build(transformers.Gemma3nForCausalLM)
    model, ids, text = copy.deepcopy(bare), torch.arange(20, 26)[None], torch.arange(5, 9)
    prompt = fastprefix.attach(model, PromptConfig(4, init=init.normal(1.0))).double()
    with pytest.warns(UserWarning, match="its layers read token ids beside their embeddings"):
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, concatenated(bare, prompt.embedding, ids, None), **CLOSE)
    fastprefix.detach(model)
    want = bare(input_ids=torch.cat([text[None], ids], 1), use_cache=False).logits[:, 4:]
    assert not torch.allclose(want, concatenated(bare, bare.get_input_embeddings()(text), ids, None), atol=1e-3)
    with fastprefix.shared_prompt(model, text):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, **CLOSE)
    model.train()  # with dropout, were there any: concatenated
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    state = require_installation(model)
    state.facts.rope_limits = (("dynamic", 1),)  # as if its keys depended on the length
    with fastprefix.shared_prompt(model, text), pytest.warns(UserWarning, match="concatenated"):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, **CLOSE)


def test_a_model_that_finds_the_ids_of_embeddings_takes_no_soft_prompt() -> None:
    model = sweep.build(transformers.Gemma4ForCausalLM).float()
    with pytest.raises(ValueError, match="model: got Gemma4ForCausalLM, which does not run on inputs_embeds alone"):
        fastprefix.attach(model, PromptConfig(4))
    fastprefix.attach(model, PrefixConfig(4))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    config=st.sampled_from([PrefixConfig, PromptConfig]),
    active=st.booleans(),
    weights=st.sampled_from([None, False, True]),
    implementation=st.sampled_from([None, "sdpa", "eager"]),
    use_cache=st.booleans(),
    side=st.sampled_from(["none", "left", "right"]),
)
def test_what_would_ignore_a_prefix_is_refused_while_one_is_read(
    config: Any, active: bool, weights: bool | None, implementation: str | None, use_cache: bool, side: str
) -> None:
    """Weights of attention asked for, or another implementation set meanwhile; the bare model takes both."""
    model = build("default")
    fastprefix.attach(model, config(3))
    if not active:
        fastprefix.set_prefix(model, None)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "use_cache": use_cache}
    inputs["attention_mask"] = padding(side, 2, 2)
    if weights is not None:
        inputs["output_attentions"] = weights
    if implementation is not None:
        model.set_attn_implementation(implementation)
    if active and (weights or implementation):
        reasons = ["output_attentions: got True, expected False"] * bool(weights)
        reasons += ["attn_implementation: got"] * (implementation is not None)
        with pytest.raises(ValueError, match="|".join(reasons)):
            model(**inputs)
        return
    got = model(**inputs).logits
    if active:
        mask = inputs["attention_mask"]
        assert got[torch.ones(2, 2).bool() if mask is None else mask.bool()].isfinite().all()
        return
    bare = build("default")  # whose eager attention makes nan of rows padded on the left, with nothing attached
    bare.set_attn_implementation(implementation or "sdpa")
    assert torch.equal(got.nan_to_num(7.0), bare(**inputs).logits.nan_to_num(7.0))
