"""``share_prompts`` of pairs, beside prefixes, dropout and other processes; and wrong calls of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import fastprefix
from tests.integrations.trl_trainers import OPTIONS, STEPS, Trainer, assert_same, dpo, grpo, kto, logged, lora, trained
from tests.model_zoo.architectures import ROWS as ARCHITECTURES
from tests.support import two_processes
from tests.support.tiny_models import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("options", [{}, {"peft_config": lora}, {"ld_alpha": 0.5}, {"loss_type": ["ipo"]}])
def test_pairs_share_their_prompt(options: dict[str, Any], tmp_path: Path) -> None:
    want, _ = trained(dpo, tmp_path, share=False, **options)
    got, sharing = trained(dpo, tmp_path, share=True, **options)
    assert_same(got, want)
    assert sharing.computed < 0.8 * sharing.given


def test_kto(tmp_path: Path) -> None:
    """All 8 rows are in one batch; those with which it estimates KL have another completion each, and share as well."""
    want, _ = trained(kto, tmp_path, share=False)
    got, sharing = trained(kto, tmp_path, share=True)
    assert_same(got, want)
    assert sharing.computed < sharing.given


def test_dropout_runs_as_in_trl_and_says_so_once(tmp_path: Path) -> None:
    def dropping() -> Any:
        return lora(lora_dropout=0.5)

    want, _ = trained(grpo, tmp_path, share=False, peft_config=dropping)
    with pytest.warns(
        UserWarning, match="prompts are not shared, and run as TRL runs them: dropout is active"
    ) as given:
        got, sharing = trained(grpo, tmp_path, share=True, peft_config=dropping)
    assert len([w for w in given if "fastprefix" in str(w.message)]) == 1
    assert_same(got, want, tolerance=0.0)
    (reason,) = sharing.not_shared
    assert "dropout" in reason
    assert sharing.not_shared[reason] == 2 * STEPS  # the policy and its reference


def test_layers_without_attention_run_as_in_trl_and_say_so(tmp_path: Path) -> None:
    model = ARCHITECTURES["lfm2"].build()
    want, _ = trained(grpo, tmp_path, share=False, model=model, max_steps=1)
    with pytest.warns(UserWarning, match="some of whose layers have no attention"):
        got, sharing = trained(grpo, tmp_path, share=True, model=model, max_steps=1)
    assert_same(got, want, tolerance=0.0)
    assert sharing.given == 0


def test_an_attached_prefix_stands_in_front_of_the_shared_prompts(tmp_path: Path) -> None:
    """GRPO that trains a prefix: the prefix is read by the prompts, and by the completions."""

    def make(model: Any, folder: Path, **options: Any) -> Any:
        torch.manual_seed(1)
        fastprefix.attach(model, fastprefix.PrefixConfig(4, init=fastprefix.init.normal(0.6)))
        return grpo(model, folder, **options)

    options = {"beta": 0.0, "gradient_checkpointing": False}
    want, _ = trained(make, tmp_path, share=False, **options)
    got, sharing = trained(make, tmp_path, share=True, **options)
    assert sharing.computed < 0.8 * sharing.given
    assert_same(got, want)


def in_one_process(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for share in (False, True):
        options = {"per_device_train_batch_size": 4, "peft_config": lora, "ddp_find_unused_parameters": False}
        trainer, sharing = trained(grpo, folder, share, **options)
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        found[str(share)] = logged(trainer)
        found[f"weights_{share}"] = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        if sharing is not None:
            assert sharing.computed < 0.8 * sharing.given
    return found


def test_in_two_processes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    for result in two_processes.run(in_one_process, tmp_path, tmp_path):
        for a, b in zip(result["True"], result["False"], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
        for p, q in zip(result["weights_True"], result["weights_False"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def sharded_afterwards(rank: int) -> list[list[torch.Tensor]]:
    """Log-probabilities and gradients of a model that fully_shard spreads over both processes, without and with."""
    prompts = [[5, 9, 11, 3, 4, 6], [8, 3, 7, 7, 7, 7]]
    ids = torch.tensor([prompts[i % 2] + [4 + i, 5, 6, rank + 7] for i in range(6)])
    labels = ids.clone()
    labels[:, :6] = -100
    found = []
    for share in (False, True):
        model = tiny_model().train()
        add_fused_lm_head(model)
        sharing = fastprefix.share_prompts(Trainer(model)) if share else None
        mesh = init_device_mesh("cpu", (two_processes.WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # A batch of which nothing is shared, in one process only: both still gather every layer once a forward.
        rows = torch.arange(24).view(6, 4) + 3 if rank == 0 else ids[:, -4:]
        model(input_ids=rows, labels=rows.masked_fill(torch.arange(4) < 2, -100), fused_lm_head=True)
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (output.log_probs * torch.arange(1.0, 10.0)).sum().backward()
        assert sharing is None or (sharing.computed < 0.8 * sharing.given and not sharing.not_shared)
        found.append([output.log_probs.detach(), *(p.grad.full_tensor() for p in model.parameters())])
    return found


def test_a_model_that_is_sharded_afterwards(tmp_path: Path) -> None:
    for want, got in two_processes.run(sharded_afterwards, tmp_path):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def scored(model: Any, length: int = 11) -> Any:
    """TRL's forward over two prompts of three rows each, padded on the right to this length."""
    prompts = [[5, 9, 11, 3, 4, 6], [8, 3, 7, 7, 7, 7]]
    ids = torch.zeros(6, length, dtype=torch.long)
    ids[:, :10] = torch.tensor([prompts[i % 2] + [4 + i, 5, 6, 7] for i in range(6)])
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, :6] = -100
    return model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels, fused_lm_head=True)


