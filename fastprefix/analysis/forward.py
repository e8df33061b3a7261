"""One forward of a model with a prefix, layer by layer: what each layer's attention was called with.

A layer is looked at while it runs and is then forgotten, so that an analysis holds what it sums up of a layer, and
never all layers' queries, keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.functional import prefix_attention
from fastprefix.hf.adapters.attached_prefixes import AttachedPrefixes
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation, require_not_patched
from fastprefix.hf.adapters.prefix_batch import prefix_batch
from fastprefix.hf.attention.recording import AttentionCall, observing
from fastprefix.hf.model import probing

PREFIX_OPTIONS = ("prefix_ids", "prefix_lens", "prefix_bias")
_SHARED = ("scale", "softcap")  # what prefix and content have in common


@dataclass(frozen=True)
class Layer:
    """One call of attention in a forward.

    Attributes:
        name: the attention module's name in the model.
        part: ``"encoder"``, ``"decoder"`` or ``"cross"`` in an encoder-decoder, else None.
        tensors: ``q [B, H, S, D]``, ``k [B, H_kv, T, D]``, ``v [B, H_kv, T, D_v]``, ``prefix_k`` and ``prefix_v``.
        options: the other arguments of :func:`fastprefix.prefix_attention`.
        real: ``[B, S]`` bool, the rows that are not padding.
    """

    name: str
    part: str | None
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    real: Tensor

    @property
    def tokens(self) -> int:
        """Prefix tokens P; of a bank, those of all its prefixes."""
        return self.tensors["prefix_k"].shape[-2]

    def whole(self) -> tuple[Tensor, Tensor]:
        """Output ``[B, H, S, D_v]`` and log-sum-exp ``[B, H, S]`` over prefix and content."""
        return prefix_attention(**self.tensors, **self.options, return_lse=True)

    def of_prefix(self) -> tuple[Tensor, Tensor]:
        """The same over the prefix alone; a row that reads no prefix has 0 and -inf."""
        kept = {name: x for name, x in self.options.items() if name in (*PREFIX_OPTIONS, *_SHARED)}
        nothing = {name: self.tensors[name][:, :, :0] for name in ("k", "v")}
        return prefix_attention(**{**self.tensors, **nothing}, **kept, causal=False, return_lse=True)

    def of_content(self) -> tuple[Tensor, Tensor]:
        """The same over the content alone, with the layer's sinks; a row that sees nothing has 0 and -inf."""
        kept = {name: x for name, x in self.options.items() if name not in PREFIX_OPTIONS}
        q, k, v = (self.tensors[name] for name in ("q", "k", "v"))
        nothing = {
            "prefix_k": q.new_empty(k.shape[1], 0, q.shape[3]),
            "prefix_v": v.new_empty(k.shape[1], 0, v.shape[3]),
        }
        return prefix_attention(**{**self.tensors, **nothing}, **kept, return_lse=True)

    def mass(self) -> Tensor:
        """``[B, H, S]``, the share of the attention that the prefix has: ``sigmoid(lse_p - lse_c)``."""
        return share(self.of_prefix()[1], self.of_content()[1])


def share(prefix_lse: Tensor, content_lse: Tensor) -> Tensor:
    """The prefix's share of attention; 0 for a row that sees neither prefix nor content."""
    neither = torch.isneginf(prefix_lse) & torch.isneginf(content_lse)
    return torch.sigmoid(torch.where(neither, -torch.inf, prefix_lse - content_lse))


def look(model: Any, batch: Mapping[str, Any], see: Callable[[Layer], None], name: str | None = None) -> None:
    """Run the model once, in eval mode without gradients, and hand every layer that reads a prefix to ``see``.

    Args:
        model: with a prefix attached (or a patched PEFT model).
        batch: the keyword arguments of the model's forward, as a tokenizer makes them.
        see: called in the layers' order, inside the forward.
        name: of the prefix; None for those that the model's next forward reads.

    Raises:
        ValueError: the model has no such prefix or it is none that shares a softmax with the content, or the batch does
            not fit.
    """
    installation = checked(model, batch)
    with selected(installation, name):
        _refuse(installation, name)
        seen = 0

        def one(layer: Layer) -> None:
            nonlocal seen
            if layer.tokens:
                seen += 1
                see(layer)

        run(installation, batch, one)
    if not seen:
        raise _inside(installation, name)


def checked(model: Any, batch: Any) -> Installation:
    """The installation of a model; raises ValueError for a model without one, or a batch that is none."""
    installation = require_installation(model)
    check_batch(batch)
    return installation


