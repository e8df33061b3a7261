"""Transformers built by hand, and regression in context: what the papers say of them is exact."""

from __future__ import annotations

import pytest
import torch

from benches.papers.claims import constructions
from benches.papers.tasks import regression


def test_one_virtual_token_writes_any_text() -> None:
    assert constructions.run(3, full=False).measured == {
        "sentences": 100.0,
        "hard": 1.0,
        "flipped": 100.0,
        "words": 100.0,
        "pairs": 100.0,
    }


def test_another_virtual_token_writes_another_text() -> None:
    """The weights hold no text: only the virtual token does."""
    model = constructions.HandBuilt(5, 3, [(None, None, place) for place in range(3)])
    for text in ([4, 0, 2], [1, 1, 1]):
        assert model.write(torch.tensor([[0]]), model.virtual_token(text), 3) == [text]


def test_a_question_is_a_first_token_an_own_token_and_a_position() -> None:
    model = constructions.HandBuilt(4, 3, [(1, None, 1), (2, None, 1), (None, 3, 2)])
    virtual = model.virtual_token([3, 2, 1])
    rows = torch.tensor([[1, 0], [2, 0], [3, 0]])
    assert model.next_tokens(rows, virtual).tolist() == [3, 2, 0]
    assert model.next_tokens(torch.tensor([[1, 0, 3], [2, 2, 2]]), virtual).tolist() == [1, 0]


def test_descent_is_a_gradient_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = regression.draw_tasks(3, generator, 1.0)
    start = torch.randn(regression.DIM, generator=generator, requires_grad=True)
    for row in range(3):
        loss = (x[row, :-1] @ start - y[row, :-1]).square().mean() / 2
        (gradient,) = torch.autograd.grad(loss, start)
        wanted = x[row, -1] @ (start - 0.3 * gradient)
        found = regression.descent(x[row : row + 1], y[row : row + 1, :-1], 0.3, start)
        torch.testing.assert_close(found, wanted[None])


def test_the_best_rate_is_the_best() -> None:
    start = torch.ones(regression.DIM)
    rate = regression.best_rate(torch.Generator().manual_seed(0), start)
    errors = [
        regression.error(lambda x, y, r=r: regression.descent(x, y, r, start), 1.0)
        for r in (0.9 * rate, rate, 1.1 * rate)
    ]
    assert errors[1] < min(errors[0], errors[2])


@pytest.mark.parametrize("layer", [regression.LinearAttention, regression.SoftmaxAttention])
def test_a_prefix_changes_what_a_layer_predicts_and_alone_is_trained(layer: type) -> None:
    generator = torch.Generator().manual_seed(0)
    model, zero = layer(generator), torch.zeros(regression.DIM)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.requires_grad_(False)
    prefix = tuple(part.requires_grad_() for part in model.new_prefix(2, generator))
    untrained = regression.error(lambda x, y: model(x, y, prefix), 1.0)
    assert untrained != regression.error(model, 1.0)
    regression.fit(lambda x, y: model(x, y, prefix), prefix, 30, 3e-2, generator, zero + 1)
    assert regression.error(lambda x, y: model(x, y, prefix), 1.0) < untrained
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
