"""What else a prefix of a tensor-parallel model does as in one process, and what is refused there by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from fastprefix.hf.trainer import PrefixTrainer
from tests.integrations.tensor_parallel.test_training import assert_same, batch, parallel, whole
from tests.support import two_processes
from tests.support.tiny_models import tiny_model

P = 3
START = init.normal(0.6)


def attach(model: Any, config: Any, name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return fastprefix.attach(model, config, name)


def gradients(model: Any, prefix: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids=batch(), use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch()[:, 1:].flatten()).backward()
    return {name: whole(p.grad) for name, p in prefix.named_parameters()}


def features(model: Any, folder: Path, seed: int) -> dict[str, Any]:
    """Banks, registered prefixes, shared prompts, checkpointing, dropped tokens, baking, arithmetic, naming."""
    found: dict[str, Any] = {}
    direct = attach(model, PrefixConfig(P, init=START), "direct", seed)
    projected = attach(model, PrefixConfig(P + 1, init=START, prefix_projection=True), "projected", seed)
    attach(model, PromptConfig(P, init=START), "prompt", seed)
    fastprefix.save(model, folder / "direct", "direct")
    fastprefix.register(model, {"stored": folder / "direct"})
    names = ["direct", None, "projected", "stored"]
    for what, rows in {"mixed": names, "prompts": ["prompt", "direct", None, "prompt"]}.items():
        with fastprefix.prefix_batch(model, rows):
            found[what] = model(batch()).logits.detach()
            found[f"{what}: tokens"] = model.generate(batch(), max_new_tokens=4, do_sample=False)
    with fastprefix.prefix_batch(model, [("direct", "projected"), "direct", None, "projected"]):
        found["behind each other"] = model(batch()).logits.detach()
    found["votes"] = fastprefix.ensemble(model, ["direct", "projected"], input_ids=batch()).probabilities.detach()
    assert "projected" in fastprefix.explain(model)
    fastprefix.set_prefix(model, "stored")
    found["stored"] = model(batch()).logits.detach()
    fastprefix.set_prefix(model, "direct")
    with fastprefix.shared_prompt(model, [4, 5, 6]):
        found["shared"] = model(batch()).logits.detach()
    with fastprefix.prefix_batch(model, ["direct", None, "projected", "direct"]):
        found["mixed gradients"] = gradients(model, projected) | gradients(model, direct)
    fastprefix.set_prefix(model, "projected")
    for reentrant in (False, True):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found[f"recomputed {reentrant}"] = gradients(model, projected)
        model.gradient_checkpointing_disable()
        model.eval()
    with torch.no_grad():  # a generation after a step reads the new numbers
        for p in projected.parameters():
            p.mul_(1.5)
    found["changed"] = model.generate(batch(), max_new_tokens=4, do_sample=False)
    fastprefix.bake(model, "projected")
    found["baked"] = model(batch()).logits.detach()
    found["baked numbers"] = {name: whole(x) for name, x in projected.state_dict().items()}
    start = fastprefix.init.concat(direct, projected)
    assert all(type(x) is Tensor for x in start.keys or ())
    fastprefix.attach(model, PrefixConfig(init=start), "joined")
    found["joined"] = model(batch()).logits.detach()
    fastprefix.detach(model, "joined")
    dropped = attach(model, PrefixConfig(8, init=START, dropout=0.5, prefix_bias=True), "dropped", seed)
    torch.manual_seed(seed + 7)
    dropped.train()
    found["dropped"] = gradients(model, dropped)
    fastprefix.detach(model)
    return found


def in_parallel(rank: int, folder: Path) -> dict[str, Any]:
    model = parallel(folder / "base")
    before = model(batch()).logits
    found = features(model, folder / "two", 1 + rank)
    assert torch.equal(model(batch()).logits, before)
    return found


@pytest.mark.slow
def test_features(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    want = features(model, tmp_path / "one", 1)
    assert (want["dropped"]["layers.0.k"] == 0).all(-1).any()  # tokens that were dropped
    for each in two_processes.run(in_parallel, tmp_path, tmp_path, timeout=300.0):
        assert_same(each, want, "features")


def uneven() -> Any:
    """Three heads of keys, which two processes cannot share."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=48, intermediate_size=32, **sizes)).eval()


