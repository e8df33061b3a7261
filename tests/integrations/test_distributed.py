"""DDP and FSDP2 in two processes: the losses and gradients of one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fastprefix
from fastprefix import PrefixConfig, init
from tests.support import two_processes
from tests.support.tiny_models import tiny_model

P, STEPS, LR = 3, 3, 0.05
KINDS: dict[str, dict[str, Any]] = {"direct": {"num_frozen_tokens": 1}, "projected": {"prefix_projection": True}}


def attached(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = tiny_model()
    if options.pop("prompt", False):
        return model, fastprefix.attach(model, fastprefix.PromptConfig(P))
    return model, fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6), **options))


def batch() -> Tensor:
    return torch.randint(3, 32, (4, 9), generator=torch.Generator().manual_seed(5))


def loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model: Any, prefix: Any, ids: Tensor, steps: int = STEPS, optimizer: Any = None) -> dict[str, Any]:
    """Losses, the first step's gradients and the numbers at the end, whole."""
    optimizer = optimizer or torch.optim.AdamW(prefix.parameters(), lr=LR)
    losses, grads = [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, ids)
        value.backward()
        grads = grads or {name: whole(p.grad).clone() for name, p in prefix.named_parameters()}
        optimizer.step()
        losses.append(value.item())
    return {"losses": losses, "grads": grads, "numbers": numbers(prefix)}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()


def numbers(prefix: Any) -> dict[str, Tensor]:
    return {name: whole(x).clone() for name, x in prefix.state_dict().items()}


def mean_losses(results: list[dict[str, Any]]) -> list[float]:
    return [sum(each) / len(each) for each in zip(*(r["losses"] for r in results), strict=True)]


def assert_alone(results: list[dict[str, Any]], want: dict[str, Any]) -> None:
    """Every process got what one process gets of the whole batch."""
    assert mean_losses(results) == pytest.approx(want["losses"], abs=1e-5)
    for result in results:
        for what in ("grads", "numbers"):
            assert result[what].keys() == want[what].keys()
            for name, x in want[what].items():
                torch.testing.assert_close(result[what][name], x, rtol=1e-3, atol=1e-4)


def ddp(rank: int) -> dict[str, Any]:
    from accelerate import Accelerator

    found = {}
    for kind, options in KINDS.items():
        model, prefix = attached(**options)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(prefix.parameters(), lr=LR))
        assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
        found[kind] = train(model, prefix, batch().chunk(2)[rank], optimizer=optimizer)
    return found


@pytest.mark.slow
def test_ddp(tmp_path: Path) -> None:
    results = two_processes.run(ddp, tmp_path)
    for kind, options in KINDS.items():
        assert_alone([each[kind] for each in results], train(*attached(**options), batch()))


def sharded(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (two_processes.WORLD,)), **options)
    return fully_shard(model, mesh=init_device_mesh("cpu", (two_processes.WORLD,)), **options)


def sharded_training(rank: int, kind: str, reentrant: bool | None = None, **options: Any) -> dict[str, Any]:
    model, prefix = attached(**KINDS[kind])
    sharded(model, **options)
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in prefix.parameters())
    if reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return train(model, prefix, batch().chunk(2)[rank])


def resumed(rank: int, kind: str, folder: Path) -> dict[str, Any]:
    """A step, a sharded checkpoint of prefix and optimizer, the rest in a model that was made anew; and the adapter."""
    ids, trained = batch().chunk(2)[rank], StateDictOptions(ignore_frozen_params=True)
    model, prefix = attached(**KINDS[kind])
    optimizer = torch.optim.AdamW(sharded(model) and prefix.parameters(), lr=LR)
    first = train(model, prefix, ids, 1, optimizer)
    states = get_state_dict(model, optimizer, options=trained)
    assert states[0] and all("fastprefix" in name for name in states[0] if "weight" not in name)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder / "checkpoint")

    model, prefix = attached(**KINDS[kind])
    with torch.no_grad():
        for p in prefix.parameters():
            p.zero_()
    optimizer = torch.optim.AdamW(sharded(model) and prefix.parameters(), lr=LR)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=trained), strict=True))
    dcp.load(states, checkpoint_id=folder / "checkpoint")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=StateDictOptions(strict=False, ignore_frozen_params=True),
    )
    rest = train(model, prefix, ids, STEPS - 1, optimizer)
    fastprefix.save(model, folder / "adapter")
    assert (folder / "adapter" / "adapter_config.json").exists()  # in every process: it waits for the one that writes
    assert all(isinstance(p, DTensor) for p in prefix.parameters())
    return {**rest, "grads": first["grads"], "losses": first["losses"] + rest["losses"]}


