"""``Modules``: holds a prefix's copies of the model's modules, by the names that these have in the model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class Modules(nn.Module):
    """A dictionary of modules whose names may contain dots, which ``nn.ModuleDict`` does not allow."""

    def put(self, modules: Mapping[str, nn.Module]) -> None:
        """Replace the content by these modules."""
        self._modules.clear()
        self._modules.update({name.replace(".", "/"): module for name, module in modules.items()})

    def named(self) -> dict[str, nn.Module]:
        """The modules by name."""
        return {name.replace("/", "."): m for name, m in self._modules.items() if m is not None}
