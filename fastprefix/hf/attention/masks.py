"""The mask function that transformers calls once per forward and mask type; its result reaches every layer.

A prefix is always visible, so masks describe content only. A mask has one of four forms, which the attention function
reads:

* ``None``: the layer's own causality, rows aligned with the last keys;
* ``[B, 1, 1, T]`` bool: padding, in addition to the layer's causality;
* ``[B, 1, S, T]`` bool with stride 0 over S: padding, all else visible (encoders); stride 0 over T too: nothing hidden;
* ``[B, 1, S, T]`` bool: the complete mask (windows shorter than the text, packing, static caches, overlays).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from fastprefix.errors import fail

Index = int | Tensor


class _MaskRequest(threading.local):
    """Settings of this thread's running forward for the mask function, to which transformers passes no handle.

    They are local to the thread, as another thread may run another model.
    """

    def __init__(self) -> None:
        # While a packed batch runs: the row and the first position of a document that follows another one in its row.
        # A mask that lets this position see the one before it is wrong.
        self.boundary: tuple[int, int] | None = None
        # The model's own attention implementation, whose masks are made while it serves the content of gated prompts.
        self.implementation: str | None = None
        # Whether the layers are not causal by themselves, so that a causal mask has to be written out in full: padding
        # alone would not say it.
        self.explicit_causal = False
        # Whether that holds without padding too: eager attention gets a mask then, sdpa gets none.
        self.even_without_padding = False
        # Whether no mask is to be made: prompts and rows run as one text, which attention takes apart itself.
        self.none = False
        self.windows: list[list[int]] = []

    def clear(self) -> None:
        """Reset all settings, as no forward runs any more."""
        self.boundary = self.implementation = None
        self.explicit_causal = self.even_without_padding = self.none = False


requested = _MaskRequest()


@contextmanager
def recording_windows() -> Iterator[list[int]]:
    """Collect the window and chunk sizes of local layers whose masks are made inside the block."""
    sizes: list[int] = []
    requested.windows.append(sizes)
    try:
        yield sizes
    finally:
        requested.windows.pop()


def note_window(size: int) -> None:
    """Let a block of :func:`recording_windows` know the window or chunk of a local layer."""
    if requested.windows:
        requested.windows[-1].append(size)


def mask_function(**arguments: Any) -> Tensor | None:
    """Call :func:`content_mask` with transformers' arguments and check packed rows.

    Raises:
        ValueError: rows are packed and the mask lets a document see the one before it.
    """
    if requested.none:
        return None
    if requested.implementation is not None:
        made: Tensor | None = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[requested.implementation](**arguments)
        return made
    if arguments.get("local_size"):  # 0 where a model's windows are switched off
        note_window(int(arguments["local_size"]))
    mask = content_mask(**arguments)
    if requested.boundary is not None:
        row, first = requested.boundary
        if mask is None or mask.shape[2] <= first or bool(mask[row, 0, first, first - 1]):
            expected = "one document a row: this model makes its masks without position ids"
            raise fail("position_ids", "packed documents (they jump)", expected)
    return mask


def content_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Index = 0,
    kv_offset: Index = 0,
    mask_function: Callable[..., Tensor] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The content mask, in the cheapest of the module's four forms.

    Args:
        batch_size, q_length, kv_length: B, S and T (a static cache's capacity).
        q_offset: position of the first query, kv_offset: of the first key; a tensor under static caches.
        mask_function: transformers' predicate on (batch, head, query, key) positions.
        attention_mask: ``[B, tokens so far]`` bool padding.
        local_size: window or chunk of a local layer.
    """
    padding = _padding(attention_mask, kv_length, kv_offset)
    aligned = _is_aligned(q_length, kv_length, q_offset, kv_offset)
    plain_causal = mask_function is masking_utils.causal_mask_function
    exporting = torch.compiler.is_exporting()  # an export serves any length, so no guard on this one
    if not plain_causal and aligned and allow_is_causal_skip and local_size is not None and not exporting:
        # A window or chunk that the text has not outgrown hides nothing.
        plain_causal = bool(q_offset + q_length <= local_size)
    explicit = requested.explicit_causal and (requested.even_without_padding or padding is not None)
    if plain_causal and aligned and not explicit:
        return None if padding is None else padding[:, None, None, :]
    if mask_function is masking_utils.bidirectional_mask_function:
        # Written out even when nothing is hidden, as the layer itself may claim to be causal.
        if padding is None:
            padding = torch.ones(1, 1, dtype=torch.bool, device=kwargs.get("device")).expand(batch_size, kv_length)
        return padding[:, None, None, :].expand(-1, -1, q_length, -1)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **{**kwargs, "allow_is_bidirectional_skip": False},
    )


def _is_aligned(q_length: int, kv_length: int, q_offset: Index, kv_offset: Index) -> bool:
    """Whether the last query's position is the last key's, which holds unless the cache is static."""
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return False
    return bool(q_offset + q_length == kv_offset + kv_length)


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: Index) -> Tensor | None:
    """``[B, T]`` bool over this forward's keys; None when it hides nothing."""
    if attention_mask is None or isinstance(kv_offset, Tensor):
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if padding.shape[1] < kv_length:
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    # Reading the values would break the graph under torch.compile, so a mask of ones is kept there.
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding


def over_all_rows(kwargs: dict[str, Any]) -> Any:
    """Expand a 4-D mask of the caller's own over the rows, so that it is not taken for padding."""
    mask = kwargs.get("attention_mask")
    source = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == 1 and source is not None:
        return mask.expand(-1, -1, source.shape[1], -1)
    return mask
