"""``search_hard_prompt``: exact losses, exact gradients, a planted prompt that is found, and interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix
from fastprefix import PrefixConfig, init, search_hard_prompt
from fastprefix.hf.sharing.hard_prompt import HardPrompt
from fastprefix.hf.sharing.hard_prompt_search import IGNORED, _Task
from tests.model_zoo.architectures import ROWS, VOCAB

ROWS_OF_TEXT, WORDS = 8, range(3, VOCAB)


def planted(seed: int, scale: float = 4.0) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A model, a prompt, and rows whose last three tokens are what the model says after that prompt."""
    torch.manual_seed(seed)
    model = ROWS["llama_gqa"].build(torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * 0.02 * scale * (5 if "embed" in name or "lm_head" in name else 3))
    prompt = torch.randint(3, VOCAB, (3,))
    rows = torch.randint(3, VOCAB, (ROWS_OF_TEXT, 6))
    with torch.no_grad():
        for i in range(3, 6):
            rows[:, i] = model(torch.cat([prompt.expand(len(rows), -1), rows[:, :i]], 1)).logits[:, -1].argmax(-1)
    labels = rows.clone()
    labels[:, :3] = IGNORED
    return model, prompt, rows, labels


def concatenated(model: Any, prompt: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """The loss of a text that has the prompt in it."""
    ids = torch.cat([prompt.expand(len(rows), -1), rows], 1)
    wanted = torch.cat([torch.full((len(rows), len(prompt)), IGNORED), labels], 1)
    return nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())


def search(*args: Any, **options: Any) -> HardPrompt:
    found: HardPrompt = search_hard_prompt(*args, allowed=WORDS, **options)
    return found


def test_losses_are_those_of_the_concatenated_text() -> None:
    model, prompt, rows, labels = planted(0)
    real = torch.ones_like(rows, dtype=torch.bool)
    prompts = torch.stack([prompt, prompt.flip(0), torch.tensor([5, 6, 7])])
    with torch.no_grad():
        found = _Task(model, rows, real, labels != IGNORED).losses(prompts)
        want = torch.stack([concatenated(model, x, rows, labels) for x in prompts])
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    assert search(model, rows, labels, start=prompt, steps=0).loss == pytest.approx(float(want[0]), rel=1e-5)


def test_the_gradient_is_that_of_a_choice_of_tokens() -> None:
    model, prompt, rows, labels = planted(1)
    real = torch.ones_like(rows, dtype=torch.bool)
    table = model.get_input_embeddings().weight
    choice = nn.functional.one_hot(prompt, VOCAB).double().requires_grad_()
    embeds = torch.cat([(choice @ table).expand(len(rows), -1, -1), table[rows]], 1)
    logits = model(inputs_embeds=embeds).logits[:, len(prompt) - 1 : -1]
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    found = _Task(model, rows, real, labels != IGNORED).gradient(prompt)
    torch.testing.assert_close(found.double(), choice.grad, rtol=1e-4, atol=1e-6)


