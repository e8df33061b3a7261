"""Every PeftModel that a test makes goes through ``fastprefix.patch``; what it refuses runs as PEFT's own, counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_seen: dict[str, Any] = {}  # by the test that runs now, or by its fixtures
_making = 0  # calls under way that make a PeftModel
_inside = 0  # forward passes under way of PeftModels
_patch: Callable[[Any], Any] | None = None


def begin() -> None:
    """A test begins."""
    global _seen, _inside
    _seen, _inside = {"patched": 0, "forwards": 0, "operator": 0, "refused": {}}, 0


def seen() -> dict[str, Any]:
    """What became of the test's models: how many were patched, their forward passes, how often the operator was called
    with a prefix (backward passes count), and what was refused."""
    return _seen


def install() -> None:
    """Wraps what gives users a PeftModel; to be called before the tests import those names.

    ``get_peft_model`` and ``AutoPeftModel`` end in a constructor or in ``PeftModel.from_pretrained``.
    """
    global _patch
    from peft import PeftModel

    import fastprefix
    from fastprefix import dispatch

    _patch = fastprefix.patch
    begin()
    for cls in (PeftModel, *_subclasses(PeftModel)):
        if "__init__" in cls.__dict__:
            cls.__init__ = _outermost(cls.__init__, lambda args, made: args[0])
    # Weights are read after the constructor: the model is patched when a user would have it in hand.
    read = PeftModel.__dict__["from_pretrained"].__func__
    PeftModel.from_pretrained = classmethod(_outermost(read, lambda args, made: made))
    dispatch.choose = _counted(dispatch.choose)


def _subclasses(cls: type) -> list[type]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


def _outermost(call: Callable[..., Any], model_of: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Patches the model when the outermost of the wrapped calls returns: by then it is whole."""

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        global _making
        _making += 1
        try:
            made = call(*args, **kwargs)
        finally:
            _making -= 1
        if _making == 0:
            _through_patch(model_of(args, made))
        return made

    return wrapped


def _through_patch(model: Any) -> None:
    assert _patch is not None
    try:
        _patch(model)
    except ValueError as error:
        _seen["refused"][str(error)] = _seen["refused"].get(str(error), 0) + 1
        return
    _seen["patched"] += 1
    model.register_forward_pre_hook(_enter)
    model.register_forward_hook(_leave, always_call=True)
    model.get_base_model().register_forward_pre_hook(_base)


def _enter(module: Any, args: Any) -> None:
    global _inside
    _inside += 1
    _seen["forwards"] += 1


def _leave(module: Any, args: Any, output: Any) -> None:
    global _inside
    _inside -= 1


def _base(module: Any, args: Any) -> None:
    """``generate`` calls the base model past the PeftModel."""
    _seen["forwards"] += not _inside


def _counted(choose: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(choose)
    def counted(args: Any, *rest: Any) -> Any:
        _seen["operator"] += args.prefix_k.shape[-2] > 0
        return choose(args, *rest)

    return counted
