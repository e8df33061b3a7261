"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with columns aligned by spaces: numbers to the right, words to the left."""
    cells = [[str(x) for x in row] for row in (headers, *rows)]
    columns = []
    for title, *body in zip(*cells, strict=True):
        width = max(len(x) for x in (title, *body))
        numbers = all(x[:1].isdigit() or x[:1] in "-+." for x in body)
        place = str.rjust if numbers else str.ljust
        columns.append([place(x, width) for x in (title, "-" * width, *body)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
