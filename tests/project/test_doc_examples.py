"""Every Python block of the README and of ``docs/``, and every script of ``examples/``, runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.support.tiny_models import save_tiny, tiny_model  # noqa: E402

ROOT = Path(__file__).parents[2]
HUB = "HuggingFaceTB/SmolLM2-135M"
BLOCK = re.compile(r"^```(python[^\n]*)\n(.*?)^```$", re.S | re.M)
PAGES = {path: BLOCK.findall(path.read_text()) for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
WITH_CODE = [path for path, blocks in PAGES.items() if blocks]

# What a script prints when it does what it says.
PRINTED = {
    "train_prefix.py": [r"loss: 4\.\d+ -> 3\.\d+", "gives the same logits: True"],
    "patch_peft.py": [r"saved for backward: \d\.\d MiB with PEFT, \d\.\d MiB patched"],
    "many_prefixes.py": ["the mixed batch equals each row alone: True", r"legal: \[", r"medical: \[", r"None: \["],
    "shared_prompt.py": ["same gradient: True", "tokens through the model: 128 shared, 368 repeated"],
    "serve_client.py": [r"no server answers at http://127\.0\.0\.1:\d+/v1: start one with fastprefix serve"],
    "custom_attention.py": [r"output \[4, 32, 128\], gradient of the prefix \[2, 12, 16\]", "chosen by auto"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny random model and its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def offline_hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that the pages name is the tiny one; no other name is known."""
    for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        cls = getattr(transformers, auto)
        original = cls.from_pretrained

        def from_pretrained(name: str, _original: Any = original, **options: Any) -> Any:
            assert name == HUB
            return _original(str(tiny), **options)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda path: path.name)
def test_blocks_run(page: Path, offline_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they stand on the page, as one script."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for info, block in PAGES[page]:
        if info == "python":
            exec(compile(block, page.name, "exec"), names)


def test_every_block_runs_or_says_that_it_does_not() -> None:
    infos = [info for blocks in PAGES.values() for info, _ in blocks]
    assert infos.count("python") >= 20 and set(infos) <= {"python", "python notest"}
    assert infos.count("python notest") == 0
    opened = sum(len(re.findall(r"^```\w", path.read_text(), re.M)) for path in PAGES)
    assert opened == len(infos), "a block of another language, or one that is not closed"


@pytest.mark.filterwarnings("ignore")
def test_messages_of_the_faq_are_those_that_are_raised() -> None:
    import fastprefix

    model, token = tiny_model(), torch.ones(1, 1, dtype=torch.long)
    for name in ("first", "second"):
        fastprefix.attach(model, fastprefix.PrefixConfig(4), name)
    cache = model(input_ids=token, use_cache=True).past_key_values
    fastprefix.set_prefix(model, "first")
    bloom = transformers.BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=4)
    refused = (
        lambda: fastprefix.attach(transformers.BloomForCausalLM(bloom), fastprefix.PrefixConfig(4)),
        lambda: model(input_ids=token, past_key_values=cache),
        lambda: model(input_ids=token, output_attentions=True),
        lambda: model.generate_batch(inputs=[[1, 2]]),
    )
    raised = []
    for call in refused:
        with pytest.raises(ValueError) as error:
            call()
        raised.append(str(error.value))
    assert re.findall(r"^    (\w+: got .*)$", (ROOT / "docs" / "faq.md").read_text(), re.M) == raised


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And are short enough to be read at once."""
    assert len(script.read_text().splitlines()) <= 50
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for said in PRINTED[script.name]:
        assert re.search(said, printed), printed


def test_the_patched_example_saves_memory_and_changes_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    done = runpy.run_path(str(ROOT / "examples" / "patch_peft.py"))
    assert done["patched_bytes"] < done["peft_bytes"] / 2
    assert done["with_patch"] == pytest.approx(done["with_peft"], rel=1e-4)
