"""The patched classes that leave nearly everything to PEFT."""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail


class PatchedConcatenating:
    """Mixed into the class of a PeftModel whose soft prompts cannot be shared: everything is PEFT's."""


class PatchedAdaption:
    """Mixed into the class of a PeftModel with adaption prompts: everything is PEFT's, new adapters are fused too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's; ``adapter_names`` are not ignored."""
        return super().forward(*args, **_one_adapter(self, kwargs))  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's; ``adapter_names`` are not ignored."""
        return super().generate(*args, **_one_adapter(self, kwargs))  # type: ignore[misc]

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's."""
        from fastprefix.hf.peft import adaption

        super().add_adapter(*args, **kwargs)  # type: ignore[misc]
        adaption.fuse(self)


def _one_adapter(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments without names that say what PEFT does anyway; ValueError for others."""
    names = kwargs.pop("adapter_names", None)
    if names is not None and set(names) != {model.active_adapter}:
        expected = f"{model.active_adapter!r}, the active one, in every row: a batch has one gate"
        raise fail("adapter_names", list(names), expected)
    return kwargs
