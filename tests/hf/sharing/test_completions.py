"""``completion_logprobs`` against one forward a row: log-probabilities, entropies and gradients in fp64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix.hf.sharing import output_head
from fastprefix.hf.sharing.shared_prompt import installed
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.support.model_error_rule import StayingInDouble

PROMPTS = [[5, 9, 11, 3, 4, 6], [5, 9, 11, 3, 8], [5, 9, 11, 3, 7, 7, 7]]
COMPLETIONS = [[4, 5], [6, 7, 8, 9], [3], [11, 12, 13], [5, 5, 5, 5, 5]]
GROUPS = [0, 2, 1, 1, 0]
# Among them: learned positions, a soft cap (gemma2), scaled logits (granite, cohere), MLA, sinks, experts.
NAMES = [
    "llama_gqa",
    "gpt2",
    "opt",
    "gemma2",
    "gemma3",
    "granite",
    "cohere",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_moe",
]


def one_by_one(model: Any, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The oracle ``[B, R]``: every row with its whole prompt, alone."""
    width = max(len(c) for c in COMPLETIONS)
    logps, entropies = [], []
    for completion, group in zip(COMPLETIONS, GROUPS, strict=True):
        ids = torch.tensor([PROMPTS[group] + completion])
        logp = (model(ids, use_cache=False).logits[0].double() / temperature).log_softmax(-1)[-len(completion) - 1 : -1]
        rest = width - len(completion)
        chosen = logp.gather(1, torch.tensor(completion)[:, None])[:, 0]
        logps.append(torch.nn.functional.pad(chosen, (0, rest)))
        entropies.append(torch.nn.functional.pad(-(logp.exp() * logp).sum(-1), (0, rest)))
    return torch.stack(logps), torch.stack(entropies)


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_forward_a_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "_ELEMENTS", 4 * VOCAB)  # four tokens at a time
    model = ROWS[name].build(torch.float64).eval()
    weight = torch.randn(2, len(COMPLETIONS), 5, generator=torch.Generator().manual_seed(0)).double()

    def mixed(logps: Tensor, entropies: Tensor) -> Tensor:
        return (weight[0] * logps + weight[1] * entropies).sum()

    with StayingInDouble():
        found = fastprefix.completion_logprobs(model, PROMPTS, COMPLETIONS, GROUPS, entropy=True)
        assert found.entropies is not None
        got = torch.autograd.grad(mixed(found.logprobs, found.entropies), list(model.parameters()), allow_unused=True)
        logps, entropies = one_by_one(model)
        want = torch.autograd.grad(mixed(logps, entropies), list(model.parameters()), allow_unused=True)
    assert found.mask.sum(1).tolist() == [len(c) for c in COMPLETIONS]
    torch.testing.assert_close(found.logprobs, logps, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.entropies, entropies, rtol=0, atol=1e-10)
    for a, b in zip(got, want, strict=True):
        zero = torch.zeros(())  # experts that no token chose have no gradient in one and zeros in the other
        torch.testing.assert_close(
            a if a is not None else zero * b, b if b is not None else zero * a, rtol=1e-9, atol=1e-9
        )


def test_at_most_a_chunk_of_logits_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "_ELEMENTS", 4 * VOCAB)
    model = ROWS["llama_gqa"].build().train()
    sizes = []
    head = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    saved = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.shape)
        return x

    model(torch.ones(1, 2, dtype=torch.long))  # of the checks when slots are made, nothing is asked here
    fastprefix.completion_logprobs(model, PROMPTS, COMPLETIONS, GROUPS)
    sizes.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = fastprefix.completion_logprobs(model, PROMPTS, COMPLETIONS, GROUPS)
    found.logprobs.sum().backward()
    head.remove()
    assert max(sizes) == 4
    assert sum(sizes) == 2 * sum(len(c) for c in COMPLETIONS)  # forward, and once again in the backward pass
    assert not [shape for shape in saved if len(shape) and shape[-1] == VOCAB and len(shape) > 2]


def test_a_tensor_with_a_mask_and_a_temperature_of_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(ROWS["llama_gqa"].build(torch.float64), config).eval()
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in COMPLETIONS], batch_first=True)
    mask = torch.tensor([[i < len(c) for i in range(5)] for c in COMPLETIONS])
    found = fastprefix.completion_logprobs(
        model, PROMPTS, rows, torch.tensor(GROUPS), mask=mask.long(), temperature=0.7
    )
    want, _ = one_by_one(model, 0.7)
    torch.testing.assert_close(found.logprobs, want, rtol=1e-5, atol=1e-5)
    found.logprobs.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained)


def test_options_after_one_context() -> None:
    """The call of a multiple choice: one context, its options."""
    model = ROWS["gpt2"].build(torch.float64).eval()
    with torch.no_grad():
        scores = fastprefix.completion_logprobs(model, PROMPTS[0], [[1, 2], [3], [4, 5, 6]]).logprobs.sum(1)
    for score, option in zip(scores, [[1, 2], [3], [4, 5, 6]], strict=True):
        logp = model(torch.tensor([PROMPTS[0] + option])).logits.log_softmax(-1)[0, len(PROMPTS[0]) - 1 : -1]
        assert float(score) == pytest.approx(float(logp.gather(1, torch.tensor(option)[:, None]).sum()), abs=1e-6)


