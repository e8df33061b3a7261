"""Prefixes made of other prefixes: as starts of new ones, and several of them for one row of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.measure.training.saved_bytes import saved_bytes
from tests.model_zoo.architectures import ROWS, VOCAB

IDS = torch.arange(3, 27).view(3, 8) % VOCAB


def model_with(*lengths: int, config: Any = PrefixConfig, row: str = "llama_gqa", **fields: Any) -> tuple[Any, ...]:
    """A model in fp64, and prefixes of these lengths, named a, b, c ... and none active."""
    model = ROWS[row].build(torch.float64)
    made = [
        fastprefix.attach(model, config(P, init=init.normal(0.5), **fields), name).to(torch.float64)
        for name, P in zip("abcd", lengths)
    ]
    fastprefix.set_prefix(model, None)
    return model, *made


def logits(model: Any, names: list[Any], ids: Tensor = IDS) -> Tensor:
    with torch.no_grad(), fastprefix.prefix_batch(model, names):
        found: Tensor = model(input_ids=ids).logits
    return found


def attached(model: Any, start: init.Init, kind: Any = PrefixConfig) -> Any:
    made = fastprefix.attach(model, kind(init=start), "new").to(torch.float64)
    fastprefix.set_prefix(model, None)
    return made


def test_concat_average_slice_and_drop_are_what_they_say() -> None:
    _, a, b, c = model_with(3, 3, 2)
    both = init.concat(a, c, b)
    assert both.length == 8 and PrefixConfig(init=both).num_virtual_tokens == 8
    layers = zip(*(x.key_values() for x in (a, c, b)))
    for parts, k, v in zip(layers, both.keys or (), both.values or ()):
        assert torch.equal(k, torch.cat([kv[0] for kv in parts], 1))
        assert torch.equal(v, torch.cat([kv[1] for kv in parts], 1))
    mean = init.average(a, b, weights=[3, 1])
    for (x, y), (w, z), k, v in zip(a.key_values(), b.key_values(), mean.keys or (), mean.values or ()):
        torch.testing.assert_close(k, 0.75 * x + 0.25 * w)
        torch.testing.assert_close(v, 0.75 * y + 0.25 * z)
    for found, places in (
        (init.slice(both, 2, -1), [2, 3, 4, 5, 6]),
        (init.slice(both, -3), [5, 6, 7]),
        (init.drop(both, [0, -1, 4]), [1, 2, 3, 5, 6]),
        (init.drop(both, 7), [0, 1, 2, 3, 4, 5, 6]),
    ):
        assert found.length == len(places)
        for x, y in zip((*(found.keys or ()), *(found.values or ())), (*(both.keys or ()), *(both.values or ()))):
            assert torch.equal(x, y[:, places])


@pytest.mark.parametrize("config", [PrefixConfig, PromptConfig])
@pytest.mark.parametrize("make", [lambda a, b: init.concat(a, b), lambda a, b: init.average(a, a, b)])
def test_they_are_starts_of_new_prefixes_that_are_their_own(config: Any, make: Any) -> None:
    model, a, b = model_with(3, 3, config=config)
    made = attached(model, make(a, b), config)
    before = logits(model, ["new"])
    with torch.no_grad():
        for p in a.parameters():
            p.zero_()
    assert torch.equal(logits(model, ["new"]), before)
    assert all(p.requires_grad for p in made.parameters())


def test_a_part_of_an_mlps_output() -> None:
    model = ROWS["llama_gqa"].build(torch.float64)
    mlp = fastprefix.attach(model, PrefixConfig(5, prefix_projection=True)).to(torch.float64)
    part = init.slice(mlp, 1, 3)
    assert all(not x.requires_grad and x.shape[1] == 2 for x in part.keys or ())
    assert torch.equal((part.keys or ())[1], mlp.key_values()[1][0][:, 1:3])


@pytest.mark.parametrize("config", [PrefixConfig, PromptConfig])
@pytest.mark.parametrize("row", ["llama_gqa", "gpt2"])
def test_several_prefixes_of_one_row_are_one(config: Any, row: str) -> None:
    """As the concatenated prefix alone, beside rows that read one of them, or none."""
    model, a, b = model_with(3, 5, config=config, row=row)
    attached(model, init.concat(a, b), config)
    got = logits(model, [("a", "b"), "b", None])
    want = logits(model, ["new", "b", None])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    alone = logits(model, [("a", "b")])
    torch.testing.assert_close(alone, logits(model, ["new"]), rtol=1e-10, atol=1e-10)
    # The order is nothing to attention, but soft prompts see those before them.
    assert torch.allclose(alone, logits(model, [("b", "a")])) == (config is PrefixConfig)
    torch.testing.assert_close(logits(model, [("b",)]), logits(model, ["b"]), rtol=0, atol=0)


def test_each_gets_the_gradient_that_its_part_of_the_whole_gets() -> None:
    model, a, b = model_with(3, 5)
    whole = attached(model, init.concat(a, b))
    with fastprefix.prefix_batch(model, [("a", "b"), None, ("a", "b")]):
        model(input_ids=IDS, labels=IDS).loss.backward()
    with fastprefix.prefix_batch(model, ["new", None, "new"]):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for one, two, both in zip(a.layers, b.layers, whole.layers):
        for name in ("k", "v"):
            parts = torch.cat([getattr(one, name).grad, getattr(two, name).grad], 1)
            torch.testing.assert_close(parts, getattr(both, name).grad, rtol=1e-8, atol=1e-12)


def test_generation_and_prefixes_in_some_layers() -> None:
    model, a, _ = model_with(3, 4)
    some = fastprefix.attach(model, PrefixConfig(2, init=init.normal(0.5), layers=[1]), "some").to(torch.float64)
    first = init.concat(init.kv(*([x] for x in a.key_values()[1])), init.kv(*([x] for x in some.key_values()[0])))
    assert first.length == 5
    fastprefix.set_prefix(model, None)
    with torch.no_grad(), fastprefix.prefix_batch(model, [("a", "some"), "b", ("some",)]):
        got = model.generate(IDS, max_new_tokens=4, do_sample=False)
    for i, names in enumerate((("a", "some"), ("b",), ("some",))):
        with torch.no_grad(), fastprefix.prefix_batch(model, [names]):
            alone = model.generate(IDS[i : i + 1], max_new_tokens=4, do_sample=False)
        assert torch.equal(got[i], alone[0])


def test_nothing_is_saved_for_each_row() -> None:
    """Two prefixes a row save what two prefixes do: no copy of them for a row."""
    sizes = []
    for rows in (3, 12):
        model, a, b = model_with(64, 64)
        ids = IDS.repeat(rows // 3, 1)
        parameters = [*a.parameters(), *b.parameters()]

        def step(names: Any, model: Any = model, ids: Tensor = ids) -> Tensor:
            with fastprefix.prefix_batch(model, [names]):
                loss: Tensor = model(input_ids=ids, labels=ids).loss
            return loss

        one, two = (saved_bytes(lambda names=names: step(names), exclude=parameters) for names in ("a", ("a", "b")))
        sizes.append(two - one)
    assert sizes[0] == sizes[1] > 0


def test_prefixes_on_disk(tmp_path: Path) -> None:
    model = model_with(3, 5)[0]
    for name in "ab":
        fastprefix.save(model, tmp_path / name, name)
    want = logits(model, [("a", "b"), "a", "b"])
    other = ROWS["llama_gqa"].build(torch.float64)
    fastprefix.register(other, {name: tmp_path / name for name in "ab"}, max_resident=2)
    torch.testing.assert_close(logits(other, [("a", "b"), "a", "b"]), want, rtol=1e-5, atol=1e-5)
    fastprefix.register(other, {}, max_resident=1)
    with pytest.raises(ValueError, match=r"names: got 2 prefixes from disk, expected at most max_resident = 1"):
        logits(other, [("a", "b")])


def test_pefts_composition_is_concat(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = model_with(3, 5, num_frozen_tokens=1)[0]
    for name in "ab":
        fastprefix.save(model, tmp_path / name, name)
    peft.compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "both")
    fastprefix.load(model, tmp_path / "both", "both").to(torch.float64)
    fastprefix.set_prefix(model, None)
    torch.testing.assert_close(logits(model, ["both"]), logits(model, [("a", "b")]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda a, b, p: init.concat(a), r"prefixes: got 1, expected at least two"),
        (lambda a, b, p: init.concat(a, p), r"prefixes: got 2 layers of \[2, 3, 8\] and a soft prompt \[3, 32\]"),
        (lambda a, b, p: init.concat(a, "b"), r"prefixes: got str, expected what attach returns"),
        (lambda a, b, p: init.concat(a, init.normal()), r"prefixes: got init.normal, expected"),
        (lambda a, b, p: init.average(a, b), r"prefixes: got 2 layers of \[2, 3, 8\] and 2 layers of \[2, 5, 8\]"),
        (
            lambda a, b, p: init.average(a, a, weights=[1]),
            r"weights: got \[1\], expected 2 numbers whose sum is not 0",
        ),
        (lambda a, b, p: init.average(a, a, weights=[1, -1]), r"weights: got \[1, -1\]"),
        (lambda a, b, p: init.slice(a, 2, 2), r"start and stop: got 2 and 2, expected at least one of the prefix's 3"),
        (lambda a, b, p: init.drop(a, [3]), r"tokens: got \[3\], expected places in -3..2"),
        (lambda a, b, p: init.drop(a, [0, 1, 2]), r"tokens: got all 3, expected fewer"),
        (lambda a, b, p: init.drop(a, "x"), r"tokens: got \['x'\], expected places"),
        (lambda a, b, p: init.slice(a, "1"), r"start: got '1', expected an int or None"),
        (lambda a, b, p: init.average(a, a, weights="ab"), r"weights: got \['a', 'b'\], expected 2 numbers"),
        (lambda a, b, p: PrefixConfig(init=init.slice(p, 1)), r"init: got init.slice of a soft prompt"),
        (lambda a, b, p: PromptConfig(init=init.slice(a, 1)), r"init: got 'slice'"),
    ],
)
def test_wrong_calls(wrong: Any, says: str) -> None:
    model, a, b = model_with(3, 5)
    prompt = fastprefix.attach(model, PromptConfig(3), "prompt")
    with pytest.raises(ValueError, match=says):
        wrong(a, b, prompt)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([("a", "x")], r"names: got \('a', 'x'\), expected None or one of \['a', 'b', 'prompt'\], or a tuple of these"),
        ([("a", None)], r"names: got \('a', None\)"),
        ([()], r"names: got \(\), expected"),
        ([("a", "prompt")], r"names: got \('a', 'prompt'\) of a prefix and soft prompt, expected soft prompts alone"),
    ],
)
def test_wrong_names(names: list[Any], says: str) -> None:
    model, *_ = model_with(3, 5)
    fastprefix.attach(model, PromptConfig(3), "prompt")
    fastprefix.set_prefix(model, None)
    with pytest.raises(ValueError, match=says):
        logits(model, names)