def refusals(rank: int) -> dict[str, str]:
    ids, found = batch(), {}

    def refused(what: str, call: Callable[[], Any]) -> None:
        with pytest.raises(ValueError) as raised:
            call()
        found[what] = str(raised.value)

    refused("attach", lambda: fastprefix.attach(sharded(tiny_model()), PrefixConfig(P)))
    model, _ = attached()
    want = model(ids).logits
    sharded(model)
    refused("bake", lambda: fastprefix.bake(model))
    with fastprefix.prefix_batch(model, ["default", None]):
        refused("mixed", lambda: model(ids))
    with fastprefix.shared_prompt(model, [4, 5]):
        refused("shared", lambda: model(ids))
    prompted, _ = attached(prompt=True)
    refused("prompt", lambda: sharded(prompted)(ids))
    torch.testing.assert_close(model(ids).logits, want)
    return found


def mixed(rank: int) -> list[Tensor]:
    """A batch with and without an MLP's prefix, whole and sharded: the MLP lies with what is gathered first."""
    model, _ = attached(prefix_projection=True)
    with fastprefix.prefix_batch(model, ["default", None]):
        return [model(batch()).logits.detach(), sharded(model)(batch()).logits.detach()]


def generated(rank: int) -> list[Tensor]:
    model, _ = attached(prefix_projection=True)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(batch(), **options)
    return [want, sharded(model).generate(batch(), synced_gpus=True, **options)]


def fsdp(rank: int, folder: Path) -> dict[str, Any]:
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found: dict[str, Any] = {"refusals": refusals(rank), "generated": generated(rank), "mixed": mixed(rank)}
    for kind in KINDS:
        found[f"plain-{kind}"] = sharded_training(rank, kind)
        found[f"resumed-{kind}"] = resumed(rank, kind, folder / kind)
        found[f"bf16-{kind}"] = sharded_training(rank, kind, mp_policy=bf16)
        for reentrant in (False, True):
            found[f"recomputed-{kind}-{reentrant}"] = sharded_training(rank, kind, reentrant)
    return found


@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    results = two_processes.run(fsdp, tmp_path, tmp_path)
    for kind, options in KINDS.items():
        want = train(*attached(**options), batch())
        for run in ("plain", "resumed", "recomputed"):
            for name in (name for name in results[0] if name.startswith(f"{run}-{kind}")):
                assert_alone([each[name] for each in results], want)
        losses = mean_losses([each[f"bf16-{kind}"] for each in results])
        assert losses == pytest.approx(want["losses"], rel=2e-2) and losses[-1] < losses[0]
        assert all(x.dtype == torch.float32 for x in results[0][f"bf16-{kind}"]["grads"].values())
        loaded = fastprefix.load(tiny_model(), tmp_path / kind / "adapter")
        for name, x in results[0][f"resumed-{kind}"]["numbers"].items():
            torch.testing.assert_close(loaded.state_dict()[name], x)
    for each in results:
        assert torch.equal(*each["generated"])
        torch.testing.assert_close(*each["mixed"])
        said = each["refusals"]
        for what in ("attach", "bake"):
            assert "LlamaForCausalLM with sharded parameters (" in said[what]
        for what in ("mixed", "shared", "prompt"):
            assert said[what].startswith("model: got one with sharded parameters"), (what, said[what])


def sharded_heads(rank: int, folder: Path) -> dict[str, Any]:
    """Two prefixes with a head each: one is trained while sharded, both are saved."""
    model, prefix = attached(modules_to_save=["lm_head"])
    fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6), modules_to_save=["lm_head"]), "other")
    fastprefix.set_prefix(model, "default")
    sharded(model)
    found = train(model, prefix, batch().chunk(2)[rank])
    for name in ("default", "other"):
        fastprefix.set_prefix(model, name)
        found[name] = model(input_ids=batch()).logits.detach()
        fastprefix.save(model, folder / name, name)
    return found


@pytest.mark.slow
def test_fsdp2_of_heads(tmp_path: Path) -> None:
    results = two_processes.run(sharded_heads, tmp_path, tmp_path)
    model, prefix = attached(modules_to_save=["lm_head"])
    assert_alone(results, train(model, prefix, batch()))
    assert "modules_to_save.lm_head.weight" in results[0]["numbers"]
    for name in ("default", "other"):
        fresh = tiny_model()
        fastprefix.load(fresh, tmp_path / name)
        for result in results:
            torch.testing.assert_close(fresh(input_ids=batch()).logits, result[name], rtol=1e-5, atol=1e-5)
