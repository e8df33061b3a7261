"""LoRA on the same model: together and apart, attached before and after, equal to explicit concatenation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix
from fastprefix import PrefixConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.support.concat_oracle import concatenating

peft = pytest.importorskip("peft")

P, S = 5, 7
TARGETS: dict[str, Any] = {"projections": ["q_proj", "v_proj", "o_proj"], "all-linear": "all-linear"}


def lora(base: nn.Module, targets: Any = TARGETS["projections"]) -> Any:
    """A LoRA that says something from the start, the same numbers whatever was drawn before."""
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.eval()


def config(projected: bool) -> PrefixConfig:
    return PrefixConfig(P, prefix_projection=projected, init=init.normal(0.6))


def both(first: str, projected: bool = False, targets: Any = TARGETS["projections"]) -> tuple[Any, Any]:
    """A model with LoRA and a prefix, in fp64, whichever of them came first; all of the two trainable."""
    base = ROWS["llama_gqa"].build(torch.float64)
    if first == "prefix":
        prefix = fastprefix.attach(base, config(projected))
        model = lora(base, targets)
    else:
        model = lora(base, targets)
        prefix = fastprefix.attach(model.get_base_model(), config(projected))
    prefix.double()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "fastprefix" in name)
    return model, prefix


def batch() -> tuple[Tensor, Tensor]:
    ids, mask = torch.randint(3, VOCAB, (2, S), generator=torch.Generator().manual_seed(3)), torch.ones(2, S)
    mask[1, 5:] = 0
    return ids, mask.long()


def loss(model: Any) -> Tensor:
    ids, mask = batch()
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def wanted(prefix: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Loss and gradients of a prefix concatenated in front of a model with the same LoRA: nothing of ours."""
    bare = lora(ROWS["llama_gqa"].build(torch.float64), targets)
    names = [name for name, m in bare.named_modules() if name.endswith("self_attn")]
    ids, mask = batch()
    positions = (torch.arange(S) + P).expand(2, -1)
    with concatenating(bare, dict(zip(names, prefix.key_values(), strict=True))) as twin:
        labels = ids.masked_fill(mask == 0, -100)
        value = twin(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss
        trained = {name: p for name, p in twin.named_parameters() if "lora_" in name}
        parameters = list(prefix.parameters())
        grads = torch.autograd.grad(value, [*trained.values(), *parameters])
    return value, dict(zip(trained, grads, strict=False)), list(grads[len(trained) :])


@pytest.mark.parametrize("trained", ["both", "prefix", "lora"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("first", ["prefix", "lora"])
def test_together_and_apart(first: str, projected: bool, targets: Any, trained: str) -> None:
    model, prefix = both(first, projected, targets)
    want, of_lora, of_prefix = wanted(prefix, targets)
    lora_parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert lora_parameters.keys() == of_lora.keys()
    for p in prefix.parameters():
        p.requires_grad_(trained != "lora")
    for p in lora_parameters.values():
        p.requires_grad_(trained != "prefix")
    got = loss(model)
    torch.testing.assert_close(got, want)
    got.backward()
    for name, p in lora_parameters.items():
        assert (p.grad is None) == (trained == "prefix"), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, of_lora[name])
            assert p.grad.abs().max() > 0
    for p, expected in zip(prefix.parameters(), of_prefix, strict=True):
        assert (p.grad is None) == (trained == "lora")
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected)
            assert p.grad.abs().max() > 0
    others = [p for n, p in model.named_parameters() if "lora_" not in n and "fastprefix" not in n]
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    model, prefix = both("lora", projected=True, targets="all-linear")
    want, of_lora, of_prefix = wanted(prefix, "all-linear")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = loss(model)
    got.backward()
    torch.testing.assert_close(got, want)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(p.grad, of_lora[name])
    for p, expected in zip(prefix.parameters(), of_prefix, strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("first", ["prefix", "lora"])
@pytest.mark.parametrize("projected", [False, True])
def test_each_is_saved_and_loaded_alone(first: str, projected: bool, tmp_path: Path) -> None:
    model, _ = both(first, projected, "all-linear")
    model.float()
    ids, mask = batch()
    want = model(input_ids=ids, attention_mask=mask).logits
    fastprefix.save(model, tmp_path / "prefix")
    model.save_pretrained(tmp_path / "lora")
    names = peft.load_peft_weights(str(tmp_path / "lora"))
    assert names and not any("fastprefix" in name for name in names)

    prefix_first = ROWS["llama_gqa"].build()
    fastprefix.load(prefix_first, tmp_path / "prefix")
    prefix_first = peft.PeftModel.from_pretrained(prefix_first, str(tmp_path / "lora"))
    lora_first = peft.PeftModel.from_pretrained(ROWS["llama_gqa"].build(), str(tmp_path / "lora"))
    fastprefix.load(lora_first.get_base_model(), tmp_path / "prefix")
    for again in (prefix_first, lora_first):
        got = again.eval()(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        with again.disable_adapter():
            assert not torch.allclose(again(input_ids=ids, attention_mask=mask).logits, want, atol=1e-3)

    alone = ROWS["llama_gqa"].build()
    fastprefix.load(alone, tmp_path / "prefix")
    with model.disable_adapter():
        got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, alone(input_ids=ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-5)


def test_merging_lora_keeps_the_prefix() -> None:
    model, _ = both("lora", projected=True, targets="all-linear")
    want = loss(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(loss(merged), want)
    fastprefix.detach(merged)
    assert not torch.allclose(loss(merged), want)
