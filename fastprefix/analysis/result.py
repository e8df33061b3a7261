"""What the results of all analyses have in common: plain data for JSON, and a figure of matplotlib."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

EXTRA = "analysis"  # the optional dependency of plots


@dataclasses.dataclass(frozen=True)
class Result(ABC):
    """The result of one analysis."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data that JSON can hold: nested lists for tensors, None for nan and infinities."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @abstractmethod
    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure`` of the result, which ``savefig`` writes.

        Raises:
            ImportError: matplotlib is not installed; the message names the extra that brings it.
        """


def plain(x: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(x, Tensor):
        return plain(x.tolist())
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {field.name: plain(getattr(x, field.name)) for field in dataclasses.fields(x)}
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple | set | frozenset):
        return [plain(value) for value in x]
    return x


def figure(width: float, height: float) -> Any:
    """A new figure of this size in inches, which needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(f"a plot needs matplotlib: pip install 'fastprefix[{EXTRA}]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(made)
    return made


def heat_map(axes: Any, values: Tensor, **options: Any) -> None:
    """Draw a matrix ``[rows, columns]`` with its scale; nan stays empty."""
    image = axes.imshow(values.double().numpy(), aspect="auto", interpolation="nearest", **options)
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


def stacked(rows: tuple[Tensor, ...]) -> Tensor:
    """Vectors of layers as one matrix ``[layers, longest]``, nan where a layer has fewer numbers."""
    width = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=math.nan) for row in rows])
