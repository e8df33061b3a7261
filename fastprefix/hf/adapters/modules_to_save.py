"""A prefix's copies of modules of the model (PEFT's ``modules_to_save``): they stand in it while the prefix is active.

What does not stand in the model - the original of a module whose copy does, the copies of other prefixes - is kept in a
child of the model, so that moves to a device, modes and optimizers reach it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.modules_per_row import RowModules
from fastprefix.hf.attention.function import SLOT
from fastprefix.hf.model import offload
from fastprefix.hf.model.layers import Layers
from fastprefix.hf.runtime.forward_context import AdapterSelection, Name
from fastprefix.hf.runtime.selection import Selection
from fastprefix.prefixes.modules import Modules

KEPT, ENCODERS = "fastprefix_modules", "fastprefix_encoders"
_OURS = {SLOT, KEPT, ENCODERS}


class Kept(nn.Module):
    """Modules that stand nowhere in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.original = Modules()
        self.prefixes = nn.ModuleDict()


class TrainedModules:
    """Which module stands at each place of one model that a prefix has a copy for."""

    def __init__(self, model: Any, layers: Layers, selection: Selection) -> None:
        self.model, self.layers, self.selection = model, layers, selection
        self.places: dict[str, tuple[nn.Module, str]] = {}  # the parent, and the name there
        self.originals: dict[str, nn.Module] = {}
        self.using: dict[str, nn.Module] = {}  # instead of them

    def matching(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """The model's own modules whose names end so, those inside of others left out; as PEFT finds them."""
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
        """New copies of the model's modules of these names, to be trained; ValueError where a name leads to none."""
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
        """Raise ValueError where another module could not stand in a module's place, or not be trained."""
        inside = {id(m) for m in module.modules()}
        if any(id(m) in inside for m in self.layers.modules):
            raise fail("modules_to_save", f"{path!r}, which holds layers of attention", "modules beside them")
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise fail("modules_to_save", f"{path!r}, a {type(module).__name__}", "modules that are called")
        if is_pefts(module):
            raise fail("modules_to_save", f"{path!r}, which PEFT has put adapters into", "modules of the model's own")
        if any(_is_ours(hook) for m in module.modules() for hook in _hooks(m)):
            raise fail("modules_to_save", f"{path!r}, by which fastprefix moves positions", "other modules")
        if not is_plain(module):
            raise fail("modules_to_save", f"{path!r}, whose weights are quantised", "modules that can be trained")
        same = [p for p, m in self.model.named_modules(remove_duplicate=False) if m is module]
        if len(same) > 1:
            raise fail("modules_to_save", f"{path!r}, which is {' and '.join(same)}", "modules that stand in one place")

    @contextmanager
    def in_place(self, chosen: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let these stand in the model inside the block, and elsewhere its own."""
        before = self.using
        self.use(chosen)
        try:
            yield
        finally:
            self.use(before)

    def use(self, chosen: Mapping[str, nn.Module]) -> None:
        """Let these stand in the model from now on, and elsewhere its own."""
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
        """Raise ValueError where somebody else has put a module of theirs, which would be lost."""
        for path, (parent, leaf) in self.places.items():
            if parent._modules.get(leaf) is not self.using.get(path, self.originals[path]):
                expected = "the module that stood there when the prefix was attached: detach before replacing it"
                raise fail("model", f"{type(self.model).__name__} with another {path!r}", expected)

    def keep(self) -> None:
        """Hold in the model what belongs to it and stands nowhere in it."""

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

    def _stands(self, path: str, module: nn.Module) -> bool:
        parent, leaf = self.places[path]
        return parent._modules.get(leaf) is module

    @contextmanager
    def rows(
        self, selection: AdapterSelection, modules: Mapping[Name | None, Mapping[str, nn.Module]]
    ) -> Iterator[None]:
        """Let every row of a batch use those of its name inside the block; ValueError where rows are not told apart."""
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
        """Give the model its own back; what somebody else has put there stays."""
        for path, (parent, leaf) in self.places.items():
            if self._stands(path, self.using.get(path, self.originals[path])):
                parent._modules[leaf] = self.originals[path]
        self.using = {}
        self.model._modules.pop(KEPT, None)


def is_pefts(module: nn.Module) -> bool:
    """Whether PEFT has put something of its own into a module."""
    return any(type(m).__module__.partition(".")[0] == "peft" for m in module.modules())


def is_plain(module: nn.Module) -> bool:
    """Whether its weights are plain floats: not quantised."""
    return all(type(p) is nn.Parameter and p.is_floating_point() for p in module.parameters())


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _is_ours(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.partition(".")[0] == "fastprefix"
