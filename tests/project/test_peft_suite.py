"""What runs PEFT's tests, without them: models under the hub's names, the choice, lifted skips, the verdict."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.peft_suite import models, patching, report, selection, stubs, unskipped  # noqa: E402

NAMES = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": "OPTForCausalLM",
    "hf-internal-testing/tiny-random-gpt2": "GPT2LMHeadModel",
    "peft-internal-testing/tiny-dummy-qwen2": "Qwen2ForCausalLM",
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": "LlamaForSequenceClassification",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": "RobertaForSequenceClassification",
    "peft-internal-testing/tiny-random-DebertaV2Model": "DebertaV2Model",
    "peft-internal-testing/tiny-random-DebertaModel": "DebertaModel",
    "peft-internal-testing/tiny-random-gemma4-E2B": "Gemma4ForConditionalGeneration",
    "peft-internal-testing/tiny-LlavaForConditionalGeneration": "LlavaForConditionalGeneration",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_makes_its_model(name: str) -> None:
    model = models.build(name)
    assert type(model).__name__ == NAMES[name]
    again = models.build(name).state_dict()
    assert all(torch.equal(x, again[key]) for key, x in model.state_dict().items())
    vocabulary = ("emb", "shared", "wte", "lm_head")
    sizes = [x.shape[0] for key, x in model.named_parameters() if not any(part in key for part in vocabulary)]
    assert sizes and models.VOCAB not in sizes


@pytest.mark.parametrize("name", ["peft-internal-testing/tiny-OPTForCausalLM-lora", "org/tiny-random-ResNetFor"])
def test_what_nothing_stands_in_for(name: str) -> None:
    assert models.architecture(name) is None
    with pytest.raises(ValueError, match="nothing stands in"):
        models.build(name)


def test_the_hub_is_read_by_from_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    name = "trl-internal-testing/tiny-random-LlamaForCausalLM"
    hub = models.write_hub(tmp_path, [name])
    assert models.write_hub(tmp_path, [name]) == hub
    model = transformers.AutoModelForCausalLM.from_pretrained(name, cache_dir=hub)
    made = models.build(name).state_dict()
    assert model.name_or_path == name and all(torch.equal(x, made[key]) for key, x in model.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, cache_dir=hub)
    ids = tokenizer("This is a test prompt.").input_ids
    assert ids[0] == 1 and max(ids) < models.IMAGE_TOKEN and tokenizer.decode(ids[1:]) == "This is a test prompt."


def _item(function: Any, file: str = "test_decoder_models.py", **params: Any) -> Any:
    callspec = {"callspec": SimpleNamespace(params=params)} if params else {}
    return SimpleNamespace(
        function=function, originalname=function.__name__, name=function.__name__, path=Path(file), **callspec
    )


def test_selection() -> None:
    def test_generate() -> None: ...

    def test_body_names_it() -> None:
        peft.PromptEncoderConfig(num_virtual_tokens=1, task_type="CAUSAL_LM")

    def test_other_hub() -> None:
        transformers.AutoModel.from_pretrained("hf-internal-testing/tiny-random-Unknown")

    assert selection.selected(_item(test_generate, config_cls=peft.PrefixTuningConfig, model_id="x"))
    assert selection.selected(_item(test_generate, config=peft.PrefixTuningConfig(num_virtual_tokens=2)))
    assert not selection.selected(_item(test_generate, config_cls=peft.LoraConfig))
    assert not selection.selected(_item(test_body_names_it, config_cls=peft.CPTConfig))
    assert selection.selected(_item(test_body_names_it)) and not selection.selected(_item(test_generate))
    assert selection.selected(_item(test_generate, file="test_cartridge.py"))
    assert selection.cannot_run(_item(test_generate, model_id="hf-internal-testing/tiny-random-gpt2")) is None
    assert "tiny-random-Unknown" in str(selection.cannot_run(_item(test_other_hub)))


def test_every_config_is_peft_s() -> None:
    assert all(issubclass(getattr(peft, name), peft.PeftConfig) for name in selection.CONFIGS)


def test_lifted_reasons() -> None:
    prefix = "<class 'peft.tuners.prefix_tuning.config.PrefixTuningConfig'>"
    mixed = f"Mixed adapter batches not supported for {prefix}"
    assert unskipped.limit("test_x: Prefix Tuning does not support gradient checkpointing, skipping this test.")
    assert unskipped.limit("test_x: Skip tests that use prefixtuningconfig for Deberta models")
    assert unskipped.limit(f"test_mixed_adapter_batches[a-b]: {mixed}")
    assert unskipped.limit(f"test_generate_with_mixed_adapter_batches[a-b]: {mixed}") is None
    assert unskipped.limit("test_x: Prompt learning does not support merging, skipping this test.") is None


def test_stand_in_data() -> None:
    data = stubs.load_dataset("ybelkada/english_quotes_copy")
    mapped = data.map(lambda rows: {"length": [len(quote) for quote in rows["quote"]]}, batched=True)["train"]
    assert len(mapped) > 12 and all(row["length"] == len(row["quote"]) for row in mapped)
    with pytest.raises(OSError, match="stands in"):
        stubs.load_dataset("nyu-mll/glue")


def test_the_outermost_call_is_patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Made:
        def __init__(self) -> None:
            self.whole = False

    class Sub(Made):
        def __init__(self) -> None:
            super().__init__()
            self.whole = True

    patched: list[Any] = []
    monkeypatch.setattr(patching, "_through_patch", lambda model: patched.append((model, model.whole)))
    for cls in (Made, Sub):
        monkeypatch.setattr(cls, "__init__", patching._outermost(cls.__init__, lambda args, made: args[0]))
    sub = Sub()
    assert patched == [(sub, True)]


def _run(**tests: dict[str, Any]) -> dict[str, Any]:
    named = {f"test_cartridge.py::{name}": record for name, record in tests.items()}
    return {"tests": named, "left_out": {}, "others": 3, "broken": {}}


def test_report() -> None:
    limit = "DeBERTa with prefix tuning"
    plain = _run(
        a={"outcome": "passed"},
        b={"outcome": "passed"},
        c={"outcome": "failed", "lifted": [limit], "why": "RuntimeError"},
        d={"outcome": "skipped", "why": "CPU", "lifted": [limit]},
        e={"outcome": "passed"},
    )
    patched = _run(
        a={"outcome": "passed", "patched": 1, "operator": 2, "forwards": 3},
        b={"outcome": "failed", "why": "AssertionError", "patched": 1},
        c={"outcome": "passed", "lifted": [limit], "patched": 1, "operator": 1},
        d={"outcome": "skipped", "why": "CPU"},
        e={"outcome": "passed", "refused": {"T5: no": 2}},
    )
    content = report.summary(plain, patched)
    row = content["files"]["test_cartridge.py"]
    assert row["unpatched"] == {"passed": 3, "skipped": 2} and row["patched"]["passed"] == 2
    assert (row["through_patch"], row["with_operator"], row["refused"], row["worse"]) == (3, 2, 1, 1)
    assert content["worse"] == {"test_cartridge.py::b": "failed: AssertionError"}
    assert content["refused"] == {"T5: no": 1} and content["skips"] == {"CPU": 1}
    found = content["lifted"][limit]
    assert (found["tests"], found["unpatched"], found["patched"]) == (1, 0, 1)
    assert "WORSE" in report.text(content) and "WORSE" not in report.text(report.summary(plain, None))
    assert report.worse({"x": {"outcome": "passed"}}, {}) == {"x": "missing: no report, the process died"}
