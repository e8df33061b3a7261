"""Models whose weights accelerate keeps elsewhere: the same values as of a model with its weights in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

P, VOCAB = 3, 40
MAP = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}


def model(name: str = "LlamaForCausalLM", **options: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
        pad_token_id=0,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, name)(config).double().eval()


def on_cpu(of: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(of, execution_device="cpu")


def on_disk(of: Any, folder: Path) -> Any:
    return accelerate.disk_offload(of, str(folder / "weights"), execution_device="cpu")


def by_map(of: Any, folder: Path) -> Any:
    where = {**MAP, "model.rotary_emb": "cpu", "lm_head" if hasattr(of, "lm_head") else "score": "disk"}
    return accelerate.dispatch_model(of, where, main_device="cpu", offload_dir=str(folder / "weights"))


WAYS: dict[str, Callable[[Any, Path], Any]] = {"cpu": on_cpu, "disk": on_disk, "map": by_map}
CONFIGS: dict[str, Any] = {
    "prefix": PrefixConfig(P, init=init.token_ids([5, 6, 7])),
    "mlp": PrefixConfig(P, prefix_projection=True, init=init.token_ids([5, 6, 7]), num_frozen_tokens=0),
    "frozen": PrefixConfig(P, num_frozen_tokens=1),
    "prompt": PromptConfig(P, init=init.token_ids([5, 6, 7])),
    "noise": PromptConfig(P, init=init.normal(0.5)),
    "encoded": PromptConfig(P, encoder="lstm", encoder_hidden_size=6),
}


def ids() -> Tensor:
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def steps(of: Any, prefix: Any, n: int = 3) -> list[Tensor]:
    """Losses, and what was trained."""
    optimizer = torch.optim.Adam(prefix.parameters(), lr=0.05)
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = of(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach().clone() for p in prefix.parameters())]


def generated(of: Any) -> Any:
    return of.generate(ids(), max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()


def attached(of: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return fastprefix.attach(of, copy.deepcopy(config))


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_attach_to_offloaded_weights(config: Any, way: str, tmp_path: Path) -> None:
    plain, away = model(), WAYS[way](model(), tmp_path)
    before = {name: p.requires_grad for name, p in away.named_parameters()}
    assert any(p.is_meta for p in away.parameters())
    mine, theirs = attached(plain, config), attached(away, config)
    assert_equal(steps(away, theirs), steps(plain, mine))
    assert not any(p.requires_grad for p in away.parameters() if p.is_meta)
    assert generated(away) == generated(plain)
    fastprefix.save(away, tmp_path / "saved")
    again = model()
    fastprefix.load(again, tmp_path / "saved")
    with torch.no_grad():
        want = again(input_ids=ids()).logits
        torch.testing.assert_close(away(input_ids=ids()).logits, want, rtol=0, atol=1e-12)
        fastprefix.load(away, tmp_path / "saved", "again")
        torch.testing.assert_close(away(input_ids=ids()).logits, want, rtol=0, atol=1e-12)
        with fastprefix.shared_prompt(away, ids()[0, :4]):
            fastprefix.set_prefix(away, None)
        fastprefix.detach(away)
        assert torch.equal(away(input_ids=ids()).logits, model()(input_ids=ids()).logits)
    assert {name: p.requires_grad for name, p in away.named_parameters()} == before


@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_offloading_after_attach(config: Any, way: str, tmp_path: Path) -> None:
    """What is attached comes back as the parameters that an optimizer holds."""
    plain, away = model(), model()
    mine, theirs = attached(plain, config), attached(away, config)
    steps(plain, mine), steps(away, theirs)
    held = list(theirs.parameters())
    away = WAYS[way](away, tmp_path)
    assert any(p.is_meta for p in theirs.parameters())
    fastprefix.save(away, tmp_path / "saved")
    fastprefix.save(plain, tmp_path / "plain")
    name = "adapter_model.safetensors"
    assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert all(a is b for a, b in zip(theirs.parameters(), held, strict=True))
    assert_equal(steps(away, theirs), steps(plain, mine))
    assert generated(away) == generated(plain)


def test_a_forward_brings_back_what_was_taken_along(tmp_path: Path) -> None:
    plain, away = model(), model()
    mine, theirs = attached(plain, CONFIGS["prefix"]), attached(away, CONFIGS["prefix"])
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    away = on_cpu(away, tmp_path)
    away(input_ids=ids(), labels=ids()).loss.backward()
    plain(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    torch.optim.SGD(mine.parameters(), lr=0.1).step()
    assert_equal(list(theirs.parameters()), list(mine.parameters()))


@pytest.mark.parametrize("after", [False, True], ids=["attached to it", "offloaded then"])
@pytest.mark.parametrize("way", WAYS)
def test_heads(way: str, after: bool, tmp_path: Path) -> None:
    def trained(of: Any) -> Any:
        optimizer = torch.optim.Adam([p for p in of.parameters() if p.requires_grad], lr=0.1)
        of(input_ids=ids(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        return of(input_ids=ids()).logits.detach()

    name, config = "LlamaForSequenceClassification", PrefixConfig(P, modules_to_save=["score"])
    plain, away = model(name), model(name)
    if after and way == "map":
        pytest.skip("a map of the model's modules has no place for what is attached")
    if not after:
        away = WAYS[way](away, tmp_path)
        assert away.score.weight.is_meta
    attached(plain, config), attached(away, config)
    want = trained(plain)
    if after:
        away = WAYS[way](away, tmp_path)
        assert away.score.weight.is_meta
        fastprefix.set_prefix(away, "default")
    torch.testing.assert_close(trained(away), want, rtol=0, atol=1e-9)
    fastprefix.save(away, tmp_path / "saved")
    fresh = model(name)
    fastprefix.load(fresh, tmp_path / "saved")
    torch.testing.assert_close(fresh(input_ids=ids()).logits, want, rtol=0, atol=1e-9)
    fastprefix.detach(away)
    torch.testing.assert_close(away(input_ids=ids()).logits, model(name)(input_ids=ids()).logits, rtol=0, atol=0)
    fastprefix.attach(away, PrefixConfig(P))  # the file of a classifier has its head, wherever it lies
    fastprefix.save(away, tmp_path / "frozen")
    fastprefix.load(fresh, tmp_path / "frozen", "frozen")
    assert torch.equal(fresh.score.weight, model(name).score.weight)


def peft_model(kind: str, base: Any) -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=P))


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("order", ["base, patch", "patch, base", "whole, patch", "patch, whole", "map, patch"])
def test_patch(kind: str, order: str, tmp_path: Path) -> None:
    plain = fastprefix.patch(peft_model(kind, model()))
    if order == "map, patch":
        where = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk", "": "cpu"}
        base = accelerate.dispatch_model(model(), where, main_device="cpu", offload_dir=str(tmp_path / "weights"))
        away = fastprefix.patch(peft_model(kind, base))
    else:
        away = peft_model(kind, model())
        for what in order.split(", "):
            if what == "patch":
                fastprefix.patch(away)
            else:
                on_cpu(away.get_base_model() if what == "base" else away, tmp_path)
    if order == "patch, whole":
        held = [p for p in away.prompt_encoder.parameters() if p.is_meta]
        with pytest.raises(ValueError, match="an optimizer, or a list, of parameters from then"):
            away(input_ids=ids())
        assert held and generated_by(away) == generated_by(plain)
        del held
    assert any(p.is_meta for p in away.get_base_model().parameters())
    assert_equal(steps(away, away.prompt_encoder), steps(plain, plain.prompt_encoder))
    assert generated_by(away) == generated_by(plain)


def generated_by(peft_model: Any) -> Any:
    with torch.no_grad():
        return peft_model.generate(input_ids=ids(), max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        nowhere = model()
    with pytest.raises(ValueError, match=r"meta device \(model.embed_tokens.weight\), expected .* hook of accelerate"):
        fastprefix.attach(nowhere, PrefixConfig(P))
    whole = accelerate.cpu_offload(model(), "cpu", preload_module_classes=["LlamaAttention"])
    with pytest.raises(ValueError, match=r"offloads model.layers.0.self_attn as a whole"):
        fastprefix.attach(whole, PrefixConfig(P))
    assert not hasattr(whole, "_fastprefix")
    norms = accelerate.cpu_offload(model(), "cpu", preload_module_classes=["LlamaMLP"])
    attached(norms, CONFIGS["prefix"])
    plain = model()
    attached(plain, CONFIGS["prefix"])
    assert torch.equal(norms(input_ids=ids()).logits, plain(input_ids=ids()).logits)
    later = model()
    fastprefix.attach(later, PrefixConfig(P))
    accelerate.cpu_offload(later, "cpu", preload_module_classes=["LlamaAttention"])
    for call in (lambda: later(input_ids=ids()), lambda: fastprefix.save(later, tmp_path)):
        with pytest.raises(ValueError, match="a prefix whose k was offloaded with the layer around it"):
            call()
    gone = model()
    prefix = fastprefix.attach(gone, PrefixConfig(P))
    accelerate.cpu_offload(gone, "cpu")
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.1)  # of what an offloading hook makes anew
    for _ in range(2):
        with pytest.raises(ValueError, match="and an optimizer, or a list, of parameters from then"):
            gone(input_ids=ids())
    with torch.no_grad():
        gone(input_ids=ids())
    del optimizer
    gone(input_ids=ids()).logits.sum().backward()
    assert all(p.grad is not None for p in prefix.parameters())
    base = accelerate.cpu_offload(model(), "cpu")
    with pytest.raises(ValueError, match="adapter 'default' on the meta device, where PEFT puts it"):
        fastprefix.patch(peft_model("PrefixTuningConfig", base))
