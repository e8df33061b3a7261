"""Priors draw what their equations say; places, maps and paths equal dense computations in fp64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, analysis, init
from fastprefix.analysis import projection
from fastprefix.prefixes import priors
from fastprefix.prefixes.prompt import start as draw
from tests.analysis.dense import TOLERANCE, attached, in_double
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.model_zoo.inputs import P, inputs

PRIORS = {
    "xavier": init.xavier(),
    "fitted": init.fitted(),
    "exclusion": init.exclusion(),
    "interpolation": init.interpolation(),
}


def table(model: Any) -> Tensor:
    return model.get_input_embeddings()(torch.arange(VOCAB)).detach().double()


def started(name: str, start: Any, tokens: int = 4000) -> tuple[Tensor, Tensor]:
    """Many embeddings of a start, as ``attach`` would draw them, and the vocabulary's."""
    model = ROWS[name].build()
    config, words = PromptConfig(tokens, init=start), model.get_input_embeddings()
    return draw(config, words, VOCAB, 32, torch.device("cpu")).double(), table(model)


def squared(x: Tensor, words: Tensor) -> Tensor:
    """Mahalanobis distances by the inverse of the covariance."""
    off = words - words.mean(0)
    inverse = torch.linalg.inv(off.T @ off / len(words))
    return torch.einsum("nd,de,ne->n", x - words.mean(0), inverse, x - words.mean(0))


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2"])
def test_fitted_has_the_vocabularys_mean_and_covariance(name: str) -> None:
    x, words = started(name, init.fitted(), 40000)
    centred, theirs = x - x.mean(0), words - words.mean(0)
    scale = theirs.square().mean().sqrt()
    assert (x.mean(0) - words.mean(0)).abs().max() < 0.03 * scale
    assert (centred.T @ centred / len(x) - theirs.T @ theirs / len(words)).abs().max() < 0.05 * scale.square()


@pytest.mark.parametrize("ratio", [1.5, 5.0, 100.0])
def test_exclusion_stays_outside(ratio: float) -> None:
    x, words = started("llama_gqa", init.exclusion(ratio))
    d = words.shape[1]
    squares, bound = squared(x, words), priors.exclusion_bound(d, ratio)
    assert abs(bound - 2 * math.log(ratio) / (1 - ratio ** (-2 / d))) < 1e-9
    assert squares.min() > bound * (1 - 1e-4) and squares.min() < 1.05 * bound
    # The radial distribution, by Monte Carlo of the definition.
    wide = ratio ** (2 / d)
    z = math.sqrt(wide) * torch.randn(400_000, d, dtype=torch.float64)
    s = z.square().sum(1)
    density = ratio * torch.exp(-0.5 * s * (1 - 1 / wide))
    kept = (1 - density).clamp(min=0)
    assert abs(kept.mean().item() - priors.exclusion_acceptance(d, ratio)) < 3e-3
    want = (kept * s).sum() / kept.sum()
    assert abs(squares.mean() / want - 1) < 0.02


@pytest.mark.parametrize("dim", [1, 2, 576, 4096])
def test_exclusion_at_other_sizes(dim: int) -> None:
    assert 0.0 < priors.exclusion_acceptance(dim) < 1.0 and priors.exclusion_bound(dim) > 0.0
    z = priors._outside(7, dim, 5.0)
    assert z.shape == (7, dim) and (z.square().sum(1) > priors.exclusion_bound(dim)).all()


def test_xavier_is_uniform_within_its_bound() -> None:
    x, words = started("llama_gqa", init.xavier())
    bound = math.sqrt(6 / (len(x) + words.shape[1]))
    assert 0.999 * bound < x.abs().max() <= bound and abs(x.std() / bound - 3**-0.5) < 0.01


def test_interpolation_lies_between_two_tokens() -> None:
    x, words = started("llama_gqa", init.interpolation(6), 30)
    shares = []
    for point in x:
        found = []
        for a in words[:6]:
            for b in words[:6]:
                line = a - b
                share = ((point - b) @ line / (line @ line).clamp(min=1e-12)).clamp(0, 1)
                found.append(((point - b - share * line).norm().item(), share.item()))
        off, share = min(found)
        assert off < 1e-5
        shares.append(share)
    assert min(shares) < 0.3 and max(shares) > 0.7


@pytest.mark.parametrize("name", PRIORS)
def test_with_an_encoder(name: str) -> None:
    """The encoder is fitted to the draw, as to given embeddings; and the draw follows torch's seed."""
    model = ROWS["llama_gqa"].build()
    torch.manual_seed(5)
    prompt = fastprefix.attach(model, PromptConfig(4, init=PRIORS[name], encoder="mlp"), "through")
    config = PromptConfig(4, init=PRIORS[name])
    torch.manual_seed(5)
    first = fastprefix.attach(model, config, "a")()
    torch.manual_seed(5)
    assert torch.equal(fastprefix.attach(model, config, "b")(), first) and first.dtype == torch.float32
    assert prompt().std() > 0 and config.to_json()["init"] == name


