"""Modules that are trained with a prefix: heads and others, in files that PEFT reads and writes, and back again."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, init
from tests.model_zoo.trained_heads import CONFIGS, ids, model, out, train

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

P, VOCAB = 3, 40


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "modules_to_save"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_trained_head_comes_back(config: Any, by_hand: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    trained = model()
    before = trained.score.weight.clone()
    config = copy.deepcopy(config)
    config.modules_to_save = None if by_hand else ("score",)
    prefix = fastprefix.attach(trained, config)
    if by_hand:
        trained.score.requires_grad_(True)
    else:
        assert any(p is trained.score.weight for p in prefix.parameters())
    train(trained)
    assert (trained.score.weight - before).abs().min() > 1e-3
    fastprefix.save(trained, tmp_path)
    fresh = model(seed=5)
    assert not torch.equal(fresh.score.weight, before)
    fastprefix.load(fresh, tmp_path)
    torch.testing.assert_close(out(fresh), out(trained), rtol=0, atol=1e-12)
    assert torch.equal(fresh.score.weight, trained.score.weight) and fresh.score.weight.requires_grad


def test_detach_gives_the_model_its_own_head_back() -> None:
    bare = model()
    before, want, module = copy.deepcopy(bare.state_dict()), out(bare), bare.score
    fastprefix.attach(bare, PrefixConfig(P, modules_to_save=["score"]))
    train(bare)
    assert bare.score is not module and type(bare.score) is type(module)
    fastprefix.detach(bare)
    assert bare.score is module and module.weight.requires_grad
    assert bare.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in bare.state_dict().items())
    assert torch.equal(out(bare), want)


TASKS = {
    "LlamaForSequenceClassification": "SEQ_CLS",
    "LlamaForTokenClassification": "TOKEN_CLS",
    "LlamaForQuestionAnswering": "QUESTION_ANS",
}


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
@pytest.mark.parametrize("name", TASKS)
def test_pefts_folders_and_ours_are_the_same(name: str, kind: str, tmp_path: Path) -> None:
    config = getattr(peft, kind)(task_type=TASKS[name], num_virtual_tokens=P)
    try:
        theirs = peft.get_peft_model(model(name), config).double().eval()
    except TypeError as error:
        pytest.skip(str(error))
    for module in theirs.base_model.modules():
        if hasattr(module, "modules_to_save"):
            torch.nn.init.normal_(module.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = model(name, seed=7)
    fastprefix.load(ours, tmp_path / "theirs").double()
    head = ours.qa_outputs if "Question" in name else ours.score
    mask = torch.ones(4, 7)
    behind = slice(None)
    if kind == "PromptTuningConfig" and "Sequence" not in name:
        behind = slice(P, None)  # PEFT gives the prompt's own positions, too

    def of_peft(peft_model: Any) -> Tensor:
        with torch.no_grad():
            found = peft_model(input_ids=ids(), attention_mask=mask)
        parts = found.to_tuple()[: 2 if "start_logits" in found else 1]
        return torch.cat([(x if "Sequence" in name else x[:, behind]).reshape(4, -1) for x in parts], 1)

    torch.testing.assert_close(out(ours, attention_mask=mask), of_peft(theirs), rtol=0, atol=1e-10)
    with torch.no_grad():
        head.weight.mul_(2)
    fastprefix.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model(name, seed=9), str(tmp_path / "ours")).double().eval()
    torch.testing.assert_close(of_peft(again), out(ours, attention_mask=mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_a_frozen_head_is_in_the_file_and_comes_back_frozen(name: str, tmp_path: Path) -> None:
    trained = model(name)
    fastprefix.attach(trained, PrefixConfig(P, init=init.normal(0.5)))
    fastprefix.save(trained, tmp_path)
    peft.PeftModel.from_pretrained(model(name), str(tmp_path))  # which wants the head
    fresh = model(name, seed=5)
    prefix = fastprefix.load(fresh, tmp_path)
    torch.testing.assert_close(out(fresh), out(trained), rtol=0, atol=1e-12)
    assert not fresh.classifier.weight.requires_grad and prefix.config.modules_to_save is None
    fastprefix.save(fresh, tmp_path / "again")
    assert (tmp_path / "again/fastprefix_config.json").read_text() == (tmp_path / "fastprefix_config.json").read_text()


def test_peft_reads_modules_of_a_language_model(tmp_path: Path) -> None:
    one = model("LlamaForCausalLM")
    fastprefix.attach(one, PrefixConfig(P, modules_to_save=["lm_head", "norm"]))
    with torch.no_grad():
        one.lm_head.weight.neg_()
        one.model.norm.weight.mul_(2)
    fastprefix.save(one, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model("LlamaForCausalLM"), str(tmp_path)).double().eval()
    with torch.no_grad():
        got = theirs(input_ids=ids()).logits.reshape(4, -1)
    torch.testing.assert_close(got, out(one), rtol=0, atol=1e-10)


def test_what_is_trained_and_not_saved_is_named(tmp_path: Path) -> None:
    one = model("LlamaForCausalLM")
    fastprefix.attach(one, PrefixConfig(P))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastprefix.save(one, tmp_path)
    one.lm_head.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not saved with it: lm_head.weight\. Modules that are named in modules_to"):
        fastprefix.save(one, tmp_path)
    tuned = peft.get_peft_model(model("LlamaForSequenceClassification"), peft.LoraConfig(task_type="SEQ_CLS"))
    base = tuned.get_base_model()
    fastprefix.attach(base, PrefixConfig(P))
    for name, p in tuned.named_parameters():
        p.requires_grad_("lora_" in name or "modules_to_save" in name)
    with pytest.warns(UserWarning, match=r"lora_A.* and \d+ more\. .* PEFT's save_pretrained saves its adapters"):
        fastprefix.save(base, tmp_path)


def test_what_is_not_right_is_refused_by_name(tmp_path: Path) -> None:
    def refused(names: Any, message: str, of: str = "LlamaForSequenceClassification") -> None:
        bare = model(of)
        with pytest.raises(ValueError, match=message):
            fastprefix.attach(bare, PrefixConfig(P, modules_to_save=names))
        assert not hasattr(bare, "_fastprefix") and bare.score.weight.requires_grad

    refused(["scores"], "modules_to_save: got 'scores', expected the end of a module's name in LlamaForSeq")
    refused(["layers.0"], "modules_to_save: got 'model.layers.0', which holds layers of attention")
    refused("score", "modules_to_save: got 'score', expected distinct ends of modules' names")
    refused([], "modules_to_save")
    refused([""], "modules_to_save")
    one = model()
    for name in "ab":
        fastprefix.attach(one, PrefixConfig(P, modules_to_save=["0.mlp"]), name)
    message = r"names: got prefixes with different modules at 'model.layers.0.mlp'"
    with pytest.raises(ValueError, match=message), fastprefix.prefix_batch(one, ["a", "b"]):
        pass
    fastprefix.detach(one)
    fastprefix.attach(one, PrefixConfig(P, modules_to_save=["score"]))
    fastprefix.save(one, tmp_path)
    other = model(labels=5)
    with pytest.raises(ValueError, match=r"base_model.score.weight: got shape \[3, 16\], expected shape \[5, 16\]"):
        fastprefix.load(other, tmp_path)
    assert not hasattr(other, "_fastprefix")
    with pytest.raises(ValueError, match=r"base_model.score.weight.*: got a tensor that is no part of a prefix"):
        fastprefix.load(model("LlamaForCausalLM"), tmp_path)
    one.score = torch.nn.Linear(16, 3)
    with pytest.raises(ValueError, match="with another 'score'"):
        fastprefix.set_prefix(one, None)


@pytest.mark.filterwarnings("ignore:fastprefix. the prompt is concatenated")
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_a_prompt_of_an_encoder_is_pefts_wherever_its_head_reads(name: str, tmp_path: Path) -> None:
    """RoBERTa's head reads the first position itself, which behind a concatenated prompt is the prompt's."""
    mask = torch.ones(4, 7)
    theirs = peft.get_peft_model(model(name), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P))
    theirs.double().eval().save_pretrained(tmp_path / "theirs")
    ours = model(name, seed=3)
    fastprefix.load(ours, tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(input_ids=ids(), attention_mask=mask).logits
    torch.testing.assert_close(out(ours, attention_mask=mask), want, rtol=0, atol=1e-10)
    fastprefix.save(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(model(name, seed=4), str(tmp_path / "ours")).double().eval()
    with torch.no_grad():
        got = back(input_ids=ids(), attention_mask=mask).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # the file holds fp32