def test_under_autocast() -> None:
    model = ROWS["llama_gqa"].build()
    with torch.autocast("cpu", torch.bfloat16):
        found = fastprefix.completion_logprobs(model, PROMPTS, COMPLETIONS, GROUPS)
        want, _ = one_by_one(model)
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), want, rtol=0, atol=0.05)
    found.logprobs.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = ROWS["llama_gqa"].build(torch.float64).train()
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fastprefix.completion_logprobs(model, PROMPTS, COMPLETIONS, GROUPS).logprobs.sum().backward()
    one_by_one(twin)[0].sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral_window", "gpt_neo"])  # GPT-Neo's window is a buffer of its attention
def test_where_a_window_is_outgrown_prompts_are_concatenated(name: str) -> None:
    model = ROWS[name].build(torch.float64).eval()
    prompt = [3 + i % 11 for i in range(40)]
    with pytest.warns(UserWarning, match="window"):
        found = fastprefix.completion_logprobs(model, prompt, [[4, 5], [6, 7]])
    for logps, completion in zip(found.logprobs, ([4, 5], [6, 7]), strict=True):
        want = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].log_softmax(-1)[39:41]
        torch.testing.assert_close(logps, want.gather(1, torch.tensor(completion)[:, None])[:, 0], rtol=1e-6, atol=1e-6)


def test_dropout_in_the_head_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient belongs to the value: what runs again in the backward pass drops what was dropped."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(ROWS["llama_gqa"].build(torch.float64), config).train()
    model.base_model.model.model.eval()

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        found = fastprefix.completion_logprobs(model, PROMPTS, COMPLETIONS, GROUPS).logprobs.sum()
        return list(torch.autograd.grad(found, [p for p in model.parameters() if p.requires_grad]))

    got = gradients()
    monkeypatch.setattr(output_head, "checkpoint", lambda function, *args, **options: function(*args))
    for a, b in zip(got, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_entropies_of_a_padded_vocabulary_are_finite() -> None:
    model = ROWS["llama_gqa"].build().eval()

    def pad(module: Any, args: Any, logits: Tensor) -> Tensor:
        return torch.cat([logits[..., :-1], torch.full_like(logits[..., :1], float("-inf"))], -1)

    model.lm_head.register_forward_hook(pad)
    found = fastprefix.completion_logprobs(model, PROMPTS, COMPLETIONS, GROUPS, entropy=True, temperature=0.5)
    assert found.entropies is not None and bool(found.entropies.isfinite().all())
    found.entropies.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert bool((found.entropies[found.mask] > 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: got list"),
        ({"prompts": [[]]}, "prompts: got an empty"),
        ({"completions": [[1], []]}, "completions: got a sequence without ids"),
        ({"completions": "text"}, "completions: got str"),
        ({"completions": torch.rand(5, 3)}, "completions: got shape"),
        ({"groups": None}, "groups: got None, expected the prompt of each row"),
        ({"groups": [0, 1]}, "groups: got 2 groups, expected one for each of the 5"),
        ({"groups": [0, 1, 2, 3, 0]}, "groups: got 0..3, expected 0..2"),
        ({"mask": torch.ones(5, 5)}, "mask: got Tensor, expected None beside sequences"),
        ({"completions": torch.ones(5, 3, dtype=torch.long), "mask": torch.ones(5, 2)}, "mask: got"),
        (
            {"completions": torch.ones(5, 2, dtype=torch.long), "mask": torch.tensor([[0, 1]] * 5)},
            "mask: got a token behind padding",
        ),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": "1"}, "temperature: got '1'"),
        ({"completions": [[3, -100], [1], [1], [1], [1]]}, "completions: got ids from -100"),
        (
            {"completions": torch.full((5, 1), VOCAB)},
            f"completions: got ids from {VOCAB} to {VOCAB}, expected token ids",
        ),
        ({"completions": torch.ones(5, 1, dtype=torch.bool)}, "completions: got shape"),
        ({"completions": ["a", "b"]}, "completions: got strings"),
        ({"prompts": [[5.9, 6.2]]}, "prompts: got numbers that are not whole"),
        ({"prompts": ["a", "b"]}, "prompts: got strings"),
        ({"prompts": torch.ones(1, 3, dtype=torch.bool)}, "prompts: got shape"),
        ({"groups": "01201"}, "groups: got '01201'"),
        ({"model": torch.nn.Linear(2, 2)}, "model: got Linear"),
    ],
)
def test_wrong_calls(change: dict[str, Any], message: str) -> None:
    given = {"model": ROWS["llama_gqa"].build(), "prompts": PROMPTS, "completions": COMPLETIONS, "groups": GROUPS}
    given.update(change)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fastprefix.completion_logprobs(**given)


def test_text_that_is_read_in_both_directions_is_refused() -> None:
    model = ROWS["llama_gqa"].build()
    installed(model).facts = replace(installed(model).facts, layers=bidirectional(installed(model).facts.layers))
    with pytest.raises(ValueError, match="reads text in both directions"):
        fastprefix.completion_logprobs(model, PROMPTS[0], COMPLETIONS)


def bidirectional(layers: Any) -> Any:
    return replace(layers, stacks=tuple(replace(stack, causal=False) for stack in layers.stacks))


def test_a_model_without_a_head_is_refused_and_left_as_it_was() -> None:
    model = ROWS["llama_gqa"].build().model
    with pytest.raises(ValueError, match="a causal language model with a head"):
        fastprefix.completion_logprobs(model, PROMPTS[0], COMPLETIONS)
    assert not any("fastprefix" in name for name, _ in model.named_modules())
