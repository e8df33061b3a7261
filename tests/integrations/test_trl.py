"""TRL's trainers on an attached model: their losses and what they train are those of a loop written by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fastprefix
from fastprefix import PrefixConfig, init
from tests.integrations.trl_trainers import QUIET, STEPS
from tests.support.concat_oracle import concatenating
from tests.support.tiny_models import ROWS, save_tiny, tiny_tokenizer

pytestmark = pytest.mark.slow

P, LR, BETA = 4, 0.05, 0.3
OPTIONS = {**QUIET, "per_device_train_batch_size": len(ROWS), "learning_rate": LR, "max_grad_norm": 0.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def attached(folder: Path, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = loaded(folder)
    return model, fastprefix.attach(model, PrefixConfig(P, init=init.normal(0.6), **options))


def encoded(prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids as TRL makes them of a pair, and how many are the prompt's."""
    tokenizer = tiny_tokenizer()
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    return whole, [0] * len(before) + [1] * (len(whole) - len(before))


def padded(pairs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and which tokens are a completion's: all ``[B, S]``, padded on the right."""
    size = max(len(ids) for ids, _ in pairs)
    ids, mask, completion = (torch.zeros(len(pairs), size, dtype=torch.long) for _ in range(3))
    for i, (tokens, is_completion) in enumerate(pairs):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        completion[i, : len(tokens)] = torch.tensor(is_completion)
    return ids, mask, completion


def token_logps(model: Any, ids: Tensor, mask: Tensor, completion: Tensor, **inputs: Tensor) -> Tensor:
    """``[B, S - 1]`` log-probabilities of the completions' tokens, 0 elsewhere."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits[:, :-1]
    found = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
    return found * completion[:, 1:]


def concatenated(folder: Path, prefix: Any) -> Iterator[Any]:
    """The bare model with the prefix in front of its keys and values, and the positions behind it."""
    bare = loaded(folder)
    names = [name for name, m in bare.named_modules() if name.endswith("self_attn")]
    return concatenating(bare, dict(zip(names, prefix.key_values(), strict=True)))


def sft_dataset() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


def sft(model: Any, folder: Path, cls: Any = SFTTrainer, **options: Any) -> Any:
    args = SFTConfig(str(folder.parent / "out"), **OPTIONS, max_length=None, **options)
    return cls(model=model, args=args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer())


def dpo_rows() -> list[dict[str, str]]:
    wrong = [ROWS[(i + 1) % len(ROWS)]["completion"] for i in range(len(ROWS))]
    return [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": w} for r, w in zip(ROWS, wrong, strict=True)]


def dpo(model: Any, folder: Path, ref_model: Any = None) -> Any:
    args = DPOConfig(str(folder.parent / "out"), **OPTIONS, max_length=None, beta=BETA)
    rows = datasets.Dataset.from_list(dpo_rows())
    return DPOTrainer(
        model=model, ref_model=ref_model, args=args, train_dataset=rows, processing_class=tiny_tokenizer()
    )


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(prefix: Any, loss: Any) -> list[float]:
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("oracle", ["attached", "concatenated"])
def test_sft(folder: Path, projected: bool, oracle: str) -> None:
    model, prefix = attached(folder, prefix_projection=projected)
    trainer = sft(model, folder)  # with TRL's defaults: gradient checkpointing, the loss on the completion
    trainer.train()
    twin, twin_prefix = attached(folder, prefix_projection=projected)
    ids, mask, completion = padded([encoded(**row) for row in ROWS])
    positions = (torch.arange(ids.shape[1]) + P).expand_as(ids)

    def loss() -> Tensor:
        if oracle == "attached":
            found = token_logps(twin, ids, mask, completion)
        else:
            with concatenated(folder, twin_prefix) as bare:
                found = token_logps(bare, ids, mask, completion, position_ids=positions)
        return -found.sum() / completion[:, 1:].sum()

    want = by_hand(twin_prefix, loss)
    assert logged(trainer) == pytest.approx(want, rel=2e-3)
    assert want[-1] < want[0] - 0.1
    assert_same(prefix, twin_prefix)
    before = loaded(folder).state_dict()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items() if name in before)


@pytest.mark.parametrize("packed", [{"packing": True, "max_length": 64}, {"padding_free": True}], ids=str)
def test_sft_without_padding(folder: Path, packed: dict[str, Any]) -> None:
    """Rows are put behind one another: a document must see the prefix and not the one before it."""
    model, prefix = attached(folder)
    options = {**OPTIONS, "per_device_train_batch_size": len(ROWS), "max_length": None, **packed}
    args = SFTConfig(str(folder.parent / "out"), **options)
    trainer = SFTTrainer(model=model, args=args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer())
    trainer.train()
    twin, twin_prefix = attached(folder)
    ids, mask, completion = padded([encoded(**row) for row in ROWS])
    want = by_hand(twin_prefix, lambda: -token_logps(twin, ids, mask, completion).sum() / completion[:, 1:].sum())
    assert logged(trainer) == pytest.approx(want, rel=2e-3)
    assert_same(prefix, twin_prefix)


@pytest.mark.parametrize("reference", ["none", "initial"])
def test_dpo(folder: Path, reference: str) -> None:
    """Without a reference TRL reads the model's folder again: the bare model. A copy is the prefix it started with."""
    model, prefix = attached(folder)
    frozen = None if reference == "none" else copy.deepcopy(model).requires_grad_(False)
    trainer = dpo(model, folder, frozen)
    if reference == "none":
        assert trainer.ref_model is not model and not any(
            "fastprefix" in n for n, _ in trainer.ref_model.named_modules()
        )
    trainer.train()
    twin, twin_prefix = attached(folder)
    other = loaded(folder) if reference == "none" else attached(folder)[0]
    chosen = [encoded(row["prompt"], row["chosen"]) for row in dpo_rows()]
    rejected = [encoded(row["prompt"], row["rejected"]) for row in dpo_rows()]
    batch = padded(chosen + rejected)
    with torch.no_grad():
        of_reference = token_logps(other, *batch).sum(1)

    def loss() -> Tensor:
        ratios = token_logps(twin, *batch).sum(1) - of_reference
        good, bad = ratios.chunk(2)
        return -torch.nn.functional.logsigmoid(BETA * (good - bad)).mean()

    want = by_hand(twin_prefix, loss)
    assert logged(trainer) == pytest.approx(want, rel=2e-3)
    assert_same(prefix, twin_prefix)
    if reference == "initial":  # a policy that starts at its reference
        assert want[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    else:
        assert abs(want[0] - torch.tensor(2.0).log().item()) > 1e-3