def test_rows_of_different_lengths_and_all_their_tokens() -> None:
    model, prompt, rows, _ = planted(0)
    texts = [row[: 3 + i % 4].tolist() for i, row in enumerate(rows)]
    found = search(model, texts, start=prompt, steps=0).loss
    with torch.no_grad():
        total = sum(
            concatenated(model, prompt, torch.tensor([text]), torch.tensor([text])) * len(text) for text in texts
        )
    assert found == pytest.approx(float(total) / sum(map(len, texts)), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_prompt_is_found(seed: int) -> None:
    """Or one that is even better: nothing says that the planted one is the best."""
    model, prompt, rows, labels = planted(seed)
    want = search(model, rows, labels, start=prompt, steps=0).loss
    best = min(
        (search(model, rows, labels, num_tokens=3, steps=30, candidates=48, top_k=16, seed=s) for s in range(3)),
        key=lambda x: x.loss,
    )
    assert best.loss <= want + 1e-6
    assert best.losses == sorted(best.losses, reverse=True) and len(best.losses) == 31
    assert best.losses[0] > 2 * want


def test_it_beats_random_search_at_the_same_budget() -> None:
    losses: dict[str, list[float]] = {"gradient": [], "random": []}
    for seed in range(5):
        model, _, rows, labels = planted(seed)
        for strategy, found in losses.items():
            made = search(model, rows, labels, num_tokens=3, steps=8, candidates=24, strategy=strategy, seed=seed)
            found.append(made.loss)
            assert made.evaluated == 1 + 8 * 24
    better = sum(a < b for a, b in zip(losses["gradient"], losses["random"]))
    assert better >= 4 and sum(losses["gradient"]) < sum(losses["random"]), losses


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    model, _, rows, labels = planted(2)
    options: dict[str, Any] = {"num_tokens": 3, "candidates": 12, "seed": 5}
    whole = search(model, rows, labels, steps=6, **options)

    class Interrupted(Exception):
        pass

    def stop(step: int, found: HardPrompt) -> None:
        if step == 3:
            raise Interrupted

    file = tmp_path / "search.json"
    with pytest.raises(Interrupted):
        search(model, rows, labels, steps=6, state=file, progress=stop, **options)
    assert len(json.loads(file.read_text())["losses"]) == 4
    steps: list[int] = []
    resumed = search(model, rows, labels, steps=6, state=file, progress=lambda i, _: steps.append(i), **options)
    assert resumed == whole and steps == [4, 5, 6]
    assert search(model, rows, labels, steps=6, state=file, **options) == whole
    for other in ({"seed": 6}, {"candidates": 13}, {"num_tokens": 4}):
        with pytest.raises(ValueError, match=r"state: got .*search.json of another search"):
            search(model, rows, labels, steps=6, state=file, **{**options, **other})
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="of another search"):
        search(model, rows, labels, steps=6, state=file, **options)
    file.write_text('{"ids": [1, 2')
    with pytest.raises(ValueError, match=r"state: got .*search.json, which cannot be read"):
        search(model, rows, labels, steps=6, state=file, **options)


def test_only_allowed_tokens_and_an_untouched_model() -> None:
    model, _, rows, labels = planted(0)
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    allowed = [4, 9, 11, 30]
    found = search_hard_prompt(model, rows, labels, num_tokens=4, steps=6, candidates=50, allowed=allowed)
    assert set(found.ids) <= set(allowed)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


def test_an_attached_prefix_is_read() -> None:
    model, prompt, rows, labels = planted(0)
    bare = search(model, rows, labels, start=prompt, steps=0).loss
    fastprefix.attach(model, PrefixConfig(4, init=init.normal(2.0))).to(torch.float64)
    with torch.no_grad():
        want = float(concatenated(model, prompt, rows, labels))
    assert search(model, rows, labels, start=prompt, steps=0).loss == pytest.approx(want, rel=1e-5) != bare


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_tokens": 0}, "num_tokens: got 0, expected an int of at least 1"),
        ({"candidates": 1.5}, "candidates: got 1.5, expected an int"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"steps": -1}, "steps: got -1, expected an int of at least 0"),
        ({"strategy": "greedy"}, "strategy: got 'greedy', expected 'gradient' or 'random'"),
        ({"start": []}, "start: got"),
        ({"start": [VOCAB]}, f"start: got ids from {VOCAB} to {VOCAB}"),
        ({"labels": torch.zeros(2, 2, dtype=torch.long)}, r"labels: got shape \[2, 2\], expected the rows' \[8, 6\]"),
        ({"labels": torch.full((8, 6), IGNORED)}, "labels: got none, or others than the rows' tokens"),
        ({"labels": torch.full((8, 6), 2)}, "labels: got none, or others than the rows' tokens"),
        ({"allowed": [3]}, "allowed: got 1 ids, expected two ids or more"),
        ({"allowed": [3, VOCAB]}, "allowed: got 2 ids"),
    ],
)
def test_wrong_calls(options: dict[str, Any], says: str) -> None:
    model, _, rows, labels = planted(0)
    with pytest.raises(ValueError, match=says):
        search_hard_prompt(model, rows, **{"labels": labels, "steps": 1, "candidates": 2, **options})


def test_a_model_that_reads_in_both_directions_is_refused() -> None:
    with pytest.raises(ValueError, match="reads text in both directions"):
        search_hard_prompt(ROWS["bert"].build(), torch.randint(3, VOCAB, (2, 4)))


def test_rows_are_named_in_their_errors() -> None:
    with pytest.raises(ValueError, match=r"rows: got str, expected a tensor \[B, R\] of token ids, or sequences"):
        search_hard_prompt(planted(0)[0], "a text")
