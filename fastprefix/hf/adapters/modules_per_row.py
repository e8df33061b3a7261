"""``RowModules``: runs a different module for each row of a batch, chosen by the row's prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.runtime.forward_context import AdapterSelection, Name


class RowModules(nn.Module):
    """Replaces one module of the model; runs each prefix's copy of that module on the rows that read the prefix."""

    def __init__(self, path: str, selection: AdapterSelection, modules: Mapping[Name | None, nn.Module]) -> None:
        super().__init__()
        self.path, self.selection = path, selection
        self._modules_of = (dict(modules),)  # in a tuple, so that the modules are not registered a second time

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, ...]`` from tensors ``[B, ...]``; ValueError where a module returns anything else."""
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0]
        if not given:
            got = f"different modules at {self.path!r}, which is given no rows"
            raise fail("names", got, "one prefix for all rows")
        batch = len(given[0])
        names = self.selection.rows(batch)
        places: dict[int, list[int]] = {}
        modules = {id(module): module for module in self._modules_of[0].values()}
        for row, name in enumerate(names):
            places.setdefault(id(self._modules_of[0][name]), []).append(row)
        outputs, order = [], []
        for key, rows in places.items():
            index = torch.tensor(rows, device=given[0].device)

            def some(x: Any, index: Tensor = index) -> Any:
                return x[index.to(x.device)] if isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch else x

            output = modules[key](*map(some, args), **{name: some(x) for name, x in kwargs.items()})
            if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != len(rows):
                got = f"different modules at {self.path!r}, which gives no tensor of rows"
                raise fail("names", got, "one prefix for all rows")
            outputs.append(output)
            order += rows
        back = torch.empty(batch, dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(batch)
        return torch.cat(outputs)[back.to(outputs[0].device)]
