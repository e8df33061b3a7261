"""The experiments on language models, with a tiny one: what they measure, and that only what is trained changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import processors

import fastprefix
from benches.papers.claims import (
    clusters,
    completions,
    in_context,
    matched_parameters,
    parameter_counts,
    priors,
)
from benches.papers.tasks import glosses
from benches.papers.tasks.glosses import (
    completion_loss,
    heldout_batches,
    heldout_loss,
    measured_at,
    training_batches,
)
from benches.papers.tasks.prompts import of_tasks
from fastprefix import PromptConfig
from fastprefix.assets.glosses import load_glosses
from tests.papers.checks import check
from tests.support.tiny_models import tiny_model, tiny_tokenizer


def unchanged(model: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tiny_model().parameters(), model.parameters(), strict=True))


def test_glosses_are_drawn_by_their_seed_and_weighted_by_their_tokens() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    first, again, other = (next(training_batches(tokenizer, 1, 4, seed)) for seed in (0, 0, 1))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert first["input_ids"].shape != other["input_ids"].shape or not torch.equal(first["labels"], other["labels"])
    whole, split = heldout_batches(tokenizer, 7, rows=7), heldout_batches(tokenizer, 7, rows=3)
    assert [len(x["labels"]) for x in split] == [3, 3, 1]
    assert measured_at(5, 2) == [0, 2, 4, 5] and measured_at(4, 2) == [0, 2, 4]
    assert heldout_loss(model, whole) == pytest.approx(heldout_loss(model, split), rel=1e-5)


def test_the_loss_of_completions_is_the_models() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    batches = list(training_batches(tokenizer, 3, 4, 0))
    owns = []
    for attached in (None, PromptConfig(3), PromptConfig(5)):
        if attached is not None:
            fastprefix.attach(model, attached, f"prompt_{attached.num_virtual_tokens}")
        own = [model(**batch, use_cache=False).loss.item() for batch in batches]
        assert [completion_loss(model, batch).item() for batch in batches] == pytest.approx(own, rel=1e-5)
        owns.append(own)
    assert len({tuple(own) for own in owns}) == 3
    for batch, alone in zip(batches, zip(owns[2], owns[1], strict=True), strict=True):
        together = completion_loss(model, batch, ["prompt_5", "prompt_3"])
        assert together.tolist() == pytest.approx(alone, rel=1e-5)


def test_glosses_are_all_drawn_before_one_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glosses, "encode_pairs", lambda pairs, tokenizer: pairs)
    rounds = list(training_batches(None, 500, 4, 0))
    assert [len(batch) for batch in rounds] == [4] * 500
    texts = Counter(pair["prompt"] + pair["completion"] for batch in rounds for pair in batch)
    twice = Counter(pair["prompt"] + pair["completion"] for pair in load_glosses("train") * 2)
    assert texts == twice
    assert [sorted(len(pair["completion"]) for pair in batch) for batch in rounds[:9]] != sorted(
        sorted(len(pair["completion"]) for pair in batch) for batch in rounds[:9]
    )  # a step's length says nothing of the next one's


def test_prompts_of_tasks() -> None:
    tasks = of_tasks(5, 0)
    assert {name: len(prompts) for name, prompts in tasks.items()} == dict.fromkeys(tasks, 5)
    assert tasks == of_tasks(5, 0) and tasks != of_tasks(5, 1)
    for prompt in tasks["arithmetic"]:
        example, question = prompt.split(", ")
        left, right = example.split(" = ")
        assert sum(map(int, left.split(" + "))) == int(right) and question.endswith("=")


@pytest.mark.slow
def test_counts_are_those_that_were_published() -> None:
    found = check(parameter_counts.EXPERIMENT, parameter_counts.run(0, full=False))
    assert (found["prompt_4096"], found["prefix_gpt2"]) == (20_480, 245_760)
    assert found["llama_adapter"] == 30 * (10 * 4096 + 32)
    # The MLP's two layers with their biases, and its embeddings.
    assert found["mlp_gpt2"] == 5 * 1024 + (1024 + 1) * 512 + (512 + 1) * 24 * 2 * 1024
    values = {key: [value] for key, value in found.items()}
    assert all(statement.holds(values) for statement in parameter_counts.EXPERIMENT.statements)


def test_methods_train_what_they_say() -> None:
    outcome = matched_parameters.compare(lambda: (tiny_model(), tiny_tokenizer()), 0, steps=2, held_out=4)
    found = check(matched_parameters.EXPERIMENT, outcome)
    whole = sum(p.numel() for p in tiny_model().parameters())
    assert found["whole_numbers"] == whole and found["whole_state"] == 2 * 4 * whole / 2**20
    assert found["prompt_numbers"] == matched_parameters.PROMPT_TOKENS * 32
    assert found["lora_numbers"] == 2 * 2 * matched_parameters.RANK * (32 + 16)
    assert found["whole_saved"] > found["prefix_saved"] > 0


@pytest.mark.slow
def test_prompt_prefix_and_lora_have_the_same_size_in_smollm2() -> None:
    from fastprefix.assets.smollm2 import load_smollm2

    counts = set()
    for name in ("prompt", "prefix", "lora"):
        model = matched_parameters.prepare(name, *load_smollm2())
        counts.add(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert counts == {46_080}


def test_prompts_start_at_their_priors_and_move() -> None:
    model = tiny_model()
    outcome = priors.compare(model, tiny_tokenizer(), 0, steps=3, held_out=4)
    found = check(priors.EXPERIMENT, outcome)
    assert all(found[f"{name}_moved"] > 0 for name in priors.PRIORS) and unchanged(model)
    first = {tuple(map(tuple, x)) for x in outcome.drawn["starts"].values()}
    assert len(first) == len(priors.PRIORS)


def test_tokens_are_at_home_where_they_began() -> None:
    starts = {name: torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    assert priors._at_home("b", starts["b"] + 0.01, starts) == 1.0
    assert priors._at_home("a", torch.cat([starts["b"][:4], starts["a"][:1]]), starts) == pytest.approx(0.2)


def test_examples_as_a_prefix_are_examples_in_the_context() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    # SmolLM2 has no token in front of a text either: with one, a text behind a prefix would have two.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    held_out = heldout_batches(tokenizer, 4)
    found = check(in_context.EXPERIMENT, in_context.compare(model, tokenizer, held_out, 0, steps=8))
    assert found["text_difference"] < 1e-5 and found["own_start"] != found["zero_shot"]
    assert found["own_trained"] < found["own_start"] and unchanged(model)


def test_activations_are_looked_at_with_a_prefix_and_without() -> None:
    model = tiny_model()
    outcome = clusters.compare(model, tiny_tokenizer(), 0)
    check(clusters.EXPERIMENT, outcome)
    assert outcome.drawn["last_bare"]["points"] != outcome.drawn["last_prefix"]["points"] and unchanged(model)


def test_a_ratio_of_distances() -> None:
    distance = torch.tensor([[0.0, 2.0, 6.0], [2.0, 0.0, 4.0], [6.0, 4.0, 0.0]])
    assert clusters._ratio(distance, 2) == 2.5


def test_prefixes_are_trained_to_say_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "STEPS", 60)
    model, wanted = tiny_model(), torch.randint(4, 32, (3, 10), generator=torch.Generator().manual_seed(0))
    said, right = completions.trained(model, 1, wanted, 0)
    assert said.shape == wanted.shape and right[-1] > right[0] + 20 and unchanged(model)
    assert ((said == wanted).double().mean() * 100).item() > right[0]


def test_greedy_completions_are_those_of_generate() -> None:
    model, ids = tiny_model(), torch.tensor([[5], [9]])
    model.generation_config.eos_token_id = None
    wanted = model.generate(ids, max_new_tokens=completions.LENGTH, do_sample=False)[:, 1:]
    assert torch.equal(completions.greedy(model, ids), wanted)
