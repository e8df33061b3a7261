"""``shared_prompt`` inside another: a tree of prompts equals each row's own path through it, written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.support.model_error_rule import StayingInDouble, assert_model_rule

S = 5
SYSTEM = [[5, 9, 11, 3], [7, 4]]
QUESTIONS = [[12, 6], [8, 14, 10], [13]]
PARENTS = [1, 0, 1]  # the system prompt of each question
GROUPS = [2, 0, 0, 1, 2]  # the question of each row


def rows() -> Tensor:
    return torch.randint(3, VOCAB, (len(GROUPS), S), generator=torch.Generator().manual_seed(0))


def path(row: int) -> list[int]:
    question = GROUPS[row]
    return SYSTEM[PARENTS[question]] + QUESTIONS[question]


def written_out(model: Any, content: Tensor, front: Any = path) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[B, S, V]`` of the rows, those of their first token, and the loss, by one forward a row."""
    logits, first, losses, count = [], [], [], 0
    for i, row in enumerate(content):
        whole = torch.tensor([front(i) + row.tolist()])
        labels = whole.clone()
        labels[:, : len(front(i))] = -100
        output = model(input_ids=whole, labels=labels, use_cache=False)
        logits.append(output.logits[:, -S:])
        first.append(output.logits[:, -S - 1])
        losses.append(output.loss * S)
        count += S
    return torch.cat(logits), torch.cat(first), torch.stack(losses).sum() / count


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "qwen3"])
def test_a_tree_equals_its_paths_with_gradients(name: str) -> None:
    model, content = ROWS[name].build(torch.float64), rows()

    def oracle() -> list[Tensor]:
        twin = copy.deepcopy(model)
        logits, first, loss = written_out(twin, content)
        return [logits, first, loss, *torch.autograd.grad(loss, list(twin.parameters()))]

    eager = oracle()
    with StayingInDouble():
        truth = oracle()
    with (
        fastprefix.shared_prompt(model, SYSTEM, PARENTS),
        fastprefix.shared_prompt(model, QUESTIONS, GROUPS) as questions,
    ):
        got = model(input_ids=content, labels=content)
        assert questions.next_logits is not None
    grads = torch.autograd.grad(got.loss, list(model.parameters()))
    assert_model_rule([got.logits, questions.next_logits, got.loss, *grads], eager, truth)


def test_three_levels_behind_an_attached_prefix() -> None:
    model, content = ROWS["llama_gqa"].build(torch.float64).eval(), rows()
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)))
    want, _, _ = written_out(model, content, lambda row: [4, 15, *path(row)])
    with (
        fastprefix.shared_prompt(model, [4, 15]),
        fastprefix.shared_prompt(model, SYSTEM, PARENTS),
        fastprefix.shared_prompt(model, QUESTIONS, GROUPS),
    ):
        got = model(input_ids=content).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, content = ROWS["llama_gqa"].build(torch.float64).train(), rows()
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fastprefix.shared_prompt(model, SYSTEM, PARENTS), fastprefix.shared_prompt(model, QUESTIONS, GROUPS):
        loss = model(input_ids=content, labels=content).loss
    loss.backward()  # transformers' norms are in fp32 here: a recomputation does not stay in double
    written_out(twin, content)[2].backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_where_a_window_is_outgrown_the_whole_path_is_concatenated() -> None:
    model, content = ROWS["mistral_window"].build(torch.float64), rows()
    want, _, _ = written_out(model, content)
    with (
        fastprefix.shared_prompt(model, SYSTEM, PARENTS),
        fastprefix.shared_prompt(model, QUESTIONS, GROUPS),
        pytest.warns(UserWarning, match="window"),
    ):
        got = model(input_ids=content, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_generates_behind_a_tree() -> None:
    model = ROWS["llama_gqa"].build(torch.float64).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    content = rows()
    want = [model.generate(torch.tensor([path(i) + row.tolist()]), **options)[0, -4:] for i, row in enumerate(content)]
    with fastprefix.shared_prompt(model, SYSTEM, PARENTS), fastprefix.shared_prompt(model, QUESTIONS, GROUPS):
        got = model.generate(content, attention_mask=torch.ones_like(content), **options)[:, -4:]
    assert got.tolist() == torch.stack(want).tolist()


def test_the_outer_block_reads_its_own_prompts_again_afterwards() -> None:
    model = ROWS["llama_gqa"].build(torch.float64).eval()
    content = rows()
    with fastprefix.shared_prompt(model, SYSTEM[0]):
        want = model(input_ids=content).logits
        with fastprefix.shared_prompt(model, QUESTIONS[0]):
            inner = model(input_ids=content).logits
        again = model(input_ids=content).logits
    assert torch.equal(want, again)
    assert not torch.allclose(want, inner)


def test_wrong_calls() -> None:
    model = ROWS["llama_gqa"].build().eval()
    outer = fastprefix.shared_prompt(model, SYSTEM, [0, 1])  # two parents for three questions
    with outer, pytest.raises(ValueError, match="groups: got 2 groups, expected one for each"):  # noqa: SIM117
        with fastprefix.shared_prompt(model, QUESTIONS, GROUPS):
            pass
    fastprefix.attach(model, PrefixConfig(3))
    with fastprefix.prefix_batch(model, [None]), pytest.raises(ValueError, match="block of prefix_batch"):  # noqa: SIM117
        with fastprefix.shared_prompt(model, SYSTEM[0]):
            pass
