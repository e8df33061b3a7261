"""Wrappers and transforms around a model: looked through where the meaning is clear, and elsewhere named."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.integrations.test_offload import P, ids, model, peft_model

transformers = pytest.importorskip("transformers")

CONFIGS: dict[str, Any] = {
    "prefix": PrefixConfig(P, init=init.normal(0.5)),
    "mlp": PrefixConfig(P, prefix_projection=True),
    "prompt": PromptConfig(P),
    "encoded": PromptConfig(P, encoder="mlp", encoder_hidden_size=6),  # torch.vmap has no rule for an LSTM
}


def attached(name: str = "prefix") -> tuple[Any, Any]:
    made = model()
    torch.manual_seed(2)
    return made, fastprefix.attach(made, copy.deepcopy(CONFIGS[name]))


def compiled(of: Any) -> Any:
    return torch.compile(of, backend="eager")


WRAPPERS = {
    "DataParallel": DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "compiled": compiled,
    "compiled DataParallel": lambda of: compiled(DataParallel(of)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", WRAPPERS)
def test_functions_look_through_wrappers(name: str, tmp_path: Path) -> None:
    made, _ = attached()
    fastprefix.attach(made, PrefixConfig(P, init=init.normal(0.5)), "other")
    fastprefix.set_prefix(made, "default")
    with torch.no_grad():
        want = made(input_ids=ids()).logits
        fastprefix.set_prefix(made, "other")
        other = made(input_ids=ids()).logits
    wrapped = WRAPPERS[name](made)
    fastprefix.set_prefix(wrapped, "default")
    fastprefix.save(wrapped, tmp_path / "saved")
    fresh = model()
    fastprefix.load(fresh, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids()).logits, want)
        assert torch.equal(wrapped(input_ids=ids()).logits, want)
        with fastprefix.prefix_batch(wrapped, ["other", "default"]):
            rows = wrapped(input_ids=ids()).logits
    torch.testing.assert_close(rows, torch.stack([other[0], want[1]]), rtol=0, atol=1e-12)
    assert "model.layers.1.self_attn: H=4" in fastprefix.explain(wrapped)
    fastprefix.register(wrapped, {"shelved": tmp_path / "saved"})
    adding = [
        lambda: fastprefix.attach(wrapped, PrefixConfig(P), "new"),
        lambda: fastprefix.load(wrapped, tmp_path / "saved", "again"),
        lambda: fastprefix.bake(wrapped),
    ]
    for call in adding:
        if name in ("DistributedDataParallel", "AveragedModel"):
            with pytest.raises(
                ValueError, match=f"got a {name} around it, expected the model itself, and {name} around"
            ):
                call()
        else:
            call()
    fastprefix.set_prefix(wrapped, None)
    with torch.no_grad():
        assert torch.equal(wrapped(input_ids=ids()).logits, model()(input_ids=ids()).logits)
    fastprefix.detach(wrapped)
    assert not hasattr(made if name != "AveragedModel" else wrapped.module, "_fastprefix")


def test_an_average_is_saved_and_used(tmp_path: Path) -> None:
    made, prefix = attached()
    average = AveragedModel(made)
    sums = [torch.zeros_like(p) for p in prefix.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for p, total in zip(prefix.parameters(), sums, strict=True):
                p.add_(torch.randn_like(p))
                total.add_(p / 3)
        average.update_parameters(made)
    fastprefix.save(average, tmp_path)
    saved = fastprefix.load(model(), tmp_path)
    for p, total in zip(saved.parameters(), sums, strict=True):
        torch.testing.assert_close(p, total, rtol=0, atol=1e-6)
    fresh = model()
    fastprefix.load(fresh, tmp_path)
    torch.testing.assert_close(average(input_ids=ids()).logits, fresh(input_ids=ids()).logits, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("process_group")
def test_what_cannot_be_looked_through_is_named(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Engine(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

    made, _ = attached()
    engine = Engine(made)
    with pytest.raises(ValueError, match=r"model: got Engine without a prefix, .*; a Engine holds one: model.module$"):
        fastprefix.save(engine, tmp_path)
    with pytest.raises(ValueError, match=r"expected a transformers PreTrainedModel; a Engine holds one: model.module$"):
        fastprefix.attach(engine, PrefixConfig(P))
    for original in (True, False):
        for p in made.parameters():
            p.requires_grad_(True)  # which it wants of all without use_orig_params
        sharded = FullyShardedDataParallel(
            copy.deepcopy(made).float(), device_id=torch.device("cpu"), use_orig_params=original
        )
        for of in (sharded, sharded.module):
            with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*expected a model sharded by fully_shard"):
                fastprefix.save(of, tmp_path)
    replica = model()
    fastprefix.attach(replica, PrefixConfig(P))
    with pytest.raises(
        ValueError, match="DataParallel's replica of LlamaForCausalLM, expected DistributedDataParallel"
    ):
        replica._replicate_for_data_parallel()(input_ids=ids())


def test_patch_looks_through_wrappers() -> None:
    want = fastprefix.patch(peft_model("PrefixTuningConfig", model()))(input_ids=ids()).logits
    wrapped = DataParallel(peft_model("PrefixTuningConfig", model()))
    assert fastprefix.patch(wrapped) is wrapped and hasattr(wrapped.module.get_base_model(), "_fastprefix")
    assert torch.equal(wrapped(input_ids=ids()).logits, want)
    assert fastprefix.unpatch(wrapped) is wrapped and not hasattr(wrapped.module.get_base_model(), "_fastprefix")
    with pytest.raises(ValueError, match="got a AveragedModel around it"):
        fastprefix.patch(AveragedModel(peft_model("PrefixTuningConfig", model())))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["whole", "wrapped", "layers"])
def test_attach_to_what_is_compiled_already(what: str) -> None:
    made, _ = attached()
    want = made(input_ids=ids()).logits
    later = model()
    runs = later
    if what == "whole":
        later.compile(backend="eager")
    elif what == "wrapped":
        runs = compiled(later)
    else:
        for layer in later.model.layers:
            layer.compile(backend="eager")
    runs(input_ids=ids())
    torch.manual_seed(2)
    fastprefix.attach(runs, copy.deepcopy(CONFIGS["prefix"]))
    torch.testing.assert_close(runs(input_ids=ids()).logits, want, rtol=0, atol=1e-12)
    fastprefix.explain(runs)
    fastprefix.detach(runs)
    assert torch.equal(runs(input_ids=ids()).logits, model()(input_ids=ids()).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_transforms_of_torch_func(name: str) -> None:
    made, _ = attached(name)
    parameters = {n: p for n, p in made.named_parameters() if p.requires_grad}
    given = {n: p.detach().clone() for n, p in parameters.items()}

    def loss(of: dict[str, Tensor], rows: Tensor) -> Tensor:
        return functional_call(made, of, (), {"input_ids": rows, "labels": rows, "use_cache": False}).loss

    def assert_equal(got: dict[str, Tensor], want: Any) -> None:
        for a, b in zip(got.values(), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)

    plain = made(input_ids=ids(), labels=ids()).loss
    want = torch.autograd.grad(plain, list(parameters.values()))
    assert all(x.abs().max() > 0 for x in want)
    shifted = {n: p + 0.1 for n, p in given.items()}
    assert_equal(grad(loss)(given, ids()), want)
    value, back = vjp(lambda of: loss(of, ids()), given)
    torch.testing.assert_close(value, plain, rtol=0, atol=1e-12)
    assert_equal(back(torch.ones_like(value))[0], want)
    with torch.no_grad():
        before = [p.clone() for p in parameters.values()]
        other = loss(shifted, ids())
        for p, x in zip(parameters.values(), shifted.values(), strict=True):
            p.copy_(x)
        torch.testing.assert_close(made(input_ids=ids(), labels=ids()).loss, other, rtol=0, atol=1e-12)
        for p, x in zip(parameters.values(), before, strict=True):
            p.copy_(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback of torch's warns of itself
        samples = vmap(grad(lambda of, row: loss(of, row[None])), (None, 0))(given, ids())
    for i in range(2):
        alone = torch.autograd.grad(loss(parameters, ids()[i : i + 1]), list(parameters.values()))
        assert_equal({n: x[i] for n, x in samples.items()}, alone)
    both = vmap(loss, (0, None))({n: torch.stack([given[n], shifted[n]]) for n in given}, ids())
    torch.testing.assert_close(both, torch.stack([plain, other]).detach(), rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="prefix_attention has no forward-mode derivative"):
        jvp(lambda of: loss(of, ids()), (given,), (given,))
    with pytest.raises(RuntimeError, match="prefix_attention has no second derivative"):
        grad(lambda of: sum(x.pow(2).sum() for x in grad(loss)(of, ids()).values()))(given)
    assert torch.equal(made(input_ids=ids(), labels=ids()).loss, plain)


def bert(**options: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
        **options,
    )
    torch.manual_seed(0)
    return transformers.BertLMHeadModel(config).double().eval()


def test_generating_with_a_bidirectional_model() -> None:
    two_ways = bert()
    torch.manual_seed(2)
    fastprefix.attach(two_ways, CONFIGS["prefix"])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(
        ValueError, match=r"past_key_values: got a cache of 7 tokens in a bidirectional model.*is_decoder"
    ):
        two_ways.generate(ids(), **options)
    want = ids()
    with torch.no_grad():
        for _ in range(3):
            want = torch.cat([want, two_ways(input_ids=want).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(two_ways.generate(ids(), use_cache=False, **options), want)
    causal = bert(is_decoder=True)
    fastprefix.attach(causal, CONFIGS["prefix"])
    assert torch.equal(causal.generate(ids(), **options), causal.generate(ids(), use_cache=False, **options))


def test_explain_names_the_layers_without_keys() -> None:
    config = transformers.MiniMaxConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )
    hybrid = transformers.MiniMaxForCausalLM(config).eval()
    fastprefix.attach(hybrid, PrefixConfig(P))
    text = fastprefix.explain(hybrid)
    assert "a hybrid, whose other layers have no keys to put a prefix before: linear_attention\n" in text
