"""The mixin of patched PeftModels that leaves nearly everything to PEFT."""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail


class PatchedAdaption:
    """Mixed into the class of a PeftModel with adaption prompts: PEFT's methods, with checks and new adapters fused."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward; raises ValueError for ``adapter_names``, which PEFT ignores, other than the active one."""
        return super().forward(*args, **_one_adapter(self, kwargs))  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's generate; raises ValueError for ``adapter_names``, which PEFT ignores, other than the active one."""
        return super().generate(*args, **_one_adapter(self, kwargs))  # type: ignore[misc]

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's add_adapter; the new adapter's modules get fastprefix's classes."""
        from fastprefix.hf.peft import adaption

        super().add_adapter(*args, **kwargs)  # type: ignore[misc]
        adaption.fuse(self)


def _one_adapter(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments without ``adapter_names``; ValueError where these name any but the active adapter."""
    names = kwargs.pop("adapter_names", None)
    if names is not None and set(names) != {model.active_adapter}:
        expected = f"{model.active_adapter!r}, the active one, in every row: a batch has one gate"
        raise fail("adapter_names", list(names), expected)
    return kwargs