def check_batch(batch: Any) -> None:
    """Raise ValueError for a batch that is none."""
    if not isinstance(batch, Mapping) or not any(isinstance(x, Tensor) for x in batch.values()):
        got = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise fail("batch", got, "a mapping of tensors, the arguments of the model's forward, as a tokenizer returns")


def run(installation: Installation, batch: Mapping[str, Any], see: Callable[[Layer], None], **options: Any) -> Any:
    """Run the model on a batch, and hand every layer to ``see``; returns the model's output.

    Calls that a soft prompt makes before the rows are left out.
    """
    model, layers = installation.model, installation.facts.layers
    names = {id(module): name for name, module in model.named_modules()}
    parts = {id(module): part for module, part in zip(layers.modules, layers.parts, strict=True)}

    def record(call: AttentionCall) -> None:
        if installation.forward.nested is None:
            part = parts.get(id(call.module))
            real = _real(batch, part, call)
            see(Layer(names.get(id(call.module), "?"), part, call.tensors, call.options, real))

    with installation.lock.hold(), observing(record):
        return forward(model, batch, **options)


def forward(model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
    """Run a model in eval mode, without a cache where it has one."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        options.setdefault("use_cache", False)
    with probing.evaluating(model):
        return model(**{**batch, **options})


def run_bare(installation: Installation, batch: Mapping[str, Any], see: Callable[[Layer], None]) -> None:
    """Run the model without any prefix on a batch, and hand every layer to ``see``."""
    attached = isinstance(installation.selection.provider, AttachedPrefixes)
    active = installation.selection.active
    with installation.lock.hold():
        if attached:
            installation.activate(None)  # the modules that were trained with a prefix leave the model with it
        try:
            with installation.configs.switched_on(), installation.forward.bypass():
                run(installation, batch, see)
        finally:
            if attached:
                installation.activate(active)


def _real(batch: Mapping[str, Any], part: str | None, call: AttentionCall) -> Tensor:
    """``[B, S]`` bool, the query rows of a call that are not padding."""
    q, k = call.tensors["q"], call.tensors["k"]
    shape = (q.shape[0], q.shape[2])
    name = "decoder_attention_mask" if part in ("decoder", "cross") else "attention_mask"
    mask = batch.get(name)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=q.device)
    if mask.dim() == 2 and tuple(mask.shape) == shape:
        return mask.to(q.device).bool()
    # A sound's mask is one of samples, and the model makes one of frames.
    found = call.options.get("key_padding_mask")
    if isinstance(found, Tensor) and tuple(found.shape) == shape and k.shape[2] == shape[1]:
        return found
    raise fail("batch", f"{name} of shape {list(mask.shape)}", f"[B, S] = {list(shape)}, by which padding is told")


@contextmanager
def selected(installation: Installation, name: str | None) -> Iterator[None]:
    """Let every row inside the block read the prefix of a name; None leaves the selection as it is."""
    if name is None:
        yield
        return
    if name not in installation.selection.provider.names():
        raise fail("name", repr(name), f"None or one of {sorted(installation.selection.provider.names())}")
    with prefix_batch(installation.model, [name]):
        yield


def _refuse(installation: Installation, name: str | None) -> None:
    """Raise ValueError where no prefix is read, or one that is added to the content's output."""
    current = installation.selection.current()
    if current is None or not current.distinct():
        raise fail("name", name, "a prefix: none is active (fastprefix.set_prefix)")
    kind = installation.selection.added()
    if kind is not None:
        expected = "a prefix in one softmax with the content: what is added to the output has no share of attention"
        raise fail("name", f"{_named(installation, name)}, a {kind}", expected)

    if installation.selection.inner_place() is not None:
        raise _inside(installation, name)


def _inside(installation: Installation, name: str | None) -> ValueError:
    got = f"{_named(installation, name)}, a soft prompt that runs inside every row"
    return fail("name", got, "a prefix, or a soft prompt that is computed once (place='before' in a causal model)")


def named_prefix(model: Any, name: str | None) -> tuple[Installation, str, Any]:
    """The installation of a model that is not patched, and the prefix of a name, or the active one.

    Raises:
        ValueError: the model has no such prefix, or it is a patched PEFT model.
    """
    installation = require_installation(model)
    require_not_patched(installation)
    name = installation.selection.active if name is None else name
    if name is None:
        known = sorted(map(str, installation.selection.prefixes))
        raise fail("name", name, f"a prefix: none is active (fastprefix.set_prefix), and the model has {known}")
    return installation, name, installation.selection.named(name)


def _named(installation: Installation, name: str | None) -> str:
    current = installation.selection.current()
    return repr(name) if name is not None or current is None else ", ".join(map(repr, current.distinct()))
