"""Training through transformers: adapter-only checkpoints, exact resumption, JSON-lines data, and the plain Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from tests.support.tiny_models import ROWS, tiny_model, tiny_tokenizer

transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainingArguments  # noqa: E402

from fastprefix.data import collator, load_pairs, read_pairs  # noqa: E402
from fastprefix.hf.trainer import PrefixTrainer, restore  # noqa: E402
from fastprefix.train import checkpoint_layers  # noqa: E402

pytestmark = pytest.mark.slow

CONFIGS = {
    "direct": {"num_frozen_tokens": 1},
    "projected": {"prefix_projection": True, "encoder_hidden_size": 8},
    "prompt": {"prompt": True},
    "encoded_prompt": {"prompt": True, "encoder": "lstm", "encoder_hidden_size": 8},
}


def attached(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = tiny_model()
    if options.pop("prompt", False):
        return model, fastprefix.attach(model, fastprefix.PromptConfig(3, **options))
    return model, fastprefix.attach(model, fastprefix.PrefixConfig(3, **options))


def trainer(model: Any, output: Path, cls: type[Trainer] = PrefixTrainer, **options: Any) -> Trainer:
    arguments = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 3, **options}
    rows = encoded(output.parent)
    return cls(
        model=model,
        args=TrainingArguments(
            str(output),
            save_strategy="steps",
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        data_collator=collator(0),
        train_dataset=rows,
        eval_dataset=rows,
    )


def encoded(folder: Path) -> list[dict[str, Tensor]]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return load_pairs(path, tiny_tokenizer())


def numbers(prefix: Any) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in prefix.state_dict().items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_resuming_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    model, prefix = attached(**options)
    start = numbers(prefix)
    trainer(model, tmp_path / "run").train()
    want = numbers(prefix)
    assert not any(torch.equal(want[name], start[name]) for name, _ in prefix.named_parameters())

    model, prefix = attached(**options)
    with torch.no_grad():
        for p in prefix.parameters():
            p.zero_()
    objects = list(prefix.parameters())
    resumed = trainer(model, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert all(a is b for a, b in zip(objects, prefix.parameters(), strict=True))
    assert_same(numbers(prefix), want)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_checkpoints_hold_the_adapter_only(options: dict[str, Any], tmp_path: Path) -> None:
    model, prefix = attached(**options)
    trainer(model, tmp_path / "run", max_steps=3).train()
    folder = tmp_path / "run" / "checkpoint-3"
    weights = {file.name for file in folder.glob("*.safetensors")}
    assert weights == {"adapter_model.safetensors"} | (
        {"prefix_encoder.safetensors"} if getattr(prefix, "encoder", None) else set()
    )
    fresh = tiny_model()
    fastprefix.load(fresh, folder)
    ids = torch.arange(4, 10).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    model, prefix = attached()
    # The highest loss counts as the best, so that it is not the last.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trained = trainer(model, tmp_path / "run", eval_strategy="steps", eval_steps=3, learning_rate=0.5, **best)
    trained.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry}
    assert losses[3] > losses[6] + 0.01
    assert trained.evaluate()["eval_loss"] == pytest.approx(losses[3], abs=1e-6)
    saved = fastprefix.load(tiny_model(), tmp_path / "run" / "checkpoint-3")
    assert_same(numbers(prefix), numbers(saved))


def test_several_prefixes_have_a_folder_each(tmp_path: Path) -> None:
    model, _ = attached()
    fastprefix.attach(model, fastprefix.PrefixConfig(5), "other")
    want = [numbers(p) for p in model._fastprefix.selection.prefixes.values()]
    trained = trainer(model, tmp_path / "run")
    trained.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    trained._load_from_checkpoint(str(tmp_path / "saved"))
    for prefix, before in zip(model._fastprefix.selection.prefixes.values(), want, strict=True):
        assert_same(numbers(prefix), before)
    assert (tmp_path / "saved" / "other" / "adapter_model.safetensors").exists()


def test_what_a_checkpoint_would_lose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a prefix"):
        trainer(tiny_model(), tmp_path / "run")
    model, _ = attached()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"besides the prefix: (lm_head|model\.embed_tokens)"):
        trainer(model, tmp_path / "run")


def test_another_prefix_is_not_restored(tmp_path: Path) -> None:
    model, _ = attached(prefix_projection=True)
    fastprefix.save(model, tmp_path)
    for config, field in (
        (fastprefix.PrefixConfig(4, prefix_projection=True), "num_virtual_tokens"),
        (fastprefix.PrefixConfig(3), "projected"),
        (fastprefix.PrefixConfig(3, prefix_projection=True, position_offset="none"), "position_offset"),
        (fastprefix.PrefixConfig(3, prefix_projection=True, encoder_hidden_size=5), "prefix_encoder.*down.weight"),
    ):
        other = fastprefix.attach(tiny_model(), config)
        with pytest.raises(ValueError, match=field):
            restore(other, tmp_path)
    model, _ = attached(prompt=True, encoder="mlp", encoder_hidden_size=5)
    fastprefix.save(model, tmp_path)
    for prompt, field in (
        (fastprefix.PromptConfig(3), "projected: got True, expected None"),
        (fastprefix.PromptConfig(3, encoder="lstm", encoder_hidden_size=5), "an LSTM of 0 layers"),
        (fastprefix.PromptConfig(3, encoder="mlp", encoder_hidden_size=6), "prefix_encoder.*mlp_head.0.weight"),
    ):
        with pytest.raises(ValueError, match=field):
            restore(fastprefix.attach(tiny_model(), prompt), tmp_path)


def test_the_plain_trainer_trains_resumes_and_keeps_the_model_frozen(tmp_path: Path) -> None:
    model, prefix = attached()
    before = {name: x.clone() for name, x in tiny_model().state_dict().items()}
    trainer(model, tmp_path / "run", Trainer).train()
    want = numbers(prefix)
    now = model.state_dict()
    assert all(torch.equal(now[name], x) for name, x in before.items())
    again, prefix = attached()
    trainer(again, tmp_path / "again", Trainer).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(numbers(prefix), want)


def test_gradient_checkpointing_trains_to_the_same_numbers(tmp_path: Path) -> None:
    model, prefix = attached()
    trainer(model, tmp_path / "plain", max_steps=3).train()
    other_model, other = attached()
    checkpoint_layers(other_model)
    trainer(other_model, tmp_path / "recomputed", max_steps=3).train()
    for name, x in numbers(prefix).items():
        torch.testing.assert_close(numbers(other)[name], x, rtol=0, atol=1e-6)


def test_the_loss_is_on_completion_and_eos_only(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    row, *others = encoded(tmp_path)
    ids = tokenizer(ROWS[0]["prompt"])["input_ids"]
    assert row["labels"].tolist()[: len(ids)] == [-100] * len(ids)
    assert row["labels"][len(ids) :].tolist() == row["input_ids"][len(ids) :].tolist()
    assert row["labels"][-1] == tokenizer.eos_token_id
    batch = collator(0)([row, *others])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows.jsonl, line 3: not JSON"),
        ("[1]", r"line 3: got list"),
        ('{"completion": "b"}', r"line 3: the field 'prompt' is missing"),
        ('{"prompt": "a", "completion": 7}', r"line 3: the field 'completion' is int"),
        ('{"prompt": "a", "completion": ""}', r"line 3: the field 'completion' is empty"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_an_empty_file_and_a_long_prompt_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"rows.jsonl: no lines"):
        read_pairs(path)
    path.write_bytes(b'{"prompt": "\xff", "completion": "b"}')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read_pairs(path)
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match=r"line 1: its prompt of \d+ tokens fills max_length=2"):
        load_pairs(path, tiny_tokenizer(), max_length=2)


HEADS: dict[str, Any] = {
    "modules_to_save": {"modules_to_save": ["score"]},
    "by hand": {},
    "prompt": {"prompt": True, "modules_to_save": ["score"]},
}


def classifier(start: bool = True, **options: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    """A model with a trained head, and all that is trained; else than at the start, with other numbers."""
    model = transformers.LlamaForSequenceClassification(tiny_model().config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.init_weights()
    model.model.load_state_dict(tiny_model().model.state_dict())
    make = fastprefix.PromptConfig if options.pop("prompt", False) else fastprefix.PrefixConfig
    torch.manual_seed(1)
    prefix = fastprefix.attach(model, make(3, **options))
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
        if not start:
            for p in (*prefix.parameters(), model.score.weight):
                p.add_(1)
    if not options:
        model.score.requires_grad_(True)
    return model, [p for p in model.parameters() if p.requires_grad]


def head_trainer(model: Any, output: Path, **options: Any) -> Trainer:
    built = trainer(model, output, **options)
    rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(built.train_dataset)]
    built.train_dataset = built.eval_dataset = rows
    built.data_collator = lambda rows: {
        "input_ids": torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    return built


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_a_trained_head_is_in_the_checkpoints(options: dict[str, Any], tmp_path: Path) -> None:
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    best |= {"greater_is_better": True, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 0.5}
    model, parameters = classifier(**options)
    head_trainer(model, tmp_path / "run").train()
    want = [p.detach().clone() for p in parameters]
    model, parameters = classifier(start=False, **options)
    head_trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(want) == len(parameters) and all(torch.equal(p, x) for p, x in zip(parameters, want, strict=True))

    model, _ = classifier(**options)
    trained = head_trainer(model, tmp_path / "best", **best)
    trained.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry}
    assert abs(losses[3] - losses[6]) > 0.01
    assert trained.evaluate()["eval_loss"] == pytest.approx(max(losses.values()), abs=1e-6)
