"""An inspection as one HTML page, without anything from elsewhere, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import torch

from fastprefix.inspection import drawings
from fastprefix.inspection.costs import WITH, WITHOUT
from fastprefix.inspection.gather import Inspection
from fastprefix.machine import html_page
from fastprefix.measure.report_tables import mebibytes

_STYLE = """
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; padding: 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.25rem; } .facts span { color: var(--faint); font-size: .85rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; margin-bottom: 1.4rem; }
.pair > div { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; }
.pair .given { grid-column: 1 / -1; background: none; border: 1px solid var(--line); }
.pair h3, .warn b { margin: 0; font-size: .85rem; color: var(--faint); font-weight: 600; }
.warn { border-left: .3rem solid var(--orange); background: var(--card); padding: .6rem .8rem; }
@media (max-width: 34rem) { .pair { grid-template-columns: 1fr; } }
"""


def page(found: Inspection) -> str:
    """The whole page."""
    size = found.size
    parts = [
        f"<h1>{escape(found.adapter)}</h1>",
        f"<p>A {escape(size.kind)} for {escape(found.model)}: what it is, what attention does with it, its cost.</p>",
        _facts(found),
        *(f'<p class="warn"><b>{escape(kind)}</b><br>{escape(text)}.</p>' for kind, text in found.complaints.items()),
        _mass(found),
        _bias(found),
        _slots(found),
        _map(found),
        _generations(found),
        _costs(found),
        *(f'<p class="note">{escape(note)}</p>' for note in found.notes),
    ]
    return html_page.page(f"fastprefix inspect: {found.adapter}", "".join(parts), _STYLE + drawings.STYLE)


def _facts(found: Inspection) -> str:
    size = found.size
    facts = [
        (f"{size.tokens:,}", "prefix tokens"),
        (f"{size.trained:,}", f"parameters, {size.trained / max(size.total, 1):.2%} of the model's {size.total:,}"),
        (size.layers, "where they are"),
    ]
    if size.file_bytes is not None:
        facts.append((f"{mebibytes(size.file_bytes)}", "in files"))
    if found.mass is not None:
        facts.append((f"{_number(found.mass.by_layer().mean()):.0%}", "of attention is on the prefix"))
    return (
        '<div class="facts">'
        + "".join(f"<div><b>{escape(number)}</b><span>{escape(text)}</span></div>" for number, text in facts)
        + "</div>"
    )


def _mass(found: Inspection) -> str:
    if found.mass is None:
        return ""
    heads = html_page.heat_map(found.mass.by_head().tolist(), "mass on the prefix by layer and head", "layer", "head")
    tokens = found.mass.by_token()  # [L, B, S]
    texts = []
    for i, (sample, words) in enumerate(zip(found.texts.samples, found.texts.tokens, strict=True)):
        texts.append(f"<h3>{escape(sample.name)}</h3>")
        texts.append(drawings.coloured(words, tokens[:, i, : len(words)].mean(0).tolist()))
    words = found.texts.tokens[0]
    along = html_page.heat_map(
        tokens[:, 0, : len(words)].tolist(), "mass on the prefix by layer and token", "layer", "token", names=words
    )
    return (
        "<h2>Attention on the prefix</h2><p>The share of the texts' attention that the prefix has, by layer and head. "
        f'The rest is on the text.</p><div class="wide">{heads}</div>{html_page.scale(1.0, "mass on the prefix")}'
        f"<h2>Token by token</h2><p>The mean over all layers and heads.</p>{''.join(texts)}"
        f'<p>Layer by layer, for the first text:</p><div class="wide">{along}</div>'
    )


def _bias(found: Inspection) -> str:
    if found.bias is None:
        return ""
    share = [
        [b / max(o, 1e-30) for b, o in zip(x.tolist(), y.tolist())] for x, y in zip(found.bias.bias, found.bias.output)
    ]
    most = max(1.0, *(x for row in share for x in row))
    explained = [x.tolist() for x in found.bias.explained()]
    error = max(float(x.max()) for x in found.bias.error)
    mean = sum(map(sum, explained)) / sum(map(len, explained))
    first = html_page.heat_map(share, "norm of the bias by layer and head", "layer", "head", most=most)
    second = html_page.heat_map(explained, "share along one direction by layer and head", "layer", "head")
    return (
        "<h2>What it adds</h2><p>To a layer the prefix is a bias: the output is <i>(1 - m)</i> times that over the "
        "text plus <i>m</i> times that over the prefix, where <i>m</i> is the mass. Here this holds to "
        f"{error:.1e}. On average {mean:.0%} of the bias lies along one direction of a head.</p>"
        f'<div class="wide">{first}</div>'
        f"{html_page.scale(most, 'norm of the bias, relative to that of the output')}"
        f'<div class="wide">{second}</div>{html_page.scale(1.0, "share of the bias along its largest direction")}'
    )


def _names(found: Inspection) -> list[str]:
    near = None if found.nearest is None else found.nearest.tokens
    return [f"slot {i}" + ("" if near is None else f", near {near[i][0]!r}") for i in range(found.size.tokens)]


def _slots(found: Inspection) -> str:
    if found.geometry is None:
        return ""
    geometry, head, rows = found.geometry, ["slot"], [[str(i)] for i in range(found.size.tokens)]
    text = ""
    if found.slots is not None:
        each = found.slots.by_slot()
        most = float(each.max())
        drawn = html_page.heat_map(each.tolist(), "mass by layer and slot", "layer", "slot", most=most)
        text = f'<div class="wide">{drawn}</div>{html_page.scale(most, "mean mass of a slot")}'
        peaks = torch.stack([x.amax(0) for x in found.slots.peak]).amax(0)
        head += ["mean mass", "largest"]
        for row, mean, peak in zip(rows, each.mean(0).tolist(), peaks.tolist(), strict=True):
            row += [f"{mean:.3f}", f"{peak:.3f}"]
        dead = found.slots.dead()
        never = sum((peaks < 1e-4).tolist())
        text += f"<p>{len(dead)} of {each.numel():,} slots of a layer are read by no token of these texts, {never} of "
        text += f"{found.size.tokens} in no layer.</p>"
    if found.nearest is not None and found.nearest.tokens is not None:
        head.append(f"nearest tokens by {found.nearest.by} (cosine)")
        for row, near, cosine in zip(rows, found.nearest.tokens, found.nearest.cosine.tolist(), strict=True):
            row.append("  ".join(f"{token!r} {c:.2f}" for token, c in zip(near, cosine, strict=True)))
    if found.place is not None:
        head.append(f"Mahalanobis distance (vocabulary {found.place.typical:.0f})")
        for row, distance in zip(rows, found.place.mahalanobis.tolist(), strict=True):
            row.append(f"{distance:.1f}")
    cosine, rank = _number(geometry.mean_cosine.mean()), _number(geometry.effective_rank.mean())
    how = "" if math.isnan(cosine) else f"Their mean pairwise cosine is {cosine:.2f}, their "
    how += f"{'Their ' if not how else ''}effective rank {rank:.1f} of {found.size.tokens}, the means over layers. "
    how += f"{len(geometry.tied)} pairs are equal."
    shown = rows[:64]
    more = f'<p class="note">and {len(rows) - 64} more slots</p>' if rows[64:] else ""
    return f"<h2>Slots</h2><p>{how}</p>{text}{html_page.table(head, shown)}{more}"


def _map(found: Inspection) -> str:
    if found.map is None:
        return ""
    share = _number(found.map.explained.sum())
    around = "tokens of the vocabulary" if found.map.kind == "embeddings" else "the texts' tokens"
    moved = " The ring is where it started." if found.map.start is not None else ""
    return (
        f"<h2>Where the slots are</h2><p>Each disc is a slot's {found.map.kind}, each dot one of {around}.{moved} The "
        f"plane shows {share:.0%} of the variance.</p>{drawings.slot_map(found.map, _names(found))}"
    )


def _generations(found: Inspection) -> str:
    def side(title: str, text: str, kind: str = "") -> str:
        return f'<div class="{kind}"><h3>{title}</h3><pre>{escape(text)}</pre></div>'

    pairs = ""
    for prompt, alone, own in found.generations:
        sides = side("given", prompt, "given"), side("without the prefix", alone), side("with the prefix", own)
        pairs += f'<div class="pair">{"".join(sides)}</div>'
    return f"<h2>What the model writes</h2>{pairs}"


def _costs(found: Inspection) -> str:
    costs = found.costs
    rows: Sequence[Sequence[str]] = costs.lines()
    each, all_rows = mebibytes(costs.shared_bytes), mebibytes(costs.rows * costs.shared_bytes)
    return (
        f"<h2>Memory and speed</h2>{html_page.table(['median of turns', WITH, WITHOUT, 'ratio (quartiles)'], rows)}"
        f"<p>The prefix's keys and values are {each}, once for the batch; a copy in each of the {costs.rows} rows "
        f"would be {all_rows}. A forward with a loss keeps {mebibytes(costs.saved_bytes)} for the prefix's backward "
        f'pass.</p><p class="note">Measured here: {escape(costs.where)}.</p>'
    )


def _number(x: torch.Tensor) -> float:
    return float(x)
