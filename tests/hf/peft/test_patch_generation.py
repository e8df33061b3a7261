"""``generate`` of a patched model: PEFT's tokens and scores where PEFT is right, its rows alone where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.model_zoo.architectures import ROWS  # noqa: E402
from tests.model_zoo.peft_models import GREEDY, KINDS, add, ids, made, padding, tasks  # noqa: E402

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "stopping": {"eos_token_id": list(range(30)), "max_new_tokens": 8},
}
PROMPTS = ("prompt", "mlp", "lstm", "multitask")
CAUSAL = [
    (row, kind)
    for row in ("llama_gqa", "gpt2", "opt", "qwen3")
    for kind in KINDS
    if kind != "adaption" or row in ("llama_gqa", "gpt2")
]
# Behind padding PEFT's soft prompts forget positions, but for OPT, which counts its mask.
PADDED = [(row, kind) for row, kind in CAUSAL if row == "opt" or kind not in PROMPTS]


def generated(model: Any, kind: str, **options: Any) -> Any:
    """From three rows, or those of ``options``."""
    torch.manual_seed(5)
    options = {"input_ids": ids(), **GREEDY, **options}
    return model.generate(**tasks(kind, len(options["input_ids"])), **options)


@pytest.mark.parametrize(("row", "kind"), CAUSAL)
def test_gives_peft_s_tokens(row: str, kind: str) -> None:
    theirs, ours = made(False, kind, row), made(True, kind, row)
    for name, options in OPTIONS.items():
        assert torch.equal(generated(ours, kind, **options), generated(theirs, kind, **options)), name


@pytest.mark.parametrize(("row", "kind"), PADDED)
def test_gives_peft_s_tokens_behind_padding(row: str, kind: str) -> None:
    theirs, ours, mask = made(False, kind, row), made(True, kind, row), padding("left")
    for name, options in OPTIONS.items():
        options = {"attention_mask": mask, **options}
        assert torch.equal(generated(ours, kind, **options), generated(theirs, kind, **options)), name


@pytest.mark.parametrize("row", ["llama_gqa", "gpt2", "qwen3"])
@pytest.mark.parametrize("kind", ["prompt", "mlp", "lstm"])
def test_soft_prompts_behind_padding_are_their_rows_alone(row: str, kind: str) -> None:
    theirs, ours = made(False, kind, row), made(True, kind, row)
    for options in ({}, {"num_beams": 3}):
        got = generated(ours, kind, attention_mask=padding("left"), **options)
        for i, n in enumerate((4, 1, 0)):
            want = generated(theirs, kind, input_ids=ids()[i : i + 1, n:], **options)
            assert torch.equal(got[i : i + 1, n:], want)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_peft_s(kind: str) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True, "min_new_tokens": 5}
    got, want = (generated(made(on, kind), kind, **options) for on in (True, False))
    assert torch.equal(got.sequences, want.sequences) and len(got.logits) == len(want.logits) == 5
    for x, y in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", ["llama_gqa", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("kind", ["prefix", "prompt", "multitask"])
def test_speculation_changes_nothing(row: str, kind: str) -> None:
    """PEFT raises in most of these; what it gives without speculation is what is right."""
    ours, assistant = made(True, kind, row), ROWS[row].build()
    for prompt in ({"input_ids": ids(1, 6).repeat(1, 2)}, {"input_ids": ids()[2:]}):
        want = generated(made(False, kind, row), kind, max_new_tokens=8, **prompt)
        for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
            assert torch.equal(generated(ours, kind, max_new_tokens=8, **prompt, **options), want), options


@pytest.mark.parametrize("row", ["gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("kind", ["prefix", "projection", "prompt", "multitask"])
def test_caches_of_every_kind_give_the_same(row: str, kind: str) -> None:
    want = generated(made(False, kind, row), kind)
    ours = made(True, kind, row)
    for options in ({"use_cache": False}, {"past_key_values": transformers.DynamicCache()}):
        assert torch.equal(generated(ours, kind, **options), want)
    if row != "opt":
        assert torch.equal(generated(ours, kind, cache_implementation="static"), want)


@pytest.mark.parametrize("row", ["gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("kind", ["prefix", "prompt", "multitask"])
def test_a_second_turn_is_one_over_the_whole_text(row: str, kind: str) -> None:
    ours = made(True, kind, row)
    first = generated(ours, kind, return_dict_in_generate=True)
    text = torch.cat([first.sequences, ids()[:, :3]], 1)
    both = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    want = generated(made(False, kind, row), kind, **both)
    assert torch.equal(generated(ours, kind, past_key_values=first.past_key_values, **both), want)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_from_the_base_model(kind: str) -> None:
    ours, bare = made(True, kind), ROWS["llama_gqa"].build().generate(ids(), **GREEDY)
    with ours.disable_adapter():
        assert torch.equal(ours.generate(input_ids=ids(), **GREEDY), bare)
        assert torch.equal(ours.get_base_model().generate(ids(), **GREEDY), bare)
    if kind != "multitask":  # whose base model cannot know the task
        got = ours.get_base_model().generate(ids(), **GREEDY)
        assert torch.equal(got, generated(made(False, kind), kind)) and not torch.equal(got, bare)


@pytest.mark.parametrize("kind", ["prefix", "projection", "prompt", "mlp"])
def test_loaded_for_use_and_patched(kind: str, tmp_path: Any) -> None:
    want = generated(made(False, kind), kind)
    made(True, kind).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(ROWS["llama_gqa"].build(), tmp_path)
    from fastprefix import patch

    assert torch.equal(generated(patch(loaded), kind), want)
    assert not any(p.requires_grad for p in loaded.base_model.parameters())


def test_switching_between_generations() -> None:
    theirs, ours = made(False, "prefix"), made(True, "prefix")
    for model in (theirs, ours):
        add(model)
    for name in ("other", "default", "other"):
        theirs.set_adapter(name), ours.set_adapter(name)
        assert torch.equal(generated(ours, "prefix"), generated(theirs, "prefix"))


@pytest.mark.parametrize("kind", ["prefix", "cartridge", "prompt", "mlp"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_adapter_names_behind_padding(kind: str, options: dict[str, Any]) -> None:
    """Each row is what its adapter gives for it alone; prompts of different lengths lie beside each other."""
    theirs, ours = made(False, kind), made(True, kind)
    cls, own = KINDS[kind]
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("other", cls(**{"task_type": "CAUSAL_LM", **own, "num_virtual_tokens": 3}))
    names = ["other", "default", None]
    got = generated(ours, kind, attention_mask=padding("left"), adapter_names=names, **options)
    for i, (name, n) in enumerate(zip(names, (4, 1, 0), strict=True)):
        given = {"input_ids": ids()[i : i + 1, n:], **GREEDY, **options}
        if name is None:
            want = ROWS["llama_gqa"].build().generate(**given)
        else:
            theirs.set_adapter(name)
            want = theirs.generate(**given)
        assert torch.equal(got[i * len(want) : (i + 1) * len(want), n:], want)
