"""``shared_prompt``: equal to the prompt repeated in every row, with and without gradients into the model's weights."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

P, B, S = 6, 4, 5
NAMES = ["llama_gqa", "gpt2", "qwen3", "phi"]


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def repeated(model: Any, prompt: Tensor, rows: Tensor, **kwargs: Any) -> Any:
    """The oracle: the prompt ``[P]`` in every row, no label on it."""
    whole = torch.cat([prompt.expand(len(rows), -1), rows], 1)
    if "labels" in kwargs:
        kwargs["labels"] = torch.cat([torch.full((len(rows), len(prompt)), -100), kwargs["labels"]], 1)
    return model(input_ids=whole, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_equals_repeating_the_prompt_with_gradients_into_the_model(name: str) -> None:
    model = ROWS[name].build(torch.float64)
    prompt, rows = ids(P), ids(B, S, seed=1)

    def oracle() -> list[Tensor]:
        twin = copy.deepcopy(model)
        want = repeated(twin, prompt, rows, labels=rows)
        grads = torch.autograd.grad(want.loss, list(twin.parameters()))
        return [want.logits[:, P:], want.logits[:, P - 1], want.loss, *grads]

    eager = oracle()
    with StayingInDouble():
        truth = oracle()
    with fastprefix.shared_prompt(model, prompt) as shared:
        got = model(input_ids=rows, labels=rows)
        assert shared.next_logits is not None
    grads = torch.autograd.grad(got.loss, list(model.parameters()))
    assert_model_rule([got.logits, shared.next_logits, got.loss, *grads], eager, truth)


@pytest.mark.parametrize("ragged", [False, True])
def test_groups(ragged: bool) -> None:
    """GRPO: some prompts, several completions each."""
    model = ROWS["llama_gqa"].build(torch.float64)
    prompts = [ids(P - i if ragged else P, seed=i) for i in range(3)]
    groups, rows = [2, 0, 0, 2, 1], ids(5, S, seed=9)
    want = torch.cat([repeated(model, prompts[g], rows[i : i + 1]).logits[:, -S:] for i, g in enumerate(groups)])
    given: Any = [p.tolist() for p in prompts] if ragged else torch.stack(prompts)
    with fastprefix.shared_prompt(model, given, groups=groups):
        got = model(input_ids=rows).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_lora_trains_through_rows_and_prompt(reentrant: bool | None) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(ROWS["llama_gqa"].build(), config).train()
    twin, prompt, rows = copy.deepcopy(model), ids(P), ids(B, S, seed=1)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fastprefix.shared_prompt(model, prompt):
        loss = model(input_ids=rows, labels=rows).loss
    loss.backward()  # outside of the block: recomputation reads what the forward read
    repeated(twin, prompt, rows, labels=rows).loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_lora_dropout_repeats_and_says_so() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(ROWS["llama_gqa"].build(), config).train()
    rows = ids(B, S, seed=1)
    with fastprefix.shared_prompt(model, ids(P)), pytest.warns(UserWarning, match="concatenated.*dropout"):
        got = model(input_ids=rows, labels=rows)
    # LoRA's B starts at zero: whatever is dropped, the numbers are those of the bare model.
    want = repeated(copy.deepcopy(model).eval(), ids(P), rows, labels=rows)
    torch.testing.assert_close(got.logits, want.logits[:, P:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ragged", [False, True])
def test_concatenated_groups_are_right_too(ragged: bool) -> None:
    model = ROWS["mistral_window"].build(torch.float64)
    prompts, groups, rows = [ids(4), ids(2 if ragged else 4, seed=1)], [1, 0, 1], ids(3, S, seed=2)
    want = torch.cat([repeated(model, prompts[g], rows[i : i + 1]).logits[:, -S:] for i, g in enumerate(groups)])
    with (
        fastprefix.shared_prompt(model, [p.tolist() for p in prompts], groups),
        pytest.warns(UserWarning, match="window"),
    ):
        got = model(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "use_cache"), [("llama_gqa", True), ("mistral_window", False)])
def test_generates_as_with_the_prompt_in_every_row(name: str, use_cache: bool) -> None:
    model = ROWS[name].build(torch.float64)
    prompt, rows = ids(P), ids(B, S, seed=1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, :2] = 0
    whole, whole_mask = torch.cat([prompt.expand(B, -1), rows], 1), torch.cat([torch.ones(B, P).long(), mask], 1)
    want = model.generate(whole, attention_mask=whole_mask, **options)[:, P:]
    with fastprefix.shared_prompt(model, prompt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model.generate(rows, attention_mask=mask, use_cache=use_cache, **options)
    torch.testing.assert_close(got, want)


def test_another_block_s_prompt_is_not_taken_for_the_first_one_s() -> None:
    """Prompts of earlier blocks are gone, their places in memory taken anew: neither they nor their caches are read."""
    model = ROWS["llama_gqa"].build(torch.float64)
    rows = ids(B, S, seed=1)
    with torch.no_grad():
        for seed in range(4):
            with fastprefix.shared_prompt(model, ids(P, seed=10)):
                cache = model(input_ids=rows[:, :2], use_cache=True).past_key_values
            with fastprefix.shared_prompt(model, ids(P, seed=seed)):
                with pytest.raises(ValueError, match="past_key_values: got a cache made with a block of shared_prompt"):
                    model(input_ids=rows[:, 2:], past_key_values=cache)
                want = model(input_ids=rows, use_cache=False).logits[:, 2:]
                cache = model(input_ids=rows[:, :2], use_cache=True).past_key_values
                got = model(input_ids=rows[:, 2:], past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_mixed_lora_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(ROWS["llama_gqa"].build(), config, "a").eval()
    model.add_adapter("b", config)
    with (
        pytest.raises(ValueError, match="adapter_names: got an adapter for each row"),
        fastprefix.shared_prompt(model, ids(2, P), [1, 0]),
    ):
        model(input_ids=ids(2, S), adapter_names=["a", "b"])


def test_the_attention_implementation_stays_the_user_s() -> None:
    model = ROWS["llama_gqa"].build()
    rows = ids(B, S)
    with fastprefix.shared_prompt(model, ids(P)):
        model(input_ids=rows)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model(input_ids=rows, output_attentions=True).attentions[0] is not None
    with fastprefix.shared_prompt(model, ids(P)):
        model(input_ids=rows)
    assert model.config._attn_implementation == "eager"
    with (
        pytest.raises(ValueError, match="input_ids"),
        fastprefix.shared_prompt(other := ROWS["llama_gqa"].build(), "foo"),
    ):
        pass
    assert not hasattr(other, "_fastprefix")


def test_stands_behind_an_attached_prefix() -> None:
    model = ROWS["llama_gqa"].build(torch.float64)
    prefix = fastprefix.attach(model, PrefixConfig(3)).double()
    prompt, rows = ids(P), ids(B, S, seed=1)
    want = repeated(model, prompt, rows)
    grads = torch.autograd.grad(want.logits[:, P:].square().sum(), list(prefix.parameters()))
    with fastprefix.shared_prompt(model, prompt):
        got = model(input_ids=rows)
    torch.testing.assert_close(got.logits, want.logits[:, P:], rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(got.logits.square().sum(), list(prefix.parameters()))
    torch.testing.assert_close(got, grads, rtol=1e-6, atol=1e-6)


def test_leaves_the_model_as_it_was() -> None:
    model = ROWS["llama_gqa"].build()
    rows = ids(B, S, seed=1)
    want, keys = model(input_ids=rows).logits, set(model.state_dict())
    trainable = [p.requires_grad for p in model.parameters()]
    with fastprefix.shared_prompt(model, ids(P)):
        assert not torch.equal(model(input_ids=rows).logits, want)
    assert torch.equal(model(input_ids=rows).logits, want)
    assert set(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == trainable
    with pytest.raises(RuntimeError, match="inside"), fastprefix.shared_prompt(model, ids(P)):
        raise RuntimeError("inside")
    assert torch.equal(model(input_ids=rows).logits, want)
    fastprefix.detach(model)
    assert not any("fastprefix" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("input_ids", "groups", "message"),
    [
        (torch.zeros(2, 3).long(), None, "groups: got None, expected the prompt of each row"),
        (torch.zeros(2, 3).long(), [0, 2], r"groups: got 0..2, expected 0..1"),
        (torch.zeros(3), None, r"input_ids: got shape \[3\], torch.float32, expected token ids"),
        ("text", None, "input_ids: got str"),
        ([[1], []], [0], "input_ids: got an empty"),
        (torch.zeros(3).long(), [0, 0, 0], "groups: got 3 groups, expected one for each of the batch's 4 rows"),
    ],
)
def test_wrong_calls(input_ids: Any, groups: Any, message: str) -> None:
    model = ROWS["llama_gqa"].build()
    with pytest.raises(ValueError, match=message), fastprefix.shared_prompt(model, input_ids, groups):
        model(input_ids=ids(B, S))


def test_an_unpatched_peft_prompt_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(ROWS["llama_gqa"].build(), config)
    with (
        pytest.raises(ValueError, match=r"model: got a PeftModel with PREFIX_TUNING"),
        fastprefix.shared_prompt(model, [1]),
    ):
        pass


def test_under_autocast() -> None:
    """Rotary positions leave keys in fp32 beside values in bf16."""
    model = ROWS["llama_gqa"].build()
    prompt, rows = ids(P), ids(B, S, seed=1)
    with torch.no_grad():
        truth = repeated(model, prompt, rows).logits[:, P:]
        with torch.autocast("cpu", torch.bfloat16):
            want = repeated(model, prompt, rows).logits[:, P:]
            with fastprefix.shared_prompt(model, prompt):
                got = model(input_ids=rows).logits
    assert (got.float() - truth).abs().max() <= 2 * (want.float() - truth).abs().max()


def test_what_a_block_yields_holds_no_model() -> None:
    model = ROWS["llama_gqa"].build()
    with fastprefix.shared_prompt(model, ids(P)) as shared, torch.no_grad():
        model(input_ids=ids(B, S))
    fastprefix.detach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert copy.deepcopy(shared).next_logits.shape == (B, VOCAB) and len(pickle.dumps(shared)) < 20_000
