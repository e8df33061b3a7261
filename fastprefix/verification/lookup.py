"""What a table says of a call: the verdict on each route, and its time in the nearest bucket."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..backends import native
from ..machine import device
from ..types import BACKENDS, AttentionArgs, BackendName, Mode
from . import store
from .cells import Cell, cell_of, direction_of
from .routes import Candidate, backend_of, candidate, module, routes
from .table import BAD, Bucket, Table, Verdict

REFERENCE = Candidate(module("reference"), None)
VENDOR = Candidate(module("aten"), None)
NATIVE = Candidate(native, None)
# Devices on which kernels are taken although nothing was checked: the package's own tests run them on processors, and a
# call of the operator there is not kept waiting. No kernel has run on a GPU in these tests.
TRUSTED = ("cpu",)


class Proof(NamedTuple):
    """What is known of a route for a call: its verdict, None without one, and its time in the nearest bucket."""

    route: str
    verdict: Verdict | None
    seconds: float | None


def order(args: AttentionArgs, mode: str) -> tuple[Candidate, ...]:
    """What ``auto`` tries for a call as far as is known, first to last; the reference ends it.

    Args:
        mode: ``forward``, or ``backward`` and ``lowest`` (the prefix's gradients alone) for a backward.
    """
    table, kind = store.table(args.q.device), device.kind(args.q.device)
    proofs = prove(args, mode)
    right = [proof for proof in proofs if proof.verdict is not None and proof.verdict.result == "right"]
    last = [guess for guess in unproved(args, mode) if guess is REFERENCE or _is_trusted(guess, table, args, proofs)]
    own = nearest(table, args, mode).get("reference", math.inf)
    timed = sorted((proof.seconds, proof.route) for proof in right if proof.seconds is not None)
    fast = [candidate(route) for seconds, route in timed if seconds < own]
    # Those of which no time is known come after those of which one is. Interpreted kernels are for tests: where nothing
    # says how slow they are, they are not taken.
    guessed = [
        candidate(proof.route)
        for proof in right
        if proof.seconds is None and not (kind == "cpu" and backend_of(proof.route) == "triton")
    ]
    guessed.sort(key=lambda chosen: chosen.route != chosen.module.guess(args))
    return (*fast, *guessed, *last)


def unproved(args: AttentionArgs, mode: str) -> tuple[Candidate, ...]:
    """What ``auto`` tries where nothing was checked, if it may, first to last; the reference ends it."""
    own = args.q.device.type == "cpu" and native.preferred(args, mode)
    return (NATIVE, VENDOR, REFERENCE) if own else (VENDOR, REFERENCE)


def _is_trusted(guess: Candidate, table: Table, args: AttentionArgs, proofs: list[Proof]) -> bool:
    """Whether a backend may be taken for a call of which nothing is known, or not of all its routes."""
    if device.kind(args.q.device) not in TRUSTED:
        return False
    name = next(name for name in BACKENDS if module(name) is guess.module)
    own = [proof.verdict for proof in proofs if backend_of(proof.route) == name]
    if None not in own or any(found is not None and found.result in BAD for found in own):
        return False
    return not _is_suspect(table, cell_of(args, "forward").dtype, name)


def _is_suspect(table: Table, dtype: str, backend: BackendName) -> bool:
    """Whether a backend was not right somewhere in this dtype; a busy machine may look like a hang."""
    found = [*(x for cell, x in table.verdicts.items() if cell.dtype == dtype)]
    found += [x for bucket, x in table.failures.items() if bucket.dtype == dtype]
    bad = ("wrong", "failed", "crashed")
    return any(x.result in bad and backend_of(route) == backend for verdicts in found for route, x in verdicts.items())


def prove(args: AttentionArgs, mode: str) -> list[Proof]:
    """What is known of every route for a call."""
    table = store.table(args.q.device)
    cell = cell_of(args, "backward" if mode in ("backward", "lowest") else direction_of(args))
    times = nearest(table, args, mode)
    names = routes(args.q.device.type, cell.direction)
    return [Proof(name, verdict(table, cell, name), times.get(name)) for name in names]


def verdict(table: Table, cell: Cell, route: str) -> Verdict | None:
    """What is known of a route on a cell.

    How it failed on a larger call, or the verdict on the cell itself. Without one, and with several arguments: if the
    route was checked without any, with each of them by itself, and with all of them together among others, the worst of
    these verdicts.
    """
    found = table.failure(route, cell) or table.verdict(cell, route)
    if found is not None:
        return found
    wanted = set(cell.features)
    if len(wanted - {"causal"}) < 2:
        return None
    together: list[Verdict] = []
    alone: list[Verdict] = []
    covered: set[frozenset[str]] = set()
    for other, verdicts in table.verdicts.items():
        own, known = frozenset(other.features), verdicts.get(route)
        # A refusal says nothing of other calls: each call is asked by itself whether the backend takes it.
        if (
            known is None
            or known.result == "refused"
            or other[:6] != cell[:6]
            or ("causal" in own) != ("causal" in wanted)
        ):
            continue
        if own > wanted:
            together.append(known)
        elif own < wanted and len(own - {"causal"}) <= 1:
            alone.append(known)
            covered.add(own - {"causal"})
    if not together or covered != {frozenset(), *(frozenset((name,)) for name in wanted - {"causal"})}:
        return None
    known_all = [*together, *alone]
    bad = [x for x in known_all if x.result != "right"]
    return bad[0] if bad else max(known_all, key=lambda x: x.worst or 0.0)


def nearest(table: Table, args: AttentionArgs, mode: str) -> dict[str, float]:
    """Median seconds by route, in the bucket whose shape is nearest to a call's; empty where none was timed."""
    q = args.q.shape
    wanted: Mode = mode if mode in ("backward", "lowest") else direction_of(args)  # type: ignore[assignment]
    dtype, width = cell_of(args, "forward").dtype, max(q[3], args.v.shape[3])
    variant = "plain"
    if args.prefix_ids is not None:
        variant = "bank"
    elif args.key_padding_mask is not None or args.bias is not None or args.segment_ids is not None:
        variant = "masked"

    def distance(x: Bucket) -> tuple[float, ...]:
        sizes = [(x.D, width), (x.P, args.num_prefix_tokens), (x.H // x.H_kv, args.groups), (x.T, args.k.shape[2])]
        sizes += [(x.B, q[0])] if wanted == "decode" else [(x.S, q[2])]
        return x.variant != variant, sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in sizes)

    fitting = [x for x in table.times if x.mode == wanted and x.dtype == dtype]
    return table.times[min(fitting, key=distance)] if fitting else {}


def describe(args: AttentionArgs, mode: str, chosen: Candidate) -> dict[str, str]:
    """For each backend of which something is known for a call: one route that is right and takes it, and who is wrong.

    Of the chosen backend it is the chosen route, of another its fastest.
    """
    table = store.table(args.q.device)
    times = nearest(table, args, mode)
    found: dict[str, list[str]] = {}
    best: dict[str, Proof] = {}
    for proof in sorted(prove(args, mode), key=lambda x: x.seconds or math.inf):
        backend, own = backend_of(proof.route), candidate(proof.route)
        if proof.verdict is None:
            continue
        if proof.verdict.result in BAD:
            found.setdefault(backend, []).append(_bad(proof, table))
        takes = proof.verdict.result == "right" and not own.module.unsupported(args, own.route)
        if takes and (own == chosen or backend not in best):
            best[backend] = proof
    for name, proof in best.items():
        if chosen.route is not None or candidate(proof.route).module is not chosen.module:
            found.setdefault(name, []).insert(0, _proved(proof, times, table))
    return {backend: "; ".join(told) for backend, told in found.items()}


def _proved(proof: Proof, times: dict[str, float], table: Table) -> str:
    """``folded, proved on <device>, <date>, worst error 0.6 of the rule, 2.1x the next (aten:packed)``."""
    assert proof.verdict is not None
    told = f"{_route(proof)}, proved on {table.identity['device']}, {proof.verdict.date}, worst error "
    told += f"{proof.verdict.worst or 0.0:.2g} of the rule, "
    others = {name: seconds for name, seconds in times.items() if name != proof.route}
    if proof.seconds is None or not others:
        return told + "not timed"
    best = min(others, key=others.__getitem__)
    ratio = others[best] / proof.seconds
    return told + (f"{ratio:.2g}x the next ({best})" if ratio >= 1 else f"{1 / ratio:.2g}x slower than {best}")


def _bad(proof: Proof, table: Table) -> str:
    x = proof.verdict
    assert x is not None
    return f"{_route(proof)}, {x.result} on {table.identity['device']}, {x.date}: {x.detail}"


def _route(proof: Proof) -> str:
    return proof.route.partition(":")[2]
