"""What a call of the operator must compute: loops over rows, the fp64 reference, and the rule of errors against both.

Beside the truth stands ``eager``, the same-dtype computation whose error says how exact a dtype can be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.operator_calls import Call, gradients, run


def brute_force(call: Call) -> dict[str, Tensor]:
    """The truth, written row by row from the operator's description alone: fp64, loops, autograd."""
    leaves, opt = call.leaves, call.options
    q, k, v, pk, pv = (leaves[n] for n in ("q", "k", "v", "prefix_k", "prefix_v"))
    B, H, S, D = q.shape
    T, groups = k.shape[2], H // k.shape[1]
    scale = D**-0.5 if opt.get("scale") is None else opt["scale"]
    start = opt.get("q_start")
    start = T - S if start is None else start
    causal, window, softcap = opt.get("causal", True), opt.get("window"), opt.get("softcap")
    padding, segments = opt.get("key_padding_mask"), opt.get("segment_ids")
    sinks, bias, gate, prefix_bias = opt.get("sinks"), opt.get("bias"), opt.get("gate"), opt.get("prefix_bias")
    ids, lens = opt.get("prefix_ids"), opt.get("prefix_lens")
    if bias is not None:
        bias = bias.expand(B, H, S, T)

    def score(row: Tensor, keys: Tensor) -> Tensor:
        s = keys @ row * scale
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    rows, lses = [], []
    for b in range(B):
        first = int(start.reshape(-1)[b if start.numel() > 1 else 0]) if isinstance(start, Tensor) else start
        for h in range(H):
            for i in range(S):
                p = first + i
                seen = [
                    j
                    for j in range(T)
                    if (not causal or j <= p)
                    and (window is None or p - window < j)
                    and (padding is None or bool(padding[b, j]))
                    and (segments is None or int(segments[b, j]) == int(segments[b, min(max(p, 0), T - 1)]))
                    and (
                        bias is None
                        or (bool(bias[b, h, i, j]) if bias.dtype == torch.bool else bias[b, h, i, j] > -1e37)
                    )
                ]
                content = score(q[b, h, i], k[b, h // groups, seen])
                if bias is not None and bias.dtype != torch.bool:
                    content = content + bias[b, h, i, seen]
                my_k, my_v, my_bias = pk, pv, prefix_bias
                if ids is not None:
                    n = int(ids[b] if ids.dim() == 1 else ids[b, i])
                    length = 0 if n < 0 else (int(lens[n]) if lens is not None else pk.shape[2])
                    if pk.dim() == 4:
                        my_k, my_v = pk[n, :, :length], pv[n, :, :length]
                        my_bias = None if prefix_bias is None else prefix_bias[n, :, :length]
                    else:
                        before = int(lens[: max(n, 0)].sum())
                        my_k, my_v = (x[:, before : before + length] for x in (pk, pv))
                        my_bias = None if prefix_bias is None else prefix_bias[:, before : before + length]
                prefix, values_p = score(q[b, h, i], my_k[h // groups]), my_v[h // groups]
                if my_bias is not None:
                    shown = my_bias[h // groups] > -1e37
                    prefix, values_p = (prefix + my_bias[h // groups])[shown], values_p[shown]
                extra = [] if sinks is None else [sinks[h : h + 1]]
                values_c = v[b, h // groups, seen]
                if gate is not None:
                    row, lse = _softmax(torch.cat([content, *extra]), values_c)
                    row = row + (gate[b, h] if gate.dim() == 2 else gate[h]) * _softmax(prefix, values_p)[0]
                else:
                    row, lse = _softmax(torch.cat([prefix, content, *extra]), torch.cat([values_p, values_c]))
                rows.append(row)
                lses.append(lse)
    if not rows:
        rows, lses = [v.new_zeros(0, v.shape[-1])], [v.new_zeros(0)]
    o = torch.stack(rows).view(B, H, S, v.shape[-1])
    return {"o": o.detach(), "lse": torch.stack(lses).view(B, H, S).detach(), **gradients(o, call)}


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """One row; a score without a value is a sink."""
    if scores.numel() == 0:
        return values.sum(0), scores.new_full((), float("-inf"))
    return torch.softmax(scores, 0)[: values.shape[0]] @ values, torch.logsumexp(scores, 0)


def truth(call: Call) -> dict[str, Tensor]:
    """The reference in fp64 on the call's own numbers."""
    return run(call.to(torch.float64), "reference")


def eager(call: Call) -> dict[str, Tensor]:
    """Concatenate, matmul, softmax, matmul, every step in the call's own dtype: the error that dtype is entitled to.

    Content masks come from the library (``tests/operator/test_masks.py`` holds them to brute force). A bank is one
    long prefix, of which a row sees its own part.
    """
    from fastprefix.masks import additive_bias, visible_keys
    from fastprefix.types import AttentionArgs

    leaves, opt = call.leaves, {n: x for n, x in call.options.items() if n != "scale"}
    q, k, v, pk, pv = (leaves[n] for n in ("q", "k", "v", "prefix_k", "prefix_v"))
    B, H, S, D = q.shape
    args = AttentionArgs(**leaves, scale=D**-0.5 if call.options.get("scale") is None else call.options["scale"], **opt)
    prefix_bias = opt.get("prefix_bias")
    if pk.dim() == 4:
        pk, pv = (x.transpose(0, 1).flatten(1, 2) for x in (pk, pv))
        prefix_bias = None if prefix_bias is None else prefix_bias.transpose(0, 1).flatten(1)
    keys = torch.cat([pk.to(q.dtype).expand(B, -1, -1, -1), k], 2).repeat_interleave(args.groups, 1)
    values = torch.cat([pv.to(q.dtype).expand(B, -1, -1, -1), v], 2).repeat_interleave(args.groups, 1)
    s = q @ keys.transpose(-1, -2) * args.scale
    if args.softcap is not None:
        s = args.softcap * torch.tanh(s / args.softcap)
    visible, bias = visible_keys(args), additive_bias(args)
    P = pk.shape[1]
    if bias is not None:
        s = s + torch.nn.functional.pad(bias.to(s.dtype).expand(*bias.shape[:-1], k.shape[2]), (P, 0))
    if prefix_bias is not None:
        columns = prefix_bias.to(s.dtype).masked_fill(prefix_bias <= -1e37, float("-inf"))
        columns = torch.nn.functional.pad(columns, (0, k.shape[2])).repeat_interleave(args.groups, 0)
        s = s + columns.unsqueeze(1)
    if visible is not None:
        full = torch.nn.functional.pad(visible.expand(*visible.shape[:-1], k.shape[2]), (P, 0), value=True)
        s = s.masked_fill(~full, float("-inf"))
    if args.prefix_ids is not None:
        own = torch.nn.functional.pad(_own_prefix(args), (0, k.shape[2]), value=True)
        s = s.masked_fill(~own, float("-inf"))
    if args.sinks is not None:
        s = torch.cat([s, args.sinks.to(s.dtype)[None, :, None, None].expand(B, H, S, 1)], -1)
    o = torch.softmax(s, -1)[..., : values.shape[2]] @ values
    return {"o": o.detach(), "lse": torch.logsumexp(s, -1).detach(), **gradients(o, call)}


def _own_prefix(args: Any) -> Tensor:
    """``[B, 1, S or 1, columns]`` bool: the tokens of a bank, laid out side by side, that a row reads."""
    if args.prefix_k.dim() == 3:
        columns = [(n, True) for n, length in enumerate(args.prefix_lens.tolist()) for _ in range(length)]
    else:
        N, P = args.prefix_k.shape[0], args.prefix_k.shape[2]
        lens = [P] * N if args.prefix_lens is None else args.prefix_lens.tolist()
        columns = [(n, t < lens[n]) for n in range(N) for t in range(P)]
    ids = args.prefix_ids.view(args.q.shape[0], 1, -1, 1)
    return (ids == torch.tensor([n for n, _ in columns])) & torch.tensor([there for _, there in columns])


def assert_within_rule(got: dict[str, Tensor], call: Call, tiny: float = 1e-6) -> None:
    """DESIGN section 7: ``err(ours) <= 2 * err(eager in the same dtype) + tiny``, both against fp64 truth.

    ``tiny`` is, as in flash-attention's own rule, twice the rounding of storing the largest entry; the prefix's
    gradients are sums over all rows, whose rounding grows like a random walk in any order but eager's pairwise one.
    """
    want, peer = truth(call), eager(call)
    for name, x in got.items():
        assert torch.equal(x.isinf(), want[name].isinf()), f"{name}: infinities differ"
        mine, theirs = (
            (y.double() - want[name]).nan_to_num(nan=float("nan"), posinf=0.0, neginf=0.0).abs().max().item()
            if y.numel()
            else 0.0
            for y in (x, peer[name])
        )
        scale = want[name].nan_to_num(neginf=0.0).abs().max().item() if x.numel() else 0.0
        floor = max(tiny, torch.finfo(x.dtype).eps) * max(1.0, scale)
        if name == "dprefix_bias":  # each row's term has the rounding of its o, which is kept in this dtype
            floor *= got["lse"].numel() ** 0.5
        elif name.startswith("dprefix"):
            floor *= max(1.0, 0.1 * got["lse"].numel() ** 0.5)
        assert mine <= 2 * theirs + floor, f"{name}: error {mine:.3e}, eager's {theirs:.3e}"


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tol: float) -> None:
    """Same names, same infinities, everything else within ``tol`` of the largest entry."""
    assert set(got) == set(want)
    for name, x in got.items():
        y = want[name].to(x.dtype)
        assert x.shape == y.shape, name
        assert torch.equal(x.isinf(), y.isinf()), f"{name}: infinities differ"
        error = (x - y).masked_fill(x.isinf(), 0.0).abs().max().item() if x.numel() else 0.0
        bound = tol * max(1.0, y.masked_fill(y.isinf(), 0.0).abs().max().item() if y.numel() else 1.0)
        assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e}"
