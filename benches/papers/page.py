"""``docs/papers.md``, made from the kept results: each claim with its table, picture and verdict."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path

from benches.papers.collection import CLAIMS, experiments
from benches.papers.experiment import Experiment, Row, Values, values_of
from benches.papers.runner import ROOT, Found, path_of, read
from fastprefix.machine.files import write_atomically
from fastprefix.measure.report_tables import markdown_table

PAGE = ROOT / "docs" / "papers.md"
PICTURES = ROOT / "docs" / "images" / "papers"
TITLE = "# The papers' claims, run"


def write_page() -> None:
    """Write the page from all results that are kept."""
    write_atomically(PAGE, page())


def draw(experiment: Experiment, found: Found) -> Path:
    """Write the picture of one experiment; returns its path."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    target = PICTURES / f"{experiment.name}.png"
    # Without metadata the file says nothing of versions, and changes only with what is drawn.
    experiment.draw(found.outcomes).savefig(target, dpi=100, metadata={"Software": None})
    return target


def page() -> str:
    """The page's text, the same for the same results."""
    kept = [(x, read(path_of(x.name))) for x in experiments() if path_of(x.name).is_file()]
    if not kept:
        raise FileNotFoundError(f"no results in {path_of('*').parent.relative_to(ROOT)}: python -m benches.papers")
    minutes = sum(sum(found.seconds) for _, found in kept) / 60
    where = dict.fromkeys(f"{x.environment['device']}, torch {x.environment['torch']}" for _, x in kept)
    intro = [
        "This page is generated: `python -m benches.papers` (or `make papers`) runs the experiments, and writes the "
        "results, the pictures and this page. `python -m benches.papers --check` runs them again and says whether "
        "the numbers still agree. Each verdict is computed from the numbers above it.",
        f"Measured on {' and on '.join(where)}, one thread a run and two runs side by side: "
        f"{minutes:.0f} minutes of a core for all. Sizes are those of a CPU. What is published was measured on "
        "larger models, and stands beside ours for its direction, unless the setting is said to be the same.",
        "Learning rates, numbers of steps and some bounds in the statements were chosen by looking at these seeds, so "
        "that their margins are those of a known outcome, not of a prediction.",
    ]
    parts = [TITLE, *map(_paragraph, intro)]
    parts.append(_overview(kept))
    for claim, heading in CLAIMS.items():
        if some := [(x, found) for x, found in kept if x.claim == claim]:
            parts.append(f"## {heading}")
            parts += [_section(x, found) for x, found in some]
    return "\n\n".join(parts) + "\n"


def _overview(kept: list[tuple[Experiment, Found]]) -> str:
    rows = []
    for x, found in kept:
        values = values_of(found.outcomes)
        held = sum(statement.holds(values) for statement in x.statements)
        rows.append((f"[{x.title}](#{_anchor(x.title)})", f"{held} of {len(x.statements)}", x.papers))
    return markdown_table(("experiment", "statements that hold here", "paper"), rows)


def _paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _anchor(title: str) -> str:
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return "-".join(kept.split())


def _section(x: Experiment, found: Found) -> str:
    values = values_of(found.outcomes)
    rows = [(row.label, row.published or "-", _measured(row, values)) for row in x.rows]
    verdicts = [_paragraph(f"- **{_verdict(s.holds(values))}**: {s.text}", "  ") for s in x.statements]
    seeds = f"{len(found.seeds)} seeds, mean ± standard deviation" if len(found.seeds) > 1 else "nothing is random"
    command = f"`python -m benches.papers --only {x.name}`"
    parts = [
        f"### {x.title}",
        _paragraph(f"Paper: {x.papers}. {x.setting}"),
        markdown_table(("", "published", "measured"), rows),
        _paragraph(f"Measured: {seeds}; {command}, {statistics.fmean(found.seconds):.0f} seconds of a core a seed."),
        f"![{x.title}](images/papers/{x.name}.png)",
        "\n".join(verdicts),
        _paragraph(f"**Where it differs.** {x.differs}"),
        _paragraph(f"**What speaks against it.** {x.against}"),
    ]
    if x.full:
        kept = path_of(x.name, full=True)
        state = f"results in `{kept.relative_to(ROOT)}`" if kept.is_file() else "not run here"
        parts.append(_paragraph(f"**`--full`** ({state}): {x.full.removesuffix('.')}."))
    return "\n\n".join(parts)


def _verdict(holds: bool) -> str:
    return "Holds" if holds else "Does not hold here"


def _measured(row: Row, values: Values) -> str:
    found = values[row.key]
    middle = row.form.format(statistics.fmean(found))
    return f"{middle} ± {row.form.format(statistics.stdev(found))}" if len(found) > 1 else middle