@pytest.mark.parametrize("name", PRIORS)
def test_priors_are_of_soft_prompts(name: str) -> None:
    with pytest.raises(ValueError, match=f"init: got init.{name} of a soft prompt"):
        PrefixConfig(4, init=PRIORS[name])
    with pytest.raises(ValueError, match="num_virtual_tokens: got None, expected an int"):
        PromptConfig(init=PRIORS[name])


@pytest.mark.parametrize("ratio", [1.0, 0, -5, True, "5", float("nan"), float("inf")])
def test_wrong_ratios(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"ratio: got .*, expected a finite number above 1"):
        init.exclusion(ratio)


def test_wrong_tokens() -> None:
    with pytest.raises(ValueError, match="most_common: got 0, expected an int of at least 1"):
        init.interpolation(0)


def test_a_vocabulary_without_variance_in_some_directions() -> None:
    model = ROWS["llama_gqa"].build()
    model.get_input_embeddings().weight.data[:, 5:9] = 0.25
    x = fastprefix.attach(model, PromptConfig(50, init=init.fitted()))()
    assert torch.allclose(x[:, 5:9], torch.full((50, 4), 0.25), atol=1e-6) and x.isfinite().all()
    assert analysis.prompt_place(model).typical == math.sqrt(32 - 4)
    model.get_input_embeddings().weight.data[:] = 1.0
    with pytest.raises(ValueError, match="init: got a vocabulary whose embeddings are all equal"):
        fastprefix.attach(model, PromptConfig(2, init=init.fitted()), "other")


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2", "bert"])
def test_prompt_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priors, "_CHUNK", 7)
    model = ROWS[name].build(torch.float64)
    prompt = fastprefix.attach(model, PromptConfig(P, init=init.normal(0.3)))
    before = copy.deepcopy(prompt)
    with torch.no_grad():
        prompt.embedding.add_(0.1)
    with in_double():
        found = analysis.prompt_place(model, start=before)
    own, words = prompt().detach().double(), table(model)
    cosines = torch.nn.functional.cosine_similarity(own[:, None], words, dim=2)
    assert list(found.tokens) == cosines.argmax(1).tolist()
    torch.testing.assert_close(found.cosine.double(), cosines.amax(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.mahalanobis, squared(own, words).sqrt(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.start_mahalanobis, squared(before().double(), words).sqrt(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.displacement, (own - before().double()).norm(dim=1), **TOLERANCE)
    assert found.typical == math.sqrt(words.shape[1])
    assert abs(squared(words, words).mean().sqrt() - found.typical) < 1e-9
    again = analysis.prompt_place(model, start=before().detach())
    assert torch.equal(again.displacement, found.displacement)
    assert analysis.prompt_place(model).displacement is None


def test_wrong_starts() -> None:
    model = ROWS["llama_gqa"].build()
    prompt = fastprefix.attach(model, PromptConfig(P))
    prefix = fastprefix.attach(model, PrefixConfig(P), "prefix")
    batch = inputs("llama_gqa")
    for start, said in (
        (prompt()[1:], rf"start: got a Tensor of shape \[{P - 1}, 32\], expected one of shape \[{P}, 32\]"),
        (prefix, r"start: got a Prefix of shape \[5, 64\], expected one of shape \[5, 32\]"),
        ("text", r"start: got str, expected embeddings \[P, d\] or a soft prompt"),
    ):
        with pytest.raises(ValueError, match=said):
            analysis.prompt_place(model, start=start)
        with pytest.raises(ValueError, match=said):
            analysis.slot_map(model, name="default", start=start)
    with pytest.raises(ValueError, match=r"start: got Parameter, expected a prefix, as it was"):
        analysis.slot_map(model, batch, "prefix", start=prompt())
    with pytest.raises(ValueError, match="name: got 'prefix', a prefix of keys and values"):
        analysis.prompt_place(model, "prefix")
    with pytest.raises(ValueError, match="batch: got None, expected the arguments"):
        analysis.slot_map(model, name="prefix")


def by_eigenvectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates up to signs, and shares."""
    off = x - x.mean(0)
    values, vectors = torch.linalg.eigh(off.T @ off)
    return (off @ vectors[:, -2:].flip(1)).abs(), values[-2:].flip(0) / values.sum()


def test_slot_map_of_a_prompt() -> None:
    model = ROWS["llama_gqa"].build(torch.float64)
    prompt = fastprefix.attach(model, PromptConfig(P))
    start = torch.randn(P, 32)
    found = analysis.slot_map(model, start=start)
    points, shares = by_eigenvectors(torch.cat([table(model), prompt().detach().double(), start.double()]))
    got = torch.cat([found.around, found.end, found.start])
    torch.testing.assert_close(got.abs(), points, **TOLERANCE)
    torch.testing.assert_close(found.explained, shares, **TOLERANCE)
    assert found.labels == tuple(range(VOCAB)) and found.kind == "embeddings"


@pytest.mark.parametrize(("name", "padding"), [("llama_gqa", "left"), ("gpt2", "right"), ("smollm3", "none")])
def test_slot_map_of_a_prefix(name: str, padding: str) -> None:
    """Next to the keys and values that a cache holds of the content."""
    model, pairs = attached(name)
    batch = inputs(name, padding)
    real = batch.get("attention_mask", torch.ones(3, 9)).bool()
    found = analysis.slot_map(model, batch)
    cache = model(**batch, use_cache=True).past_key_values
    rows = [x.transpose(1, 2)[real].flatten(1) for layer in cache.layers for x in (layer.keys, layer.values)]
    own = [x.transpose(0, 1).flatten(1) for pair in pairs.values() for x in pair]
    points, shares = by_eigenvectors(torch.cat([torch.cat(rows, 1), torch.cat(own, 1).float()]).detach().double())
    # The slots of a prefix are read in fp32.
    torch.testing.assert_close(torch.cat([found.around, found.end]).abs(), points, **TOLERANCE)
    torch.testing.assert_close(found.explained, shares, **TOLERANCE)
    assert found.labels == tuple(batch["input_ids"][real].tolist()) and found.start is None


@pytest.mark.parametrize("at", ["last", "mean"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_activations(padding: str, at: Any) -> None:
    model, _ = attached("llama_gqa")
    torch.manual_seed(3)
    one, two = inputs("llama_gqa", padding), inputs("llama_gqa", "none")
    two = {"input_ids": two["input_ids"].flip(1)[:2]}
    found = analysis.activations(model, {"one": one, "two": two}, at=at)
    states = []
    for batch in (one, two):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        hidden = model(**batch, output_hidden_states=True).hidden_states
        for i in range(len(mask)):
            rows = [layer[i][mask[i]].detach() for layer in hidden]
            states.append(torch.stack([row[-1] if at == "last" else row.mean(0) for row in rows]))
    x = torch.stack(states, 1)  # [L + 1, N, d]
    x = x - x.mean(1, keepdim=True)
    x = x / x.norm(dim=2).square().mean(1).sqrt()[:, None, None]
    points, shares = by_eigenvectors(x.flatten(0, 1))
    torch.testing.assert_close(found.points.flatten(0, 1).abs(), points, **TOLERANCE)
    torch.testing.assert_close(found.explained, shares, **TOLERANCE)
    assert found.labels.tolist() == [0, 0, 0, 1, 1] and found.tasks == ("one", "two")
    far = (x[-1][:3].mean(0) - x[-1][3:].mean(0)).norm()
    torch.testing.assert_close(found.distance, torch.tensor([[0.0, far], [far, 0.0]]).double(), rtol=0, atol=1e-6)
    assert abs(found.silhouette[2].item() - by_hand(x[2], found.labels)) < 1e-9 and found.groups == (0, 1)


def by_hand(x: Tensor, labels: Tensor) -> float:
    scores = []
    for i in range(len(x)):
        d = (x - x[i]).norm(dim=1)
        mine = [j for j in range(len(x)) if labels[j] == labels[i] and j != i]
        others = [d[labels == g].mean().item() for g in labels.unique() if g != labels[i]]
        a = d[mine].mean().item() if mine else 0.0
        scores.append((min(others) - a) / max(a, min(others)) if mine else 0.0)
    return sum(scores) / len(scores)


def test_silhouette_and_groups() -> None:
    x = torch.randn(13, 4, dtype=torch.float64)
    labels = torch.tensor([0] * 5 + [1] * 4 + [2] * 3 + [3])
    assert abs(projection.silhouette(x, labels) - by_hand(x, labels)) < 1e-12
    assert math.isnan(projection.silhouette(x, torch.zeros(13)))
    centres = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.1, 0.0], [9.0, 9.2]])
    assert projection.two_groups(centres) == [0, 1, 0, 1]
    assert projection.two_groups(centres.repeat(4, 1)) == [0, 1, 0, 1] * 4
    assert projection.two_groups(centres[:1]) == [0]


def test_pca_of_few_points() -> None:
    one = projection.pca(torch.ones(1, 5))
    assert one.points.tolist() == [[0.0, 0.0]] and one.explained.tolist() == [0.0, 0.0]
    assert projection.pca(torch.randn(6, 1)).points[:, 1].tolist() == [0.0] * 6
