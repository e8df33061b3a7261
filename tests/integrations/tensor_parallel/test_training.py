"""Tensor parallelism (``tp_plan``) in two processes: what one process computes, trains, saves and loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix import LlamaAdapterConfig, PrefixConfig, PrefixMemoryConfig, PromptConfig, init
from tests.support import two_processes
from tests.support.tiny_models import tiny_model, tiny_qwen3

P, STEPS, LR = 3, 3, 2.0
MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_model, "qwen3": tiny_qwen3}
KINDS_OF = {"llama": None, "qwen3": ("direct", "projected", "prompt")}  # None: all


def configs() -> dict[str, Any]:
    start = init.normal(0.6)
    return {
        "direct": PrefixConfig(P, init=start, num_frozen_tokens=1),
        "some layers": PrefixConfig(P, init=start, layers=[1], position_offset="none"),
        "of a text": PrefixConfig(init=init.token_ids([5, 6, 7])),
        "projected": PrefixConfig(P, init=start, prefix_projection=True),
        "biased": PrefixConfig(P, init=start, prefix_bias=True),
        "gated": PrefixConfig(P, init=start, gate="tanh"),
        "projected and gated": PrefixConfig(P, init=start, prefix_projection=True, gate="scalar"),
        "memory": PrefixMemoryConfig(),
        "adapter": LlamaAdapterConfig(P),
        "prompt": PromptConfig(P, init=start),
        "encoded prompt": PromptConfig(P, encoder="mlp"),
    }


def kinds(name: str) -> list[str]:
    """The kinds of prefixes that are tried in a model."""
    return list(KINDS_OF[name] or configs())


def batch() -> Tensor:
    return torch.randint(3, 32, (4, 9), generator=torch.Generator().manual_seed(5))


def whole(x: Any) -> Tensor:
    found: Tensor = (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
    return found


def parallel(folder: Path, plan: Any = "auto", auto: str = "AutoModelForCausalLM") -> Any:
    import transformers
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=two_processes.WORLD, tp_plan=plan)
    return getattr(transformers, auto).from_pretrained(folder, distributed_config=config).eval()


def train(model: Any, prefix: Any, clip: float = 0.05) -> dict[str, Any]:
    """Losses, gradients' norms, the first step's gradients and the numbers at the end, whole."""
    trained = list(prefix.parameters())
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=0.9)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(input_ids=batch(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch()[:, 1:].flatten())
        loss.backward()
        if step == 0:
            found["grads"] = {name: whole(p.grad) for name, p in prefix.named_parameters()}
        found["norms"].append(whole(torch.nn.utils.clip_grad_norm_(trained, clip)).item())
        optimizer.step()
        found["losses"].append(loss.item())
    return {**found, "numbers": {name: whole(x) for name, x in prefix.state_dict().items()}, **outputs(model)}


def outputs(model: Any) -> dict[str, Tensor]:
    mask = torch.ones_like(batch())
    mask[1, :4] = 0
    tokens = model.generate(batch(), attention_mask=mask, max_new_tokens=5, do_sample=False)
    return {"logits": model(batch()).logits.detach(), "padded": model(batch(), mask).logits.detach(), "tokens": tokens}


def assert_same(got: dict[str, Any], want: dict[str, Any], what: str) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        if isinstance(x, dict):
            assert_same(got[name], x, f"{what}: {name}")
        elif name == "tokens":
            assert torch.equal(got[name], x), what
        else:
            x, y = torch.as_tensor(x), torch.as_tensor(got[name])
            torch.testing.assert_close(y, x, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{what}: {n}: {m}")


def attached(model: Any, kind: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return fastprefix.attach(model, configs()[kind])


def trained_and_saved(rank: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Every kind of prefix: trained and saved here; and one that a single process saved, loaded here."""
    found: dict[str, Any] = {}
    for name in names:
        model = parallel(folder / name)
        for kind in kinds(name):
            prefix = attached(model, kind, 1 + rank)  # the first process's numbers count
            got = train(model, prefix)
            fastprefix.save(model, folder / f"{name} {kind} of two")
            assert (folder / f"{name} {kind} of two" / "adapter_config.json").exists()  # in every process
            fastprefix.detach(model)
            loaded = fastprefix.load(model, folder / f"{name} {kind} of one")
            state = {n: whole(x) for n, x in loaded.state_dict().items()}
            found[f"{name} {kind}"] = {"trained": got, "loaded": {"numbers": state, **outputs(model)}}
            fastprefix.detach(model)
        found[f"{name} bare"] = outputs(model)
    return found


@pytest.mark.slow
def test_two_processes_train_save_and_load_what_one_does(tmp_path: Path) -> None:
    want: dict[str, Any] = {}
    for name, make in MODELS.items():
        model = make()
        model.save_pretrained(tmp_path / name)
        for kind in kinds(name):
            want[f"{name} {kind}"] = train(model, attached(model, kind, 1))
            fastprefix.save(model, tmp_path / f"{name} {kind} of one")
            fastprefix.detach(model)
        want[f"{name} bare"] = outputs(model)
    results = two_processes.run(trained_and_saved, tmp_path, tmp_path, list(MODELS), timeout=400.0)
    for name, make in MODELS.items():
        model = make()
        for each in results:
            assert_same(each[f"{name} bare"], want[f"{name} bare"], f"{name} bare")
            for kind in kinds(name):
                key = f"{name} {kind}"
                assert_same(each[key]["trained"], want[key], key)
                loaded = {k: x for k, x in want[key].items() if k not in ("losses", "norms", "grads")}
                assert_same(each[key]["loaded"], loaded, f"{key}, saved by one process")
        for kind in kinds(name):
            fastprefix.load(model, tmp_path / f"{name} {kind} of two")
            for what, x in outputs(model).items():
                torch.testing.assert_close(x, want[f"{name} {kind}"][what], rtol=1e-4, atol=2e-5)
            fastprefix.detach(model)
