"""A real model and a real document: the closed form is closer to the whole text than the text's first tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import fastprefix
from fastprefix.assets import smollm2
from fastprefix.cartridges import measure
from fastprefix.cartridges.batches import examples_of
from fastprefix.cartridges.preparation import with_targets
from fastprefix.cartridges.reading import reading
from fastprefix.data import encode_pairs

DOCUMENT = Path(__file__).parents[2] / "docs" / "operator.md"
T, P, ASKED, SAID = 640, 96, 16, 32


@pytest.mark.slow
def test_attention_matching_is_closer_than_the_first_tokens(tmp_path: Path) -> None:
    """Passages that were no reference: each begins with 16 tokens of the document and goes on with 32."""
    try:
        smollm2.find_gguf()
    except ImportError as error:
        pytest.skip(str(error))
    model, tokenizer = smollm2.load_smollm2()
    ids = tokenizer(DOCUMENT.read_text())["input_ids"][:T]
    firsts = range(60, T - ASKED - SAID, 90)
    pairs = [
        {
            "prompt": tokenizer.decode(ids[i : i + ASKED]),
            "completion": tokenizer.decode(ids[i + ASKED : i + ASKED + SAID]),
        }
        for i in firsts
    ]
    encoded = encode_pairs(pairs, tokenizer)
    examples = examples_of([{name: x[i] for name, x in encoded.items()} for i in range(len(pairs))])
    config = fastprefix.CartridgeConfig(tokens=P)
    with reading(model, ids, P):
        examples = with_targets(model, examples, tmp_path / "targets.safetensors", ids, config, resume=False)
    starts = {
        "matched": fastprefix.attention_matching(model, ids, P),
        "first": fastprefix.init.token_ids(ids[:P]),
        "normal": fastprefix.init.normal(),
    }
    found = {}
    for name, start in starts.items():
        fastprefix.attach(model, fastprefix.PrefixConfig(P, init=start))
        found[name] = measure.measure(model, examples, 8, True).divergence
        fastprefix.detach(model)
    assert found["matched"] < 0.9 * found["first"] < 0.9 * found["normal"], found
