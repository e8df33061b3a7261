"""``NamedPrefixes``: the prefixes of a model by name, as pages hold them; and which models and prefixes cannot be."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.adapters.attached_prefixes import AttachedPrefixes
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.hf.runtime.exactness import why_not_shareable
from fastprefix.hf.runtime.forward_context import Name, ResolvedPrefix
from fastprefix.serving.continuous_batching.paged_prefix import PagedPrefix

Version = tuple[int, int]


class _Kept(NamedTuple):
    prefix: PagedPrefix
    parameters: list[tuple[weakref.ref[Tensor], Version]]  # that it was computed from

    def is_of(self, parameters: list[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it was computed from these parameters, with the numbers that they have now, for such a cache."""
        mine = self.prefix.keys[0]
        if len(parameters) != len(self.parameters) or (mine.dtype, mine.device) != (dtype, device):
            return False
        pairs = zip(parameters, self.parameters, strict=True)
        return all(kept() is p and version == _version(p) for p, (kept, version) in pairs)


def _version(x: Tensor) -> Version:
    """A pair that changes when a parameter's numbers are changed, unless they are written through ``.data``."""
    return x.data_ptr(), 0 if x.is_inference() else x._version


class NamedPrefixes:
    """Reads prefixes of one model when a request names them, and keeps the most recently used ones.

    A request holds its prefix for as long as it runs, whatever is kept here.
    """

    def __init__(self, installation: Installation, provider: AttachedPrefixes, max_resident: int) -> None:
        self.installation, self.provider, self.max_resident = installation, provider, max_resident
        self.lock = threading.Lock()
        self.kept: OrderedDict[Name, _Kept] = OrderedDict()
        self.by_ids: weakref.WeakValueDictionary[tuple[int, ...], PagedPrefix] = weakref.WeakValueDictionary()

    def find(self, ids: tuple[int, ...]) -> PagedPrefix | None:
        """The prefix of these placeholders that a request, or this record, holds."""
        with self.lock:
            return self.by_ids.get(ids)

    @torch.inference_mode(False)
    @torch.no_grad()
    def get(self, name: Name) -> PagedPrefix:
        """The prefix of a name, with the numbers that its parameters have now.

        Raises:
            ValueError: there is none, or it is of a kind that pages cannot hold.
        """
        with self.installation.lock.hold():  # forwards of the engine's thread wait
            resolved = self.provider.resolve(name)
            parameters = list(resolved.parameters())
            with self.lock:
                kept = self.kept.get(name)
                model = self.installation.model
                if kept is not None and kept.is_of(parameters, model.dtype, model.device):
                    self.kept.move_to_end(name)
                    return kept.prefix
            check_prefix(resolved, name, self.provider, self.installation.facts)
            prefix = self._read(resolved, name)
        with self.lock:
            # Prefixes with the same numbers are one, of which requests may hold the older object.
            prefix = self.by_ids.setdefault(prefix.ids, prefix)
            self.kept[name] = _Kept(prefix, [(weakref.ref(p), _version(p)) for p in parameters])
            self.kept.move_to_end(name)
            while len(self.kept) > self.max_resident:
                self.kept.popitem(last=False)
        return prefix

    def _read(self, resolved: ResolvedPrefix, name: Name) -> PagedPrefix:
        installation = self.installation
        with installation.configs.switched_on():
            bank, _ = installation.reader.make_bank([name], [resolved])
        dtype, device = installation.model.dtype, installation.model.device
        keys, values = [], []
        for kv in bank.layers:
            if kv is None:
                expected = "one in every layer: all layers of a page have the same tokens"
                raise fail("prefix", f"{name!r}, a {resolved.kind} of some layers", expected)
            if kv.bias is not None:
                raise fail("prefix", f"{name!r}, a {resolved.kind} with biases", "keys and values alone")
            keys.append(kv.k.transpose(0, 1).to(device, dtype).contiguous())
            values.append(kv.v.transpose(0, 1).to(device, dtype).contiguous())
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # the engine writes pages on a stream of its own
        return PagedPrefix(keys, values)


def check_prefix(resolved: ResolvedPrefix, name: Name, provider: AttachedPrefixes, facts: ModelFacts) -> None:
    """Raise ValueError for a prefix that is more than keys and values in front of the content."""
    what = f"{name!r}, a {resolved.kind}"
    if resolved.added:
        raise fail("prefix", f"{what}, whose output is added to the content's", "one in front of the content")
    if resolved.place != "before":
        raise fail("prefix", f"{what} with place={resolved.place!r}", "one with place='before'")
    if resolved.offset != resolved.tokens:
        expected = "'after_prefix': a page's tokens have positions in front of the content's"
        raise fail("prefix", f"{what} with position_offset='none'", expected)
    if modules := provider.modules(name):
        expected = "none: all requests of a batch run through the same modules"
        raise fail("prefix", f"{what} with modules_to_save ({next(iter(modules))})", expected)
    if resolved.prompt is not None:
        reason = why_not_shareable(facts, resolved.tokens, {})
        if reason is not None:
            raise fail("prefix", f"{what} that would be concatenated to every row ({reason})", "one that rows share")


def check_model(installation: Installation) -> None:
    """Raise ValueError for a model whose layers do not all attend to all of the text in front of a token."""
    facts, model = installation.facts, installation.model
    layers = facts.layers
    config: Any = model.config.get_text_config()
    reasons = {
        "an encoder-decoder": len(layers.stacks) > 1,
        "a model that reads in both directions": not layers.main.causal,
        "a tensor-parallel model": layers.shards is not None,
        f"layers with a window of {layers.window} tokens": layers.window is not None,
        f"layers of other kinds ({', '.join(dict.fromkeys(layers.hybrid_layer_types))})": bool(
            layers.hybrid_layer_types
        ),
        "layers that share keys and values": layers.reuses_modules
        or layers.kv_sources != tuple(range(len(layers.modules))),
        "positions that cannot be moved": not layers.main.takes_positions,
        "biases by position": layers.main.has_position_bias,
        "rotary frequencies that depend on the length of the text": bool(facts.rope_limits),
        "layers with other numbers than num_hidden_layers": [getattr(m, "layer_idx", None) for m in layers.modules]
        != list(range(config.num_hidden_layers)),
        "layers with keys and values of different sizes": len(set(layers.shapes)) > 1
        or layers.shapes[0].head_dim != layers.shapes[0].value_dim,
        "no continuous batching of its own": not hasattr(type(model), "init_continuous_batching"),
    }
    for reason, found in reasons.items():
        if found:
            expected = "a causal language model whose every layer attends to the whole text"
            raise fail("model", f"{type(model).__name__}: {reason}", expected)
