"""``fastprefix inspect``: one page from nothing but itself, whose numbers are those of the analyses and of generate."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import (
    LlamaAdapterConfig,
    PrefixConfig,
    PrefixMemoryConfig,
    PromptConfig,
    analysis,
    cli,
    init,
    inspection,
)
from fastprefix.inspection import drawings
from fastprefix.machine import html_page
from fastprefix.models import complete
from tests.support.tiny_models import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:fastprefix")
VOID = {"meta", "br", "hr", "img"}
TEXT = "the colour of grass is green <eos> the colour of snow is white"


class Checked(HTMLParser):
    """Every tag is closed, and nothing is loaded from anywhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "image", "use")
        for name, value in attrs:
            assert name not in ("src", "href", "srcset", "xlink:href") and not name.startswith("on"), name
            assert "url(" not in (value or "") and "://" not in (value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inspect")
    save_tiny(made / "model")
    (made / "text.txt").write_text(TEXT)
    return made


def adapter(folder: Path, config: Any, name: str = "adapter", shift: float = 0.0) -> str:
    model = tiny_model()
    torch.manual_seed(0)
    prefix = fastprefix.attach(model, config)
    with torch.no_grad():
        for p in prefix.parameters():
            p.add_(shift * torch.randn_like(p))
    fastprefix.save(model, folder / name)
    return str(folder / name)


def inspect(folder: Path, where: str, *options: str) -> str:
    out = folder / "pages" / "report.html"
    words = ["inspect", where, "--model", str(folder / "model"), "--output", str(out), "--max-new-tokens", "6"]
    assert cli.main([*words, *options]) == 0
    return out.read_text()


CONFIGS = {
    "prefix": PrefixConfig(4, init=init.normal(0.5)),
    "projected": PrefixConfig(4, prefix_projection=True, layers=[1]),
    "biased": PrefixConfig(4, prefix_bias=True),
    "one token": PrefixConfig(1, init=init.normal(0.5)),
    "long": PrefixConfig(200, init=init.normal(0.5)),
    "prompt": PromptConfig(init=init.token_ids([9, 5, 9])),
    "encoded prompt": PromptConfig(3, encoder="lstm"),
    "prompt after": PromptConfig(3, place="after"),
    "gated": PrefixConfig(4, gate="tanh", position_offset="none"),
    "llama adapter": LlamaAdapterConfig(4),
    "memory": PrefixMemoryConfig(),
}
WITHOUT_MASS = ("prompt after", "gated", "llama adapter", "memory")


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_has_a_page(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = adapter(folder, CONFIGS[kind], kind.replace(" ", "-"))
    page = inspect(folder, where, "--text", str(folder / "text.txt"))
    Checked(page)
    assert ("Attention on the prefix" in page) == (kind not in WITHOUT_MASS)
    assert "What the model writes" in page and "Memory and speed" in page and "nan" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport" content="width=device-width' in page
    assert capsys.readouterr().out.startswith("written: ")


def test_numbers_are_those_of_the_analyses(folder: Path) -> None:
    where = adapter(folder, CONFIGS["prefix"], "numbers")
    page = inspect(folder, where, "--text", str(folder / "text.txt"))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prefix = fastprefix.load(model, where)
    batch = tokenizer([TEXT], return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mass = analysis.prefix_mass(model, batch)
    for i, row in enumerate(mass.by_head().tolist()):
        for j, x in enumerate(row):
            assert f"<title>layer {i}, head {j}: {x:.3g}</title>" in page
    for x in mass.by_token()[:, 0].mean(0).tolist():
        assert f'style="--m:{x:.3f}" title="{x:.2f}"' in page
    own = analysis.slot_mass(model, batch).by_slot().mean(0)
    assert all(f"<td>{i}</td><td>{x:.3f}</td>" in page for i, x in enumerate(own.tolist()))
    trained, total = sum(p.numel() for p in prefix.parameters()), sum(p.numel() for p in tiny_model().parameters())
    assert f"<b>{trained:,}</b>" in page and f"of the model&#x27;s {total:,}" in page
    near = analysis.nearest(model, k=1, tokenizer=tokenizer).tokens
    assert near is not None and all(repr(row[0]) in unescape(page) for row in near)
    for text, chosen in (("without the prefix", None), ("with the prefix", "default")):
        fastprefix.set_prefix(model, chosen)
        prompt = batch["input_ids"][0][: batch["input_ids"].shape[1] // 2][:24]
        want = complete(model, tokenizer, prompt, 6)
        assert f"<h3>{text}</h3><pre>{want}</pre>" in page
    bytes_ = 4 * 2 * 2 * (8 + 8) * 4
    from fastprefix.inspection.costs import shared_bytes

    assert shared_bytes(model, "default") == bytes_


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_start_is_joined_to_the_end(kind: str, folder: Path) -> None:
    start = adapter(folder, CONFIGS[kind], "start")
    end = adapter(folder, CONFIGS[kind], "end", shift=0.3)
    page = inspect(folder, end, "--text", str(folder / "text.txt"), "--start", start)
    tokens = CONFIGS[kind].num_virtual_tokens
    assert page.count('<line class="move"') == page.count('class="from"') == tokens == page.count('class="point"')
    assert "--start" not in unescape(page)
    page = inspect(folder, end, "--text", str(folder / "text.txt"))
    assert '<line class="move"' not in page and "an adapter saved before training" in page


def test_complaints_are_on_the_page(folder: Path) -> None:
    page = inspect(folder, adapter(folder, CONFIGS["prompt"], "tied"), "--text", str(folder / "text.txt"))
    assert 'class="warn"><b>tied</b>' in page and "slots 0 and 2 are equal" in page


def test_without_texts_glosses_are_read(folder: Path) -> None:
    page = inspect(folder, adapter(folder, CONFIGS["prefix"], "glosses"))
    assert all(f"<h3>gloss {i}</h3>" in page for i in (1, 2, 3)) and page.count("with the prefix</h3>") == 3


def test_everything_is_escaped(folder: Path, tmp_path: Path) -> None:
    """Names of files and folders, texts, and tokens."""
    evil = "<script>alert('&\"')</script>"

    class Tokenizer:
        pad_token_id, eos_token_id = 0, 2

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [4, 5, 6, 7]}

        def decode(self, ids: Any, **options: Any) -> str:
            return evil

    model = tiny_model()
    fastprefix.attach(model, CONFIGS["prefix"])
    texts = inspection.encode([inspection.Sample(evil, evil, None)], Tokenizer(), 8, 2)
    found = inspection.gather(model, Tokenizer(), texts, adapter=evil, about=evil, max_new_tokens=2)
    page = inspection.page(found)
    Checked(page)
    assert "<script" not in page and page.count("&lt;script&gt;") > 8


def test_the_reports_of_cartridges_share_the_page() -> None:
    from fastprefix.cartridges import report_page

    assert report_page.html_page is html_page


def test_a_heat_map_has_a_cell_for_each_number() -> None:
    drawn = html_page.heat_map([[0.0, 0.5, float("nan")], [2.0, -1.0, 0.25]], "it", "layer", "head")
    opacity = [float(x) for x in re.findall(r'class="cell"[^>]*fill-opacity="([\d.]+)"', drawn)]
    assert opacity == [0.0, 0.5, 1.0, 0.0, 0.25] and "layer 1, head 2: 0.25" in drawn
    wide = html_page.heat_map([[float(i) for i in range(1000)]], "it", "layer", "slot", most=999.0)
    hints = re.findall(r"slot (\d+ to \d+): ([^<]+)<", wide)
    assert len(hints) == 143 and hints[1] == ("7 to 13", "10") and hints[-1] == ("994 to 999", "996")
    assert html_page.heat_map([[0.0]], "it", "layer", "head", most=0.0).count('class="cell"') == 1


def test_a_map_is_not_squeezed_by_one_point() -> None:
    around = torch.rand(40, 2, dtype=torch.float64)
    around[3] = 1e6
    end = torch.rand(3, 2, dtype=torch.float64)
    found = analysis.SlotMap("embeddings", around, None, end, None, torch.ones(2))
    drawn = drawings.slot_map(found, ["a", "b", "<c>"])
    inside = drawn.count('class="around"')
    assert 36 <= inside < 40 and f"{40 - inside} of 40 dots are outside of the frame" in drawn and "&lt;c&gt;" in drawn
    places = [float(x) for x in re.findall(r'class="point" cx="([\d.]+)"', drawn)]
    assert max(places) - min(places) > 30.0 and all(0.0 < x < 640.0 for x in places)


WRONG = [
    (["nowhere"], "ADAPTER: no folder nowhere, expected an adapter's"),
    (["{adapter}", "--start", "nowhere"], "--start: no folder nowhere"),
    (["{adapter}", "--text", "nowhere.txt"], "--text: no file nowhere.txt"),
    (["{adapter}", "--text", "{adapter}"], "is a folder, expected a file"),
    (["{adapter}", "--text", "{empty}"], "has no text"),
    (["{adapter}", "--text", "{binary}"], "is not UTF-8 (invalid start byte at byte 0)"),
    (["{model}"], "adapter_config.json"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_wrong_calls(words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {name: str(folder / name) for name in ("model", "empty", "binary")}
    places["adapter"] = adapter(folder, CONFIGS["prefix"], "wrong")
    (folder / "empty").write_text(" \n")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    given = [word.format(**places) for word in words]
    out = folder / "never.html"
    assert cli.main(["inspect", *given, "--model", places["model"], "--output", str(out)]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert said in error and error.startswith("fastprefix inspect: ") and not out.exists()


def test_an_output_that_is_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = adapter(folder, CONFIGS["prefix"], "wrong")
    words = ["inspect", where, "--model", str(folder / "model"), "--output", str(folder)]
    assert cli.main(words) == cli.USER_ERROR
    assert "is a folder, expected a file" in capsys.readouterr().err