def with_head(model: Any) -> tuple[Any, Any]:
    """A model with TRL's head, and what sharing in it returned."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model, fastprefix.share_prompts(Trainer(model))


def test_a_deep_copy_runs_its_own_weights() -> None:
    model, _ = with_head(tiny_model())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2.0)
    alone = tiny_model()
    add_fused_lm_head(alone)
    alone.load_state_dict(twin.state_dict())
    torch.testing.assert_close(scored(twin).log_probs, scored(alone).log_probs, rtol=1e-4, atol=1e-4)
    row = torch.tensor([[1, 2, 3]])
    for each in (twin, alone):  # and of a batch in which nothing is shared
        each.found = each(input_ids=row, labels=row, fused_lm_head=True).log_probs
    torch.testing.assert_close(twin.found, alone.found, rtol=0, atol=0)


def test_frequencies_that_depend_on_the_padded_length_are_not_shared() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = tiny_model().config
    config.rope_parameters, config.max_position_embeddings = rope, 14
    model, sharing = with_head(type(tiny_model())(config).eval())
    scored(model, length=11)
    assert sharing.computed < sharing.given
    with pytest.warns(UserWarning, match="rotary frequencies"):
        got = scored(model, length=20)
    sharing.remove()
    torch.testing.assert_close(got.log_probs, scored(model, length=20).log_probs, rtol=0, atol=0)


def test_beside_a_soft_prompt_or_an_open_block_it_is_trl_s_forward() -> None:
    model, sharing = with_head(tiny_model())
    with fastprefix.shared_prompt(model, [4, 5]), pytest.warns(UserWarning, match="block of shared_prompt"):
        got = scored(model)
        sharing.remove()
        torch.testing.assert_close(got.log_probs, scored(model).log_probs, rtol=0, atol=0)
    sharing = fastprefix.share_prompts(Trainer(model))
    fastprefix.attach(model, fastprefix.PromptConfig(3))
    with pytest.warns(UserWarning, match="a soft prompt is active"):
        got = scored(model)
    sharing.remove()
    torch.testing.assert_close(got.log_probs, scored(model).log_probs, rtol=0, atol=0)


def test_a_reference_that_is_the_policy_itself() -> None:
    trainer, model = Trainer(tiny_model()), None
    model = trainer.model
    add_fused_lm_head(model)
    trainer.ref_model = model
    sharing = fastprefix.share_prompts(trainer)
    scored(model)
    assert sharing.computed < sharing.given and not sharing.not_shared
    sharing.remove()


def test_reentrant_checkpointing_of_shared_keys_runs_as_in_trl() -> None:
    model, sharing = with_head(ARCHITECTURES["gemma3n"].build().train())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.warns(UserWarning, match="reentrant checkpointing drops the gradients"):
        scored(model).log_probs.sum().backward()
    assert sharing.computed == sharing.given == 0


def test_noise_of_a_router_is_drawn_for_every_row() -> None:
    model, sharing = with_head(ARCHITECTURES["phimoe"].build().train())
    model.config.router_jitter_noise = 0.1
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.router_jitter_noise = 0.1
    with pytest.warns(UserWarning, match="jitter_noise"):
        scored(model)
    assert sharing.given == 0


def test_windows_that_are_switched_off_are_none() -> None:
    model, sharing = with_head(ARCHITECTURES["qwen2_moe"].build().eval())
    scored(model)
    assert sharing.computed < sharing.given and not sharing.not_shared


def test_wrong_calls(tmp_path: Path) -> None:
    model = tiny_model()
    args = SFTConfig(str(tmp_path / "out"), **OPTIONS)
    rows = datasets.Dataset.from_list([{"prompt": "the colour", "completion": " of"}])
    sft = SFTTrainer(model=tiny_model(), args=args, train_dataset=rows, processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="trainer: got SFTTrainer, expected a trainer of TRL with groups or pairs"):
        fastprefix.share_prompts(sft)
    with pytest.raises(ValueError, match="trainer: got LlamaForCausalLM, expected a trainer of TRL"):
        fastprefix.share_prompts(model)
    trainer = grpo(model, tmp_path, beta=0.0)
    sharing = fastprefix.share_prompts(trainer)
    with pytest.raises(ValueError, match="that shares prompts already, expected one call"):
        fastprefix.share_prompts(trainer)
    theirs = model.forward
    model.forward = lambda *args, **kwargs: theirs(*args, **kwargs)
    with pytest.raises(ValueError, match="wrapped again since"):
        sharing.remove()
    model.forward = theirs
    sharing.remove()
    fastprefix.share_prompts(trainer).remove()
    del model.__dict__["forward"]
    with pytest.raises(ValueError, match="has no fused head"):
        fastprefix.share_prompts(trainer)
    sharded = grpo(tiny_model(), tmp_path, beta=0.0)
    sharded.model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="LlamaForCausalLM is sharded, expected whole parameters"):
        fastprefix.share_prompts(sharded)
