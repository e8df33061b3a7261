"""Weights that accelerate offloads: a hook loads a module's weights for its forward, then leaves meta tensors.

The model's own weights are read where the hook stores them. A prefix cannot be trained like that, as its tensors would
be recreated for every forward: if accelerate offloads it too (``cpu_offload`` after ``attach``), it is brought back.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.errors import fail


class Away(NamedTuple):
    """An offloading hook of accelerate, and the prefix of a module's tensor names in the hook's weights map."""

    hook: Any
    prefix: str = ""

    def of(self, name: str) -> Tensor | None:
        """The stored tensor of this name in the module; None for a name that the hook does not know."""
        try:
            x = self.hook.weights_map[self.prefix + name]
        except KeyError:
            return None
        return x if isinstance(x, Tensor) and not x.is_meta else None


def hook_of(module: nn.Module) -> Any:
    """The hook with which accelerate offloads a module's own weights; None without one."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            return each
    return None


def tensors(module: nn.Module, away: Away | None = None, name: str = "") -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Each parameter and buffer of a state dict: name, tensor, and the loaded or stored weights (None: unknown)."""
    hook = hook_of(module)
    if hook is not None:
        away = Away(hook)
    persistent = {n: x for n, x in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for n, x in (*module._parameters.items(), *persistent.items()):
        if x is not None:
            yield name + n, x, x if not x.is_meta else None if away is None else away.of(n)
    inner = away if away is not None and away.hook.place_submodules else None
    for n, child in module._modules.items():
        if child is not None:
            below = None if inner is None else Away(inner.hook, f"{inner.prefix}{n}.")
            yield from tensors(child, below, f"{name}{n}.")


def state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, with stored weights in place of meta tensors."""
    if not any(x.is_meta for x in (*module.parameters(), *module.buffers())):
        return dict(module.state_dict())
    return {name: _known(name, module, real).detach() for name, _, real in tensors(module)}


def _known(name: str, module: nn.Module, real: Tensor | None) -> Tensor:
    if real is None:
        raise fail("model", f"{type(module).__name__} with {name} on the meta device", "one with its weights at hand")
    return real


def meta_parameters(model: nn.Module) -> list[str]:
    """Names of parameters on the meta device that no hook loads."""
    return [name for name, x, real in tensors(model) if isinstance(x, nn.Parameter) and real is None]


def device(module: nn.Module) -> torch.device:
    """The device on which a module computes: its first parameter's, or the one to which a hook loads that."""
    for each in module.modules():
        hook = hook_of(each)
        if hook is not None and (hook.place_submodules or each._parameters):
            return torch.device(hook.execution_device)
        for p in each._parameters.values():
            if p is not None:
                return p.device
    raise fail("model", f"{type(module).__name__} without parameters", "a module with some")


def refuse_offloaded_layers(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Raise ValueError where a hook loads whole attention layers: it would look for a prefix's weights too."""
    for name, module in model.named_modules():
        hook = hook_of(module)
        if hook is not None and hook.place_submodules and {id(m) for m in module.modules()} & {id(m) for m in layers}:
            got = f"{type(model).__name__}, of which accelerate offloads {name or 'everything'} as a whole"
            raise fail("model", got, "no layers of attention, nor what holds them, in preload_module_classes")


def copy_module(module: nn.Module) -> nn.Module:
    """A copy of a module with its own weights on the execution device, to which it moves its inputs as before."""
    hooked = [(name, m) for name, m in module.named_modules() if m.__dict__.get("_hf_hook") is not None]
    if not hooked:
        return copy.deepcopy(module)
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    # Hooks are not copied, as one holds the weights of the whole model.
    made = copy.deepcopy(module, {id(m._hf_hook): m._hf_hook for _, m in hooked})
    real = state_dict(module)
    for name, _ in hooked:
        inner = made.get_submodule(name)
        hook: Any = inner._hf_hook
        inner.__dict__["forward"] = inner.__dict__.pop("_old_forward")
        del inner.__dict__["_hf_hook"]
        where, same = _execution(hook)
        for n, p in inner._parameters.items():
            if p is not None and where is not None:
                x = real[f"{name}.{n}" if name else n]
                inner._parameters[n] = nn.Parameter(x.to(where, copy=True), p.requires_grad)
        if where is not None:
            add_hook_to_module(inner, AlignDevicesHook(where, io_same_device=same))
    return made


def _execution(hook: Any) -> tuple[torch.device | None, bool]:
    """A hook's execution device, and whether it moves outputs back to the inputs' device."""
    found = [h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "execution_device", None) is not None]
    where = torch.device(found[-1].execution_device) if found else None
    return where, any(h.io_same_device for h in found)


def remove_offload_hooks(module: nn.Module) -> None:
    """Remove offloading from a module, so that it keeps its weights as trainable parameters."""
    for inner in module.modules():
        if hook_of(inner) is not None:
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(inner)


class AttachedParameters:
    """Remembers the parameter objects of attached prefixes, which optimizers hold."""

    def __init__(self) -> None:
        self.known: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        self.strays: list[weakref.ref[nn.Parameter]] = []  # replaced them while they were offloaded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "strays": []}

    def remember(self, name: str, prefix: nn.Module) -> None:
        """Remember the parameters of the prefix of this name."""
        named = ((m, n, p) for m in prefix.modules() for n, p in m._parameters.items())
        self.known[name] = [(m, n, p) for m, n, p in named if p is not None and not p.is_meta]

    def check_trained(self) -> None:
        """Raise ValueError where an optimizer still holds the parameters that replaced a prefix's meanwhile."""
        self.strays = [stray for stray in self.strays if stray() is not None]
        if self.strays and torch.is_grad_enabled():
            got = "a prefix that was offloaded, and an optimizer, or a list, of parameters from then"
            raise fail("model", got, "an optimizer of the prefix's parameters as they are now: those are not trained")

    def bring_back(self, model: nn.Module) -> None:
        """Bring back prefix parameters that accelerate offloaded; ValueError where a whole layer's hook holds them."""
        away = [each for known in self.known.values() for each in known if _is_away(each[0], each[1])]
        if not away:
            return
        for module, name, _ in away:
            if hook_of(module) is not None:
                self._bring_back(module, name)
            elif any(getattr(hook_of(m), "place_submodules", False) for m in model.modules()):
                got = f"a prefix whose {name} was offloaded with the layer around it"
                expected = "attach after offloading, without layers of attention in preload_module_classes"
                raise fail("model", got, expected)

    def _all(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        for known in self.known.values():
            yield from known

    @torch.no_grad()
    def _bring_back(self, module: nn.Module, name: str) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

        if not _is_away(module, name):
            return
        hook = hook_of(module)
        where, same = _execution(module._hf_hook)
        others = {n: q for m, n, q in self._all() if m is module}
        read = {n: Away(hook).of(n) for n in others}
        self.strays += [weakref.ref(x) for n in others if (x := module._parameters.get(n)) is not None]
        remove_hook_from_module(module)
        for n, q in others.items():
            value = read[n]
            assert value is not None
            if value.data_ptr() != q.data_ptr():
                q.copy_(value)
            if where is not None:
                q.data = q.data.to(where)
            module._parameters[n] = q
        if where is not None and type(module).__module__.partition(".")[0] != "fastprefix":
            add_hook_to_module(module, AlignDevicesHook(where, io_same_device=same))


def _is_away(module: nn.Module, name: str) -> bool:
    x = module._parameters.get(name)
    return x is not None and x.is_meta
