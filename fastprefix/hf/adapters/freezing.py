"""Freezes a model's parameters for ``attach``, and restores ``requires_grad`` for ``detach``."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


class Frozen:
    """Remembers parameters by module and name, as accelerate's offloading may replace the parameter objects."""

    def __init__(self) -> None:
        self.before: dict[tuple[int, str], tuple[nn.Module, nn.Parameter, bool]] = {}

    def freeze(self, model: nn.Module, but: Collection[int]) -> None:
        """Freeze a model except the parameters whose ``id`` is in ``but``; remember which were trainable."""
        known = {id(p) for _, p, _ in self.before.values()}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and id(p) not in but and id(p) not in known:
                    self.before.setdefault((id(module), name), (module, p, p.requires_grad))
        for p in model.parameters():
            if id(p) not in but:
                p.requires_grad_(False)

    def thaw(self) -> None:
        """Give every frozen parameter its former ``requires_grad``."""
        for (_, name), (module, p, requires_grad) in self.before.items():
            p.requires_grad_(requires_grad)
            now = module._parameters.get(name)
            if now is not None and type(now) is type(p) and (now.dtype, now.shape) == (p.dtype, p.shape):
                now.requires_grad_(requires_grad)
