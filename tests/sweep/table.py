"""``docs/models.md``: what the sweep found, one row a class, from ``results.json``, the compact copy of a run."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.sweep.outcome import DIFFERS, ORACLE, PEFT, RAISED, REFUSED, RIGHT, UNTRUE

ROOT = Path(__file__).parents[2]
RESULTS, DOCS = Path(__file__).with_name("results.json"), ROOT / "docs" / "models.md"
CHECKS = ("prefix", "prompt", "peft prefix", "peft prompt")
_LETTERS = {RIGHT: "r", REFUSED: "n", DIFFERS: "D", RAISED: "X", UNTRUE: "U", ORACLE: "o", PEFT: "p"}
_WORDS = {
    "r": "right",
    "n": "refused",
    "D": "**differs**",
    "X": "**raises later**",
    "U": "**refused untruly**",
    "o": "no oracle",
    "p": "not PEFT's",
}
_LONGEST = 150

INTRO = """# Models

Every class of transformers that a tiny random config builds, and a few variants of configs, as `make sweep` found them:
{classes} names, transformers {version}, {date}. {run} could be run, {interface} of them with attention that goes
through transformers' attention interface.

Each is run in fp64 on a CPU; none of it was run on a GPU.

**attach**: a random prefix in every layer, its results and gradients against explicit
concatenation; causal decoders also with the keys and values of a text as the prefix, against transformers alone on that
text in front of the content. **soft prompt**: results, loss and gradient against embeddings in front of every row.
**PEFT prefix** and **PEFT prompt**: the patched model's results, loss and gradients against those of PEFT before. Texts
come plain, with a mask, padded, and with an image or a sound where the class reads one and its inputs can be made.
Equal is to a millionth of the largest number. Encoder-decoders, T5's encoders and ALBERT take soft prompts, and
encoder-decoders PEFT's adapters, since this run ([which](peft.md#encoder-decoders)): there "refused" is out of date.

*right* is equal, *refused* raises when attached and says why. *not PEFT's*: PEFT does not take the class or fails
itself. *no oracle*: concatenation by hand cannot be done in this class, or transformers' own
implementations of attention differ there. **differs**, **raises later** and
**refused untruly** (for a reason that the bare model contradicts) are faults.

| | right | refused | not PEFT's | no oracle | differs | raises later | refused untruly |
|---|---|---|---|---|---|---|---|
{counts}
"""


def compact(found: dict[str, Any]) -> dict[str, Any]:
    """A run's results with what the table says of them."""
    import transformers

    classes: dict[str, Any] = {}
    for name, result in sorted(found.items()):
        checks = result["checks"]
        letters = "".join(_LETTERS[checks[k]["outcome"]] if k in checks else "-" for k in CHECKS)
        classes[name] = [letters, _note(name, result), int(bool(result.get("interface")))]
    dates = [result["date"] for result in found.values() if "date" in result]
    return {
        "transformers": transformers.__version__,
        "date": max(dates, default=time.strftime("%Y-%m-%d")),
        "classes": classes,
    }


def _note(name: str, result: dict[str, Any]) -> str:
    """The first thing that is not right, in short."""
    if "not built" in result or "not run" in result:
        kind = "not built" if "not built" in result else "not run"
        return f"{kind}: {_short(result[kind])}"
    said = []
    for kind in CHECKS:
        check = result["checks"].get(kind)
        if check is None or (check["outcome"] == RIGHT and not check["message"]) or check["outcome"] == PEFT:
            continue
        reason = re.sub(rf"model: got (a )?{re.escape(name.split(',')[0])},? ?|, expected .*", "", check["message"])
        if reason not in said:
            said.append(reason)
    return _short("; ".join(said))


def _short(text: str) -> str:
    text = re.sub(r"\s*\[[\w./-]+:\d+\]", "", text).replace("|", "/")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def text(results: dict[str, Any]) -> str:
    """The document."""
    classes = results["classes"]
    run = {name: row for name, row in classes.items() if row[0] != "----"}
    counts = []
    for i, title in enumerate(("attach", "soft prompt", "PEFT prefix", "PEFT prompt")):
        count = Counter(row[0][i] for row in run.values())
        counts.append(f"| {title} | " + " | ".join(str(count[letter]) for letter in "rnpoDXU") + " |")
    intro = INTRO.format(
        classes=len(classes), version=results["transformers"], date=results["date"], run=len(run),
        interface=sum(row[2] for row in run.values()), counts="\n".join(counts),
    )  # fmt: skip
    taken = {name: row for name, row in run.items() if set(row[0]) - set("np-")}
    lines = ["| class | attach | soft prompt | PEFT prefix | PEFT prompt | note |", "|---" * 6 + "|"]
    for name, (letters, note, _) in taken.items():
        cells = [_WORDS.get(letter, "-") for letter in letters]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {note or '-'} |")
    refused = _grouped({name: row[1] for name, row in run.items() if name not in taken})
    absent = _grouped({name: row[1] for name, row in classes.items() if name not in run})
    return "\n".join(
        [
            intro,
            "## Taken",
            "",
            *lines,
            "",
            "## Refused, or not for PEFT",
            "",
            *refused,
            "",
            "## Not run",
            "",
            *absent,
            "",
        ]
    )


def _grouped(notes: dict[str, str]) -> list[str]:
    """Names by what is said of them."""
    groups: dict[str, list[str]] = {}
    for name, note in notes.items():
        groups.setdefault(re.sub(r"\d+", "N", note), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"- {note}: " + ", ".join(f"`{name}`" for name in names) for note, names in ordered]


def write(found: dict[str, Any]) -> None:
    """Both files anew."""
    results = compact(found)
    RESULTS.write_text(json.dumps(results, indent=None, separators=(",", ":")).replace('],"', '],\n"') + "\n")
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(text(results))
