"""TRL's SFTTrainer with a soft prompt, attached or patched: PEFT's own losses, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig, SFTTrainer

import fastprefix
from fastprefix import PromptConfig, init
from tests.integrations.test_trl import OPTIONS, folder, loaded, logged, sft_dataset  # noqa: F401  a fixture
from tests.support.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.slow

P = 4


def start() -> torch.Tensor:
    return torch.randn(P, 32, generator=torch.Generator().manual_seed(3))


def attached(folder: Path) -> tuple[Any, torch.nn.Parameter]:  # noqa: F811
    model = loaded(folder)
    prompt = fastprefix.attach(model, PromptConfig(P, init=init.normal()))
    with torch.no_grad():
        prompt.embedding.copy_(start())
    return model, prompt.embedding


def of_peft(folder: Path, patched: bool) -> tuple[Any, torch.nn.Parameter]:  # noqa: F811
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(loaded(folder), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    weight = model.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.copy_(start())
    return (fastprefix.patch(model) if patched else model), weight


def trained(model: Any, folder: Path, **options: Any) -> list[float]:  # noqa: F811
    args = SFTConfig(str(folder.parent / "out"), **OPTIONS, max_length=None, **options)
    trainer = SFTTrainer(model=model, args=args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer())
    trainer.train()
    return logged(trainer)


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}], ids=["nll", "dft"])
@pytest.mark.parametrize("way", ["attached", "patched"])
def test_the_fused_loss_is_peft_s(folder: Path, way: str, options: dict[str, Any]) -> None:  # noqa: F811
    """Its outputs have no logits, and fields of every token."""
    bare, weight = of_peft(folder, patched=False)
    want = trained(bare, folder, **options)
    model, trained_weight = attached(folder) if way == "attached" else of_peft(folder, patched=True)
    got = trained(model, folder, **options)
    assert len(got) == OPTIONS["max_steps"] and got[-1] != got[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trained_weight, weight, rtol=1e-2, atol=1e-3)


def test_fields_of_every_token_are_the_rows_own(folder: Path) -> None:  # noqa: F811
    from trl.trainer.utils import add_fused_lm_head

    model, prompt = attached(folder)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.arange(3, 11)[None]
    got = model(input_ids=ids, labels=ids, fused_lm_head=True)
    bare = loaded(folder)
    whole = torch.cat([prompt[None], bare.get_input_embeddings()(ids)], 1)
    logits = bare(inputs_embeds=whole).logits[:, P - 1 : -1]
    want = torch.log_softmax(logits, -1).gather(2, ids[..., None])[..., 0]
    assert got.log_probs.shape == got.entropy.shape == ids.shape  # the first token is predicted too
    torch.testing.assert_close(got.log_probs, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, -want.mean(), rtol=1e-4, atol=1e-5)


def test_a_loss_outside_of_the_model_meets_the_rows_own_logits(folder: Path) -> None:  # noqa: F811
    """Label smoothing takes the labels out of the forward. PEFT's ``P + S`` logits do not fit them, patched or not."""
    from transformers.trainer_pt_utils import LabelSmoother

    smoother, ids = LabelSmoother(0.1), torch.arange(3, 11)[None]
    model, prompt = attached(folder)
    bare = loaded(folder)
    whole = torch.cat([prompt[None], bare.get_input_embeddings()(ids)], 1)
    want = smoother({"logits": bare(inputs_embeds=whole).logits[:, P:]}, ids, shift_labels=True)
    torch.testing.assert_close(smoother(model(input_ids=ids), ids, shift_labels=True), want, rtol=1e-4, atol=1e-5)
    for patched in (False, True):
        theirs, _ = of_peft(folder, patched)
        with pytest.raises(RuntimeError, match="must match the size"):
            smoother(theirs(input_ids=ids), ids, shift_labels=True)
