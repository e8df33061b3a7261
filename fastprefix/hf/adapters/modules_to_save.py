"""Swaps a prefix's trained copies of modules into the model while the prefix is active (PEFT's ``modules_to_save``).

Modules that are swapped out - originals, and the copies of inactive prefixes - are kept in a child of the model, so
that device moves, train/eval modes and optimizers reach them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.modules_per_row import RowModules
from fastprefix.hf.attention.function import SLOT
from fastprefix.hf.model import dtensor, offload
from fastprefix.hf.model.layers import Layers
from fastprefix.hf.runtime.forward_context import AdapterSelection, Name
from fastprefix.hf.runtime.selection import Selection
from fastprefix.prefixes.modules import Modules
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt

KEPT, ENCODERS = "fastprefix_modules", "fastprefix_encoders"
_OURS = {SLOT, KEPT, ENCODERS}


class Kept(nn.Module):
    """Holds the modules that are swapped out of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.original = Modules()
        self.prefixes = nn.ModuleDict()


class TrainedModules:
    """Decides which module is in use at each path of one model for which a prefix has a copy."""

    def __init__(self, model: Any, layers: Layers, selection: Selection) -> None:
        self.model, self.layers, self.selection = model, layers, selection
        self.places: dict[str, tuple[nn.Module, str]] = {}  # by path: parent module, and attribute name there
        self.originals: dict[str, nn.Module] = {}
        self.using: dict[str, nn.Module] = {}  # the copies in use, by path

    def matching(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """The model's own modules whose path ends with one of ``names``, without those nested in another match.

        PEFT matches the same way.
        """
        found: dict[str, nn.Module] = {}
        if not names:
            return found
        with self.in_place({}):
            for path, module in self.model.named_modules():
                inside = any(path.startswith(f"{outer}.") for outer in found)
                if path.endswith(tuple(names)) and not inside and not _OURS & set(path.split(".")):
                    found[path] = module
        return found

    def copies(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """New trainable copies of the modules that ``names`` match; ValueError where a name matches none."""
        found = self.matching(names)
        for name in names:
            if not any(path.endswith(name) for path in found):
                expected = f"the end of a module's name in {type(self.model).__name__}"
                raise fail("modules_to_save", repr(name), expected)
        with self.in_place({}):
            for path, module in found.items():
                self.check(path, module)
            made = {path: offload.copy_module(module) for path, module in found.items()}
            for module in made.values():
                module.zero_grad()
            for path in found:
                parent, _, leaf = path.rpartition(".")
                self.places.setdefault(path, (self.model.get_submodule(parent), leaf))
                self.originals.setdefault(path, found[path])
        return {path: module.requires_grad_(True) for path, module in made.items()}

    def check(self, path: str, module: nn.Module) -> None:
        """Raise ValueError where a module cannot be replaced by a copy, or cannot be trained."""
        inside = {id(m) for m in module.modules()}
        if any(id(m) in inside for m in self.layers.modules):
            raise fail("modules_to_save", f"{path!r}, which holds layers of attention", "modules beside them")
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise fail("modules_to_save", f"{path!r}, a {type(module).__name__}", "modules that are called")
        if is_pefts(module):
            raise fail("modules_to_save", f"{path!r}, which PEFT has put adapters into", "modules of the model's own")
        if any(_is_ours(hook) for m in module.modules() for hook in _hooks(m)):
            raise fail("modules_to_save", f"{path!r}, by which fastprefix moves positions", "other modules")
        if self.layers.shards is not None and _is_shared(module):
            raise fail("modules_to_save", f"{path!r}, which tensor parallelism spreads over processes", "whole modules")
        if not is_plain(module):
            raise fail("modules_to_save", f"{path!r}, whose weights are quantised", "modules that can be trained")
        same = [p for p, m in self.model.named_modules(remove_duplicate=False) if m is module]
        if len(same) > 1:
            raise fail("modules_to_save", f"{path!r}, which is {' and '.join(same)}", "modules that stand in one place")

    @contextmanager
    def in_place(self, chosen: Mapping[str, nn.Module]) -> Iterator[None]:
        """Put these copies into the model inside the block; at all other paths use the originals."""
        before = self.using
        self.use(chosen)
        try:
            yield
        finally:
            self.use(before)

    def use(self, chosen: Mapping[str, nn.Module]) -> None:
        """Put these copies into the model from now on; at all other paths use the originals."""
        if chosen == self.using:
            return
        self.check_places()
        kept = self.model._modules.get(KEPT)
        known = set() if kept is None else {id(m) for m in kept.modules()}
        for path, (parent, leaf) in self.places.items():
            module, now = chosen.get(path, self.originals[path]), parent._modules[leaf]
            if now is not None and now is not module and id(module) not in known:
                module.train(now.training)
            parent._modules[leaf] = module
        self.using = dict(chosen)
        self.keep()

    def check_places(self) -> None:
        """Raise ValueError where user code has replaced one of the modules: its module would be lost."""
        for path, (parent, leaf) in self.places.items():
            if parent._modules.get(leaf) is not self.using.get(path, self.originals[path]):
                expected = "the module that stood there when the prefix was attached: detach before replacing it"
                raise fail("model", f"{type(self.model).__name__} with another {path!r}", expected)

    def keep(self) -> None:
        """Put all swapped-out modules into the model's :class:`Kept` child."""

        def absent(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
            return {path: m for path, m in modules.items() if not self._stands(path, m)}

        children = self.model._modules
        owned = {name: absent(prefix.modules_to_save.named()) for name, prefix in self.selection.prefixes.items()}
        original = absent(self.originals)
        if not original and not any(owned.values()):
            children.pop(KEPT, None)
            return
        kept = children.setdefault(KEPT, Kept().train(self.model.training))
        assert isinstance(kept, Kept)
        kept.original.put(original)
        kept.prefixes.clear()
        for name, modules in owned.items():
            if modules:
                held = kept.prefixes[name] = Modules()
                held.put(modules)

    def forget_unused(self, prefixes: Iterable[Prefix | SoftPrompt]) -> None:
        """Forget the places for which none of these prefixes has a copy; the originals stand there."""
        needed = {path for prefix in prefixes for path in prefix.modules_to_save.named()} | set(self.using)
        for path in self.places.keys() - needed:
            del self.places[path], self.originals[path]
        self.keep()

    def _stands(self, path: str, module: nn.Module) -> bool:
        parent, leaf = self.places[path]
        return parent._modules.get(leaf) is module

    @contextmanager
    def rows(
        self, selection: AdapterSelection, modules: Mapping[Name | None, Mapping[str, nn.Module]]
    ) -> Iterator[None]:
        """Let every row of a batch use its own prefix's modules inside the block.

        Raises:
            ValueError: prefixes differ in a module inside the layers, where rows cannot be told apart.
        """
        chosen: dict[str, nn.Module] = {}
        inner = {id(m) for m in self.layers.main.owner.modules()}
        for path in dict.fromkeys(path for given in modules.values() for path in given):
            of = {name: modules[name].get(path, self.originals[path]) for name in dict.fromkeys(selection.names)}
            if len({id(m) for m in of.values()}) == 1:
                chosen[path] = next(iter(of.values()))
            elif id(self.places[path][0]) in inner:
                got = f"prefixes with different modules at {path!r}, inside the layers"
                raise fail("names", got, "different modules in the model's head alone, or prefixes of one batch each")
            else:
                chosen[path] = RowModules(path, selection, of)
        with self.in_place(chosen):
            yield

    def remove(self) -> None:
        """Put the originals back; a module that user code has put in their place stays."""
        for path, (parent, leaf) in self.places.items():
            if self._stands(path, self.using.get(path, self.originals[path])):
                parent._modules[leaf] = self.originals[path]
        self.using = {}
        self.model._modules.pop(KEPT, None)


def is_pefts(module: nn.Module) -> bool:
    """Whether a module is, or contains, one of PEFT's modules."""
    return any(type(m).__module__.partition(".")[0] == "peft" for m in module.modules())


def is_plain(module: nn.Module) -> bool:
    """Whether a module's weights are plain floating-point parameters, not quantised ones."""
    return all(type(p) is nn.Parameter and p.is_floating_point() for p in module.parameters())


def _is_shared(module: nn.Module) -> bool:
    """Whether tensor parallelism has sharded a module, or replaced its forward: a copy would run the original's."""
    sharded = any(dtensor.is_sharded(p) for p in module.parameters())
    return sharded or any("forward" in inner.__dict__ for inner in module.modules())


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _is_ours(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.partition(".")[0] == "fastprefix"
