"""The ways in which vendor kernels can compute a call, and which of them is taken where none has been measured."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Literal, NamedTuple

from ..types import AttentionArgs
from . import aten_ops_cuda, concatenated_prefix

# Prefix tokens up to which one more pass over q and o beats a vendor call on the folded prefix, which writes o, and the
# backward q's gradient, a second time. An estimate: not run on a GPU.
SHORT = 128
SHORT_ON = ("cuda",)

# Below this many query tokens a group's heads are folded into the rows as well, so that decoding reads each prefix
# tile once per key/value head; above it the copy of q that this takes costs more than it saves.
FOLD_GROUP_UP_TO = 16


class Route(NamedTuple):
    """How a call is computed.

    ``prefix``: ``concatenated`` in front of a copy of the content, for the time of the call; or a part of its own,
    whose rows are the batch's (``folded``) or the batch's and those of a group's heads (``packed``), or which kernels
    of ours add in place to the content's result (``epilogue``). ``cudnn``: cuDNN's kernels on CUDA, else flash
    attention's.
    """

    prefix: Literal["concatenated", "folded", "packed", "epilogue"]
    cudnn: bool = False


ROUTES: dict[str, dict[str, Route]] = {
    "cpu": {"concatenated": Route("concatenated"), "folded": Route("folded"), "packed": Route("packed")},
    "cuda": {
        f"{vendor}-{prefix}": Route(prefix, vendor == "cudnn")
        for vendor in ("flash", "cudnn")
        for prefix in ("epilogue", "folded", "packed")
    },
}


def find(args: AttentionArgs, name: str | None) -> Route:
    """The route of a name; without one, a guess by shapes alone."""
    return guess(args) if name is None else ROUTES[args.q.device.type][name]


def name_of(device_type: str, route: Route) -> str:
    """The inverse of looking a name up; empty where a device has no such route."""
    return next((name for name, found in ROUTES.get(device_type, {}).items() if found == route), "")


def guess(args: AttentionArgs) -> Route:
    """The route that is expected to be the fastest."""
    if concatenated_prefix.preferred(args):
        return Route("concatenated")
    cudnn = aten_ops_cuda.prefers_cudnn(args.q.device)
    if args.q.device.type in SHORT_ON and args.num_prefix_tokens <= SHORT and not _epilogue_reasons(args):
        return Route("epilogue", cudnn)
    packed = args.q.shape[2] <= FOLD_GROUP_UP_TO and args.q.shape[0] > 1
    return Route("packed" if packed else "folded", cudnn)


def reasons(args: AttentionArgs, name: str) -> list[str]:
    """Why a route cannot take a call that vendor kernels can; empty when it can, or when it is the same as another."""
    route = ROUTES.get(args.q.device.type, {}).get(name)
    if route is None:
        return [f"route {name}: not on {args.q.device.type}"]
    found = []
    match route.prefix:
        case "concatenated" if not concatenated_prefix.possible(args):
            found.append("concatenated: takes one prefix without a bias, and content")
        case "packed" if args.groups == 1:
            found.append("packed: a group of one head is folded")
        case "epilogue":
            found += _epilogue_reasons(args)
    if route.cudnn and (reason := aten_ops_cuda.no_cudnn(args.q, args.scale)):
        found.append(f"cudnn: {reason}")
    return found


def epilogue() -> ModuleType:
    """The launches of the kernels that add a short prefix."""
    from .launch import epilogue

    return epilogue


def _epilogue_reasons(args: AttentionArgs) -> list[str]:
    if not _has_triton():
        return ["epilogue: triton is not installed"]
    if args.q.shape[3] % 16 or args.v.shape[3] % 16:
        return ["epilogue: head dims that are no multiples of 16 would be read element by element"]
    if 0 in (args.num_prefix_tokens, args.k.shape[2]):
        return ["epilogue: adds a prefix to content"]
    found: list[str] = epilogue().reasons(args)
    return found


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
