"""``Modules``: a prefix's own copies of modules of the model, by the names that these have there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class Modules(nn.Module):
    """Modules by their names in another module, dots included, which a ``ModuleDict`` does not take."""

    def put(self, modules: Mapping[str, nn.Module]) -> None:
        """Hold these and no others."""
        self._modules.clear()
        self._modules.update({name.replace(".", "/"): module for name, module in modules.items()})

    def named(self) -> dict[str, nn.Module]:
        """What it holds."""
        return {name.replace("/", "."): m for name, m in self._modules.items() if m is not None}
