"""Calls in which the place of a soft prompt inside the text is not known, or would be wrong, raise by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PromptConfig
from tests.hf.runtime.inserted_prompts import MARKER, B, S, batch, inserted
from tests.hf.runtime.test_inserted_prompts import GREEDY
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS


@pytest.mark.parametrize("place", ["behind", -1, True, 1.0, None])
def test_a_place_is_before_after_or_an_id(place: Any) -> None:
    with pytest.raises(ValueError, match=r"place: got .*, expected 'before', 'after' or the id of a marker token"):
        PromptConfig(4, place=place)


def test_a_model_that_reads_in_both_directions() -> None:
    with pytest.raises(ValueError, match="place: got 'after' in BertModel, which reads its text in both directions"):
        fastprefix.attach(ROWS["bert"].build(), PromptConfig(4, place="after"))
    t5 = ENCODER_DECODERS["t5"].build()
    with pytest.raises(
        ValueError, match="place: got 'after' in T5ForConditionalGeneration, which reads its text in both"
    ):
        fastprefix.attach(t5, PromptConfig(4, place="after"))


def test_rows_without_one_marker() -> None:
    _, model, _ = inserted("llama_gqa", MARKER)
    rows = batch(MARKER)
    none, two = rows.ids.clone(), rows.ids.clone()
    none[0, rows.start[0]] = 3
    two[1, 0] = MARKER
    for ids in (none, two):
        with pytest.raises(ValueError, match=r"input_ids: got a row with another number.*marker 2.*exactly once"):
            model(input_ids=ids)
    with pytest.raises(ValueError, match="input_ids: got None, expected token ids"):
        model(inputs_embeds=model.get_input_embeddings()(rows.ids))


def test_text_whose_end_is_not_known() -> None:
    _, model, _ = inserted("llama_gqa", "after")
    ids = batch("after").ids
    with pytest.raises(ValueError, match="labels: got a row labelled from its start, expected a token in front"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="input_ids: got a row without a token"):
        model(input_ids=ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="logits_to_keep: got 3, expected labels"):
        model(input_ids=ids, logits_to_keep=3)
    with pytest.raises(ValueError, match="use_cache: got False, expected a cache or labels"):
        model(input_ids=ids, use_cache=False)
    model.train()
    with pytest.raises(ValueError, match="labels: got None, expected labels, of which the first one that counts"):
        model(input_ids=ids)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"use_cache": False}, "use_cache: got False"),
        ({"cache_implementation": "static"}, "past_key_values: got a static cache"),
        ({"prefill_chunk_size": 4}, "past_key_values: got a cache that holds the prompt, and 4 tokens"),
        ({"prompt_lookup_num_tokens": 2}, "logits_to_keep: got|past_key_values: got a cache that holds the prompt"),
    ],
    ids=str,
)
def test_generation_after_the_text(options: dict[str, Any], complaint: str) -> None:
    _, model, _ = inserted("llama_gqa", "after")
    ids = batch("after").ids[:1].repeat(1, 3)
    with pytest.raises(ValueError, match=complaint):
        model.generate(ids, **GREEDY, **options)


@pytest.mark.parametrize(("options", "raises"), [({"use_cache": False}, False), ({"prefill_chunk_size": 2}, True)])
def test_generation_at_a_marker(options: dict[str, Any], raises: bool) -> None:
    _, model, _ = inserted("llama_gqa", MARKER)
    ids = batch(MARKER).ids
    given = {**GREEDY, "suppress_tokens": [MARKER]}
    if raises:
        with pytest.raises(ValueError, match="input_ids: got a row with another number"):
            model.generate(ids, **given, **options)
    else:
        torch.testing.assert_close(model.generate(ids, **given, **options), model.generate(ids, **given))


def test_a_cache_that_does_not_fit() -> None:
    _, model, _ = inserted("llama_gqa", MARKER)
    rows = batch(MARKER)
    generated = model.generate(rows.ids, **GREEDY, suppress_tokens=[MARKER], return_dict_in_generate=True)
    whole = torch.cat([generated.sequences, torch.full((B, 9), 5)], 1)
    # generate takes the cache's length for the text's, and would leave out as many tokens as the prompt has more.
    with pytest.raises(ValueError, match=r"position_ids: got|attention_mask: got"):
        model.generate(whole, past_key_values=generated.past_key_values, **GREEDY)
    cache = model(input_ids=rows.ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask: got 4 columns, expected 10"):
        model(input_ids=rows.ids[:, -1:] + 3, attention_mask=torch.ones(B, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="input_ids: got the marker 2 after the prompt"):
        model(input_ids=torch.full((B, 1), MARKER), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: got a cache of other rows"):
        model(input_ids=rows.ids[:2, -1:] + 3, past_key_values=cache)


def test_masks_packing_and_blocks() -> None:
    _, model, _ = inserted("llama_gqa", MARKER)
    ids = batch(MARKER).ids
    with pytest.raises(ValueError, match="attention_mask: got a mask made in advance"):
        model(input_ids=ids, attention_mask=torch.ones(B, 1, S, S, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match=r"position_ids: got packed documents \(they jump\)"):
        model(input_ids=ids, position_ids=torch.tensor([[*range(4), *range(S - 4)]] * B))
    with (
        fastprefix.shared_prompt(model, ids[0]),
        pytest.raises(ValueError, match="place: got 2 of a soft prompt in a block of shared_prompt"),
    ):
        model(input_ids=ids)


def test_learned_positions_end() -> None:
    _, model, _ = inserted("gpt2", "after")
    length = model.config.n_positions
    with pytest.raises(ValueError, match=f"position_ids: got {length + 4}, expected at most {length - 1}"):
        model(input_ids=torch.full((1, length), 3))
