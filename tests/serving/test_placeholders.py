"""Placeholder tokens and salts: the same for one prefix, others for any other."""

from __future__ import annotations

import torch

from fastprefix.serving.vllm.placeholders import Salt, alphabet, content_digest, spell


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {f"{n}.{i}": torch.randn(2, 3, 4, generator=numbers) for n in "kv" for i in range(2)}


def test_the_digest_is_of_the_numbers() -> None:
    first = content_digest(tensors())
    assert first == content_digest(dict(reversed(tensors().items())))
    changed = tensors()
    changed["v.1"][1, 2, 3] = torch.nextafter(changed["v.1"][1, 2, 3], torch.tensor(9.0))
    renamed = {{"k.0": "v.0", "v.0": "k.0"}.get(name, name): x for name, x in tensors().items()}
    reshaped = {name: x.view(2, 4, 3) for name, x in tensors().items()}
    halves = {name: x.view(torch.float16) for name, x in tensors().items()}
    others = [content_digest(x) for x in (tensors(1), changed, renamed, reshaped, halves)]
    assert len({first, *others}) == 6
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in tensors().items()}
    assert content_digest(strided) == first


def test_placeholders_spell_the_digest() -> None:
    letters = alphabet(50, special=(0, 1, 2))
    assert letters == list(range(3, 50))
    one, other = content_digest(tensors()), content_digest(tensors(1))
    assert spell(one, 40, letters) == spell(one, 40, letters) != spell(other, 40, letters)
    assert set(spell(one, 5000, letters)) == set(letters)
    # A prefix that is cut keeps its first letters, so that blocks of one digest agree.
    assert spell(one, 40, letters)[:7] == spell(one, 7, letters)
    assert spell(one, 0, letters) == []


def test_the_tokens_of_all_ranks_of_a_thousand_prefixes_differ() -> None:
    letters = alphabet(49152)
    spelt = {tuple(spell(f"{i:064x}", 4, letters)) for i in range(1000)}
    assert len(spelt) == 1000


def test_a_vocabulary_of_special_tokens_alone_still_spells() -> None:
    assert alphabet(3, special=range(3)) == [0, 1, 2]


def test_salts_are_secret_and_keep_clients_apart() -> None:
    one, other = Salt(), Salt()
    assert one.of("a") == one.of("a") != other.of("a")
    assert len({one.of("a"), one.of("b"), one.of("a", "client"), one.once("a"), one.once("a")}) == 5
