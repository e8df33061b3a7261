"""Launches that add a short prefix, in place, to the result of a vendor kernel on the content: forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton.epilogue_bwd import _prefix_attn_epilogue_bwd_kernel
from ..._triton.epilogue_fwd import _prefix_attn_epilogue_fwd_kernel
from ...machine.device import GPUS
from ...types import AttentionArgs, Needs
from . import kernel_args, launcher
from .kernel_args import constants, empty_bshd, tile_for
from .split_reduce import Partials
from .tile_config import Tile

LARGEST_HEAD_DIM = 256
LARGEST_FP32_HEAD_DIM = 64  # above, products in three parts do not fit the registers


def reasons(args: AttentionArgs) -> list[str]:
    """Why :func:`fwd` cannot take the prefix of a call; empty when it can. Content is not looked at."""
    found = []
    kind = args.q.device.type
    if kind in GPUS and launcher.device(args.q)[0] < 80:
        found.append("device: the kernels need compute capability 8.0")
    elif kind not in GPUS and not launcher.INTERPRETER and not launcher.is_dry_run():
        found.append(f"device {kind}: Triton runs on GPUs")
    if args.q.dtype == torch.float64 or (args.q.dtype == torch.bfloat16 and launcher.INTERPRETER):
        found.append(f"dtype {args.q.dtype}: not in the kernels")
    narrow = args.q.dtype == torch.float32 and not launcher.INTERPRETER
    largest = LARGEST_FP32_HEAD_DIM if narrow else LARGEST_HEAD_DIM
    if max(args.q.shape[3], args.v.shape[3]) > largest:
        found.append(f"head dim: at most {largest}" + (" in fp32" if narrow else ""))
    if args.dropout_p > 0.0:
        found.append("dropout_p: not in the kernels")
    if args.prefix_bias is not None:
        found.append("prefix_bias: not in the kernels")
    if args.packed:
        found.append("prefix_k: a packed bank would have to be spread out, and vendor ops read it as it lies")
    return found


def bwd_reasons(args: AttentionArgs) -> list[str]:
    """Why :func:`bwd` cannot take the prefix of a call; empty when it can."""
    found = reasons(args)
    if args.prefix_ids is not None:
        found.append("prefix_ids: one prefix only")
    elif not found and args.num_prefix_tokens > tile_for(args, "epilogue_bwd").BLOCK_P:
        found.append("prefix: more tokens than one tile's registers hold the gradients of")
    return found


def _sizes(args: AttentionArgs, tile: Tile) -> dict[str, int]:
    block_p = kernel_args.prefix_block(args.num_prefix_tokens, tile.BLOCK_P)
    return {**constants(args), "BLOCK_M": tile.BLOCK_M, "BLOCK_P": block_p}


def fwd(args: AttentionArgs, o: Tensor, lse: Tensor, prefix_lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge the prefix, and sinks, into the content's ``o [B, H, S, D_v]`` and ``lse [B, H, S]`` (natural, fp32; -inf
    and any finite ``o`` where a row saw no content). Both are overwritten, and ``prefix_lse``, contiguous, if given.
    """
    lse = lse.contiguous()
    batch, heads, seq, _ = args.q.shape
    tile = tile_for(args, "epilogue_fwd")
    bank = kernel_args.bank(args)
    if bank.ids is not None and bank.ids_s is None:
        bank = bank._replace(ids_s=0)
    heads_kv = heads // args.groups
    prefix_k, prefix_v = (kernel_args.strided(x) for x in kernel_args.prefix(args))
    launcher.launch(
        _prefix_attn_epilogue_fwd_kernel,
        -(-batch * seq * args.groups // tile.BLOCK_M) * heads_kv,
        *(kernel_args.strided(args.q), prefix_k, prefix_v, kernel_args.strided(o), lse, prefix_lse, args.sinks, bank),
        *(args.scale, args.softcap, batch, seq, args.num_prefix_tokens, heads_kv),
        tile=tile,
        place=args.q,
        **_sizes(args, tile),
    )
    return o, lse


def bwd(
    args: AttentionArgs, o: Tensor, lse: Tensor, do: Tensor, dq: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dprefix_k and dprefix_v, None where not needed, of the **merged** ``o`` and ``lse``.

    The prefix's share is added to ``dq [B, H, S, D]`` in place; without one it is the whole.
    """
    batch, heads, seq, _ = args.q.shape
    tile = tile_for(args, "epilogue_bwd")
    heads_kv = heads // args.groups
    blocks = max(1, -(-batch * seq * args.groups // tile.BLOCK_M))
    add = needs.q and dq is not None
    if not needs.q:
        dq = None
    elif dq is None:
        dq = empty_bshd(args.q)
    # Two programs a multiprocessor; each walks through as many tiles as every other.
    length = -(-blocks // max(1, 2 * launcher.num_sms(args.q) // heads_kv))
    splits = -(-blocks // length)
    asked = (needs.prefix_k, needs.prefix_v, False)
    partials = Partials((args.prefix_k, args.prefix_v, None), splits, asked, bank=False)
    prefix_k, prefix_v = (kernel_args.strided(x) for x in kernel_args.prefix(args))
    launcher.launch(
        _prefix_attn_epilogue_bwd_kernel,
        splits * heads_kv,
        *(kernel_args.strided(args.q), prefix_k, prefix_v),
        kernel_args.strided(o) if needs.q or needs.prefix_k else None,
        *(lse.contiguous(), kernel_args.strided(do), None if dq is None else kernel_args.strided(dq)),
        *(partials.k, partials.v, args.scale, args.softcap),
        *(batch, seq, args.num_prefix_tokens, heads_kv, length),
        tile=tile,
        place=args.q,
        ADD=add,
        **_sizes(args, tile),
    )
    dprefix_k, dprefix_v, _ = partials.reduced()
    return dq, dprefix_k, dprefix_v
