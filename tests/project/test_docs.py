"""The documentation is true: tables are generated, links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benches import groups, pictures
from benches import readme as measured
from fastprefix.backends import native
from tests.project import method_table, support_tables

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINKED = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")] + PAGES
GENERATED = re.compile(r"<!-- (\w+): .*?<!-- end of \1 -->", re.S)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(text: str) -> set[str]:
    """The names that GitHub and the site give to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_tables_of_support_are_current() -> None:
    if native.ABSENCE:
        pytest.skip(f"the table asks every backend, and {native.ABSENCE}")
    for path, text in support_tables.pages().items():
        assert path.read_text() == text, "run python -m tests.project.support_tables"


def test_the_table_of_methods_is_current_and_its_tests_exist() -> None:
    assert method_table.PAGE.read_text() == method_table.page(), "run python -m tests.project.method_table"
    for method in method_table.METHODS:
        path, _, function = method.test.partition("::")
        assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.M), f"{method.name}: {method.test}"
        lines = [line for line in method.example.strip().splitlines() if line]
        assert 2 <= len(lines) <= 5, f"{method.name}: an example of {len(lines)} lines"
        page, _, anchor = method.docs.partition("#")
        assert not anchor or anchor in anchors((DOCS / page).read_text()), f"{method.name}: {method.docs}"
    names = [method.name for method in method_table.METHODS]
    assert len(names) == len(set(names)) >= 15


def test_measured_figures_are_those_on_disk() -> None:
    for path, text in measured.pages().items():
        assert path.read_text() == text, "run python -m benches.readme"


def test_measured_groups_are_those_on_disk() -> None:
    pytest.importorskip("matplotlib")
    for path, text in groups.pages().items():
        assert path.read_text() == text, "run python -m benches.groups"


def test_counts_of_two_measurements_agree() -> None:
    """The bytes of a step were counted with its times, and again for more prefix lengths."""
    found = json.loads(measured.RESULTS.read_text())
    again = {row["P"]: row for row in found["lengths"]}
    for row in found["step"]:
        assert row["saved"] == {key: again[row["P"]][key] for key in row["saved"]}


def test_the_picture_shows_the_figures_on_disk() -> None:
    pytest.importorskip("matplotlib")
    found = json.loads(measured.RESULTS.read_text())
    assert pictures.PICTURE.read_text() == pictures.draw(found), "run python -m benches.readme"
    drawn = pictures.series(found)
    assert drawn["memory"]["peft"][512] == found["step"][1]["saved"]["peft"] / 2**20
    assert drawn["time"]["ours"] == {row["P"]: row["seconds"]["ours"] for row in found["step"]}


@pytest.mark.parametrize("picture", sorted(x for x in (DOCS / "images").iterdir() if x.is_file()), ids=name)
def test_pictures_are_small(picture: Path) -> None:
    if picture.suffix == ".svg":
        assert picture.stat().st_size < 40_000
        ElementTree.parse(picture)
    else:
        assert picture.suffix == ".png" and picture.stat().st_size < 100_000


@pytest.mark.parametrize("picture", sorted((DOCS / "images" / "papers").iterdir()), ids=name)
def test_pictures_of_papers_are_small(picture: Path) -> None:
    assert picture.suffix == ".png" and picture.stat().st_size < 100_000


def test_the_readme_is_a_front_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for said in ("make demo", "make test", "Not run on a GPU", "hardly time in a training step", "images/"):
        assert said in text


def test_the_readme_has_no_figure_that_was_not_measured() -> None:
    """Ratios, times and bytes stand in the generated part alone."""
    prose = GENERATED.sub("", (ROOT / "README.md").read_text())
    assert not re.findall(r"\d+(?:\.\d+)?(?:x\b| ?%| times| MiB| GiB| ms| seconds)", prose)


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists() and linked.is_relative_to(ROOT), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(linked.read_text()), f"{name(page)}: {target}"


def test_the_site_has_every_page_and_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement, see the Makefile
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in PAGES:
        assert (tmp_path / page.stem / "index.html").exists()
    front, reference = ((tmp_path / x / "index.html").read_text() for x in (".", "reference"))
    assert 'href="quickstart/"' in front and "README.md" not in front
    import fastprefix

    operator = (tmp_path / "operator" / "index.html").read_text()
    for public in set(fastprefix.__all__) - {"__version__", "init"}:
        assert f'id="fastprefix.{public}"' in reference + operator, public


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name)
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:fastprefix|kernels|benches|tests|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{name(page)}: {path}"
    for module in re.findall(r"python -m ((?:benches|tests|fastprefix)[\w.]*)", text):
        assert find_spec(module), f"{name(page)}: {module}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s:]+)", without_code(page.read_text()))
        todo += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) <= reached
