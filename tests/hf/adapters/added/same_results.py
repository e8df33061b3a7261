"""What holds for every kind of prefix: checkpointing, mixed batches and a cache change no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastprefix


def assert_checkpointed_step_is_the_same(model: Any, prefix: nn.Module, ids: Tensor, reentrant: bool) -> None:
    """Gradients of a step in training mode, without and with gradient checkpointing."""
    model.train()
    model(input_ids=ids)[0].square().sum().backward()
    want = [p.grad.clone() for p in prefix.parameters() if p.grad is not None]
    assert len(want) == len(list(prefix.parameters()))
    prefix.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=ids)[0].square().sum().backward()
    for parameter, grad in zip(prefix.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def assert_rows_equal_separate_runs(
    model: Any, names: Sequence[str | None], prefixes: Sequence[nn.Module], ids: Tensor
) -> None:
    """Outputs and gradients of a batch whose rows read their own prefixes, and of a run for each row; fp64."""
    want = []
    for row, name in enumerate(names):
        fastprefix.set_prefix(model, name)
        want.append(model(input_ids=ids[row : row + 1])[0])
    fastprefix.set_prefix(model, None)
    parameters = [p for prefix in prefixes for p in prefix.parameters()]
    weight = torch.sin(torch.arange(want[0].numel() * len(want), dtype=torch.float64))
    weight = weight.view(len(want), *want[0].shape[1:])
    grads = torch.autograd.grad(torch.cat(want), parameters, weight)
    with fastprefix.prefix_batch(model, names):
        got = model(input_ids=ids)[0]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-9, atol=1e-9)
    for mine, grad in zip(torch.autograd.grad(got, parameters, weight), grads, strict=True):
        torch.testing.assert_close(mine, grad, rtol=1e-8, atol=1e-9)


def assert_generation_equals_full_forwards(model: Any, ids: Tensor, mask: Tensor) -> None:
    """Greedy tokens with a cache, and the likeliest of a forward of the whole text before each."""
    tokens, length = 5, ids.shape[1]
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    for n in range(tokens):
        whole = torch.cat([mask, torch.ones(len(ids), n, dtype=torch.long)], 1)
        logits = model(input_ids=made[:, : length + n], attention_mask=whole).logits
        assert torch.equal(logits[:, -1].argmax(-1), made[:, length + n])
