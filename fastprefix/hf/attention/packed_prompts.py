"""Prompts and the rows behind them in one row of a batch: attention of each part, and the way there and back.

Everything but attention treats tokens one by one. So prompts that rows share, and the rows, can run as one text of
``T = C + N*P + B*S`` tokens: a beginning that all prompts have, the prompts, the rows, each padded on the right to one
length. Every weight is read once for all of them. Here attention takes the text apart again: prompts read the beginning
as their prefix, and rows read their prompts', which are slices of the same keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprefix.functional import prefix_attention


class PackedPrompts(NamedTuple):
    """Where the parts of a packed text are. Padding needs no mask: it follows its text, and attention is causal."""

    beginning: int  # C
    lens: tuple[int, ...]  # tokens of each of N prompts
    prompt_tokens: int  # P, of the longest
    groups: tuple[int, ...]  # the prompt of each of B rows
    row_tokens: int  # S
    ids: Tensor | None  # [B], the same as groups; None where there is one prompt
    bank_lens: Tensor | None  # [N], tokens in front of rows; None where there is one prompt

    @property
    def sizes(self) -> list[int]:
        """Tokens of the three parts."""
        return [self.beginning, len(self.lens) * self.prompt_tokens, len(self.groups) * self.row_tokens]


def pack(
    beginning: Tensor | None,
    prompts: Sequence[Tensor],
    groups: Sequence[int],
    rows: Tensor,
    starts: Sequence[int],
    first: int = 0,
) -> tuple[PackedPrompts, Tensor, Tensor]:
    """Token ids as one text.

    Args:
        beginning: ``[C]``, what all prompts begin with, or None.
        prompts: N token ids ``[P_n]``.
        groups: the prompt of each row.
        rows: ``[B, S]`` token ids, padded on the right.
        starts: position of each prompt's first token.
        first: position of the beginning's first token.

    Returns:
        Where the parts are, the ids ``[1, T]``, and their positions ``[1, T]``.
    """
    device, count = rows.device, 0 if beginning is None else len(beginning)
    lens = [len(prompt) for prompt in prompts]
    longest, width = max(lens), rows.shape[1]
    padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    several = len(lens) > 1
    layout = PackedPrompts(
        beginning=count,
        lens=tuple(lens),
        prompt_tokens=longest,
        groups=tuple(groups),
        row_tokens=width,
        ids=torch.tensor(groups, device=device) if several else None,
        bank_lens=torch.tensor([count + n for n in lens], device=device) if several else None,
    )
    at = torch.tensor(starts, device=device)[:, None]
    behind = torch.tensor([starts[n] + lens[n] for n in groups], device=device)[:, None]
    parts = [padded.flatten(), rows.flatten()]
    positions = [
        (at + torch.arange(longest, device=device)).flatten(),
        (behind + torch.arange(width, device=device)).flatten(),
    ]
    if beginning is not None:
        parts.insert(0, beginning)
        positions.insert(0, first + torch.arange(count, device=device))
    return layout, torch.cat(parts)[None], torch.cat(positions)[None]


def unpack(layout: PackedPrompts, hidden: Tensor) -> Tensor:
    """Hidden states ``[1, T, d]`` as ``[B, 1 + S, d]``: of each row's last prompt token, then of its own tokens."""
    _, prompts, rows = hidden[0].split(layout.sizes)
    last = [prompts[n * layout.prompt_tokens + length - 1] for n, length in enumerate(layout.lens)]
    # Stacked and not indexed, as an index's gradient is a sum in no fixed order on a GPU.
    first = torch.stack([last[n] for n in layout.groups])[:, None]
    return torch.cat([first, rows.unflatten(0, (len(layout.groups), layout.row_tokens))], 1)


def attend(layout: PackedPrompts, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention of one layer over a packed text.

    Args:
        layout: where the parts are.
        query: ``[1, H, T, D]``; key, value: ``[1, H_kv, T, D]``, ``[1, H_kv, T, D_v]``.
        options: further arguments of :func:`fastprefix.prefix_attention`.

    Returns:
        ``[1, T, H, D_v]``.
    """
    # Under autocast, rotary positions leave keys in fp32 and values in bf16; a prefix has one dtype.
    dtype = torch.promote_types(key.dtype, value.dtype)
    parts = [x.split(layout.sizes, 2) for x in (query, key.to(dtype), value.to(dtype))]
    front_k, front_v = (x[0] for x in (parts[1][0], parts[2][0]))  # [H_kv, C, D]
    found = []
    if layout.beginning:
        q, k, v = (x[0] for x in parts)
        found.append(prefix_attention(q, k, v, front_k[:, :0], front_v[:, :0], causal=True, **options))
    number, device = len(layout.lens), query.device  # a model's layers may be on several devices
    q, k, v = (_apart(x[1], number) for x in parts)
    found.append(prefix_attention(q, k, v, front_k, front_v, causal=True, **options))
    bank: dict[str, Any] = {}
    if layout.ids is not None and layout.bank_lens is not None:
        bank = {"prefix_ids": layout.ids.to(device), "prefix_lens": layout.bank_lens.to(device)}
    if layout.beginning:  # each prompt's, of [N, H_kv, C + P, D]
        k, v = (torch.cat([x.expand(number, -1, -1, -1), y], 2) for x, y in ((front_k, k), (front_v, v)))
    front_k, front_v = (k[0], v[0]) if number == 1 else (k, v)
    q, k, v = (_apart(x[2], len(layout.groups)) for x in parts)
    found.append(prefix_attention(q, k, v, front_k, front_v, causal=True, **bank, **options))
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in found])[None]


def _apart(x: Tensor, number: int) -> Tensor:
    """``[1, heads, number * tokens, D]`` as ``[number, heads, tokens, D]``, a view."""
    return x[0].unflatten(1, (number, -1)).transpose(0, 1)