def refusals(rank: int, folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}

    def refused(what: str, call: Callable[[], Any]) -> None:
        with pytest.raises(ValueError) as raised:
            call()
        found[what] = str(raised.value)

    model = parallel(folder / "uneven")
    refused("uneven", lambda: fastprefix.attach(model, PrefixConfig(P)))
    model = parallel(folder / "base")
    refused("head", lambda: fastprefix.attach(model, PrefixConfig(P, modules_to_save=["lm_head"])))
    config = PromptConfig(P, encoder="lstm", encoder_dropout=0.5)
    refused("dropout", lambda: fastprefix.attach(model, config))
    before = model(batch()).logits
    fastprefix.attach(model, PromptConfig(P))
    refused("tokens", lambda: fastprefix.nearest_tokens(model))
    refused("search", lambda: fastprefix.search_hard_prompt(model, batch(), num_tokens=2, steps=1, candidates=2))
    refused("whole", lambda: fastprefix.save_pretrained(model, folder / "whole"))
    refused("trainer", lambda: PrefixTrainer(model=model, args=arguments(folder)))
    fastprefix.detach(model)
    assert torch.equal(model(batch()).logits, before)
    from peft import PrefixTuningConfig, get_peft_model

    peft_model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    refused("peft", lambda: fastprefix.patch(peft_model))
    plan = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "kv"}
    model = parallel(folder / "base", plan=plan)
    refused("keys", lambda: fastprefix.attach(model, PrefixConfig(P)))
    return found


def arguments(folder: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(str(folder / "trainer"), use_cpu=True, report_to=[])


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    uneven().save_pretrained(tmp_path / "uneven")
    expected = {
        "uneven": "model: got LlamaForCausalLM with 3 heads of keys and values over 2 processes, expected a tp_size",
        "head": "modules_to_save: got 'lm_head', which tensor parallelism spreads over processes",
        "dropout": "encoder_dropout: got 0.5, expected 0.0 in a tensor-parallel model",
        "tokens": "model: got LlamaForCausalLM with sharded parameters (",
        "search": "model: got LlamaForCausalLM with sharded parameters (",
        "whole": "model: got LlamaForCausalLM with sharded parameters (",
        "trainer": "model: got a tensor-parallel LlamaForCausalLM, expected a whole model on each device",
        "peft": "model: got a tensor-parallel LlamaForCausalLM, expected a whole model on each device",
        "keys": "model: got LlamaForCausalLM, whose tp_plan spreads the queries of layer 0 and not its keys",
    }
    for each in two_processes.run(refusals, tmp_path, tmp_path, timeout=300.0):
        assert each.keys() == expected.keys()
        for what, said in expected.items():
            assert each[what].startswith(said), (what, each[what])


def classifier() -> Any:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny_model().config)
    model.model.load_state_dict(tiny_model().model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(
            torch.linspace(-1.0, 1.0, model.score.weight.numel()).sin().view_as(model.score.weight)
        )
    return model.eval()


def classified(model: Any, folder: Path, seed: int) -> dict[str, Any]:
    """A step of a prefix and the head, which is in every process; and both from a file."""
    config = PrefixConfig(P, init=START, modules_to_save=["score"])
    prefix = attach(model, config, "default", seed)
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.5)
    model(input_ids=batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    found: dict[str, Any] = {"grads": {name: whole(p.grad) for name, p in prefix.named_parameters()}}
    optimizer.step()
    found["logits"] = model(batch()).logits.detach()
    fastprefix.save(model, folder)
    fastprefix.detach(model)
    fastprefix.load(model, folder)
    return {**found, "loaded": model(batch()).logits.detach()}


def classified_in_parallel(rank: int, folder: Path) -> dict[str, Any]:
    model = parallel(folder / "base", auto="AutoModelForSequenceClassification")
    return classified(model, folder / "two", 1 + rank)


@pytest.mark.slow
def test_a_head_that_the_plan_leaves_whole(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path / "base")
    want = classified(model, tmp_path / "one", 1)
    assert "modules_to_save.score.weight" in want["grads"]
    for each in two_processes.run(classified_in_parallel, tmp_path, tmp_path):
        assert_same(each, want, "classifier")
        torch.testing.assert_close(each["loaded"], each["logits"])


def without_attention(rank: int, folder: Path) -> dict[str, Any]:
    """A plan that spreads the feed-forward layers alone: every process has all heads."""
    gathered = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
    model = parallel(folder, plan={**gathered, "model.layers.*.self_attn.o_proj": "rowwise_split_input"})
    prefix = attach(model, PrefixConfig(P, init=START, prefix_bias=True, gate="tanh"), "default", 1 + rank)
    with torch.no_grad():
        for layer in prefix.layers:
            layer.gate.weight.fill_(0.5)
    return {"logits": model(batch()).logits.detach(), "grads": gradients(model, prefix)}


@pytest.mark.slow
def test_a_plan_that_leaves_attention_whole(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    prefix = attach(model, PrefixConfig(P, init=START, prefix_bias=True, gate="tanh"), "default", 1)
    with torch.no_grad():
        for layer in prefix.layers:
            layer.gate.weight.fill_(0.5)
    want = {"logits": model(batch()).logits.detach(), "grads": gradients(model, prefix)}
    for each in two_processes.run(without_attention, tmp_path, tmp_path / "base"):
        assert_same(each, want, "whole heads")
