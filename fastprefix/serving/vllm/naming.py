"""How requests name a prefix, and the errors that a client gets for a name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastprefix.errors import fail

# The extra argument of a request: ``vllm_xargs`` over HTTP, ``SamplingParams(extra_args=...)`` in Python.
ARGUMENT = "prefix"
# Where the front end tells the connector which prefix a request reads. What a client puts there is removed.
MARKER = "fastprefix"

_NAME = re.compile(r"[A-Za-z0-9_][\w.@+=-]{0,254}", re.ASCII)

# The prefix that requests read which are made without one, such as those that beam search makes.
current: ContextVar[str | None] = ContextVar("fastprefix_serving_prefix", default=None)


class UnknownPrefix(ValueError):
    """There is no adapter of this name: a server answers 404."""


def check_name(name: object) -> str:
    """The name of an adapter's folder.

    Raises:
        UnknownPrefix: no folder can have this name, or it lies elsewhere.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UnknownPrefix(str(fail(ARGUMENT, repr(name), "the name of a folder, of letters, digits and . _ - + = @")))
    return name


def named_in(extra_args: Mapping[str, Any] | None) -> str | None:
    """The prefix that a request's extra arguments name, or that :func:`use_prefix` set; None for the bare model.

    Raises:
        ValueError: the argument is no text, and not None.
    """
    name = (extra_args or {}).get(ARGUMENT)
    if name is None:
        return current.get()
    if not isinstance(name, str):
        raise fail(ARGUMENT, repr(name), "a text: the name of an adapter's folder")
    return name


@contextmanager
def use_prefix(name: str | None) -> Iterator[None]:
    """Let requests of vLLM's ``LLM`` read a prefix inside the block, unless they name one themselves.

    ``SamplingParams(extra_args={"prefix": name})`` does the same for one request. ``LLM.beam_search`` has no such
    argument, and this is the way there.

    Args:
        name: the name of an adapter's folder; None for the bare model.
    """
    token = current.set(name)
    try:
        yield
    finally:
        current.reset(token)
