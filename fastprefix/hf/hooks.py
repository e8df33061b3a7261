"""What runs around each forward of an attached model: positions, packing, the shared MLP, a check that all ran."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastprefix.hf import masks, positions
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.install import Installation


class ForwardHooks:
    """Hooks on the module that makes positions and masks, and on the input embedding."""

    def __init__(self, state: Installation) -> None:
        self.state = state
        self.paused = False
        self.checked = False
        self.packed_at: int | None = None  # dense masks made before a forward of packed documents
        owner = state.layers.owner
        self.table = positions.learned_table(owner)
        self.checkpointed = [m for m in state.model.modules() if hasattr(m, "gradient_checkpointing")]
        self.handles = [
            owner.register_forward_pre_hook(self.before, with_kwargs=True),
            owner.register_forward_hook(self.after, always_call=True),
            state.model.get_input_embeddings().register_forward_hook(self.embedded),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shift positions behind the prefix and refuse what cannot be right."""
        state = self.state
        if self.paused or state.active is None:
            return None
        prefix = state.prefixes[state.active]
        kwargs = {**dict(zip(state.layers.owner_arguments, args, strict=False)), **kwargs}
        if kwargs.get("output_attentions") or getattr(state.model.config, "output_attentions", False):
            raise fail("output_attentions", True, "False: fused attention never materialises its weights")
        kwargs["attention_mask"] = _whole_mask(kwargs)
        self.packed_at = None
        if positions.is_packed(kwargs):
            if "use_cache" in state.layers.owner_arguments:
                kwargs["use_cache"] = False  # transformers looks for documents only where there is no cache
            self.packed_at = masks.dense_masks_made
        if prefix.config.position_offset == "after_prefix":
            offset = prefix.num_virtual_tokens
            kwargs["position_ids"] = positions.content_positions(kwargs, offset, state.layers.causal, self.table)
        elif state.layers.causal and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = positions.content_positions(kwargs, 0, True, self.table)
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and self.needs_input_gradient(embeds):
            kwargs["inputs_embeds"] = embeds.detach().requires_grad_()
        if prefix.encoder is not None and not self.checkpointing():
            prefix.encoder.share()
        return (), kwargs

    def after(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Forget the shared MLP output; after the first forward, check that no layer passed the prefix by."""
        state = self.state
        if self.paused or state.active is None:
            return
        prefix = state.prefixes[state.active]
        if prefix.encoder is not None:
            prefix.encoder.unshare()
        if output is None or torch.compiler.is_compiling():
            return
        name = type(state.model).__name__
        if self.packed_at == masks.dense_masks_made:
            packed = "packed documents (they jump)"
            raise fail("position_ids", packed, f"one document a row: {name} makes its mask without position ids")
        if self.checked:
            return
        missed = [i for i in prefix.layer_indices if not state.slots[i].ran]
        skips_layers = owner.training and getattr(state.model.config, "layerdrop", 0.0) > 0.0
        if missed and not skips_layers:
            raise RuntimeError(
                f"fastprefix: {name} ran without the attention hook of layers {missed}: the prefix was ignored there"
            )
        self.checked = True

    def embedded(self, embedding: nn.Module, args: Any, output: Tensor) -> None:
        """Reentrant checkpointing returns gradients only through a layer's inputs: make them ask for one."""
        if not self.paused and self.state.active is not None and self.needs_input_gradient(output):
            output.requires_grad_()

    def checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(m.gradient_checkpointing and m.training for m in self.checkpointed)

    def needs_input_gradient(self, hidden: Tensor) -> bool:
        """Whether reentrant checkpointing would otherwise drop the prefix's gradient."""
        if hidden.requires_grad or not torch.is_grad_enabled():
            return False
        for module in self.checkpointed:
            if module.gradient_checkpointing and module.training:
                function = getattr(module, "_gradient_checkpointing_func", None)
                keywords = function.keywords if isinstance(function, functools.partial) else {}
                return bool(keywords.get("use_reentrant", True))
        return False


def _whole_mask(kwargs: dict[str, Any]) -> Any:
    """A 4-D mask of the caller's own says everything: spell its rows out, so that it is not taken for padding."""
    mask = kwargs.get("attention_mask")
    source = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == 1 and source is not None:
        return mask.expand(-1, -1, source.shape[1], -1)
    return mask
