"""What runs around each forward of an attached model: positions, packing, the shared MLP, a check that all ran."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastprefix.hf import masks, positions
from fastprefix.hf.checkpointing import Checkpointing
from fastprefix.validation import fail

if TYPE_CHECKING:
    from fastprefix.hf.install import Installation


class ForwardHooks:
    """Hooks on the module that makes positions and masks, and on the input embedding."""

    def __init__(self, state: Installation) -> None:
        self.state = state
        self.paused = False
        self.checked = False
        owner = state.layers.owner
        self.table = positions.learned_table(owner)
        self.checkpointing = Checkpointing(state)
        self.handles = [
            owner.register_forward_pre_hook(self.before, with_kwargs=True),
            owner.register_forward_hook(self.after, always_call=True),
            state.model.get_input_embeddings().register_forward_hook(self.embedded),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.checkpointing.remove()

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shift positions behind the prefix and refuse what cannot be right."""
        state = self.state
        if self.paused or state.active is None:
            return None
        prefix = state.prefixes[state.active]
        kwargs = {**dict(zip(state.layers.owner_arguments, args, strict=False)), **kwargs}
        self.refuse(kwargs)
        kwargs["attention_mask"] = _whole_mask(kwargs)
        self.separate_documents(owner, kwargs)
        if prefix.config.position_offset == "after_prefix":
            offset = prefix.num_virtual_tokens
            kwargs["position_ids"] = positions.content_positions(kwargs, offset, state.layers.causal, self.table)
        elif state.layers.causal and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = positions.content_positions(kwargs, 0, True, self.table)
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and self.checkpointing.needs_input_gradient(embeds):
            kwargs["inputs_embeds"] = embeds.detach().requires_grad_()
        if self.checkpointing.active():
            self.checkpointing.remember_prefix()
        elif prefix.encoder is not None:
            prefix.encoder.share()
        return (), kwargs

    def refuse(self, kwargs: dict[str, Any]) -> None:
        """Raise where the prefix would be ignored or cannot be right."""
        if kwargs.get("output_attentions") or getattr(self.state.model.config, "output_attentions", False):
            raise fail("output_attentions", True, "False: fused attention never materialises its weights")
        if other := self.state.configs.changed():
            got = f"{other!r}, set while a prefix is attached"
            raise fail("attn_implementation", got, "fastprefix: detach first, or the prefix would be ignored")

    def separate_documents(self, owner: nn.Module, kwargs: dict[str, Any]) -> None:
        """Packed rows: transformers looks for documents only where there is no cache, and not in every model."""
        if not self.state.layers.causal:
            return
        takes_cache = "use_cache" in self.state.layers.owner_arguments
        if torch.compiler.is_compiling():
            # The ids cannot be read. In training those that come without a mask may be packed, and need no cache.
            may_be = kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None
            if owner.training and takes_cache and may_be and not kwargs.get("use_cache"):
                kwargs["use_cache"] = False
            return
        masks.boundary = positions.documents(kwargs)
        if masks.boundary is not None and takes_cache:
            kwargs["use_cache"] = False

    def after(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Forget what belongs to this forward; after the first one, check that no layer passed the prefix by."""
        state = self.state
        if self.paused or state.active is None:
            return
        prefix = state.prefixes[state.active]
        if prefix.encoder is not None:
            prefix.encoder.unshare()
        if torch.compiler.is_compiling():
            return
        masks.boundary = None
        if self.checked or output is None:
            return
        missed = [i for i in prefix.layer_indices if not state.slots[i].ran]
        skips_layers = owner.training and getattr(state.model.config, "layerdrop", 0.0) > 0.0
        if missed and not skips_layers:
            name = type(state.model).__name__
            raise RuntimeError(
                f"fastprefix: {name} ran without the attention hook of layers {missed}: the prefix was ignored there"
            )
        self.checked = True

    def embedded(self, embedding: nn.Module, args: Any, output: Tensor) -> None:
        """Reentrant checkpointing returns gradients only through a layer's inputs: make them ask for one."""
        if not self.paused and self.state.active is not None and self.checkpointing.needs_input_gradient(output):
            output.requires_grad_()


def _whole_mask(kwargs: dict[str, Any]) -> Any:
    """A 4-D mask of the caller's own says everything: spell its rows out, so that it is not taken for padding."""
    mask = kwargs.get("attention_mask")
    source = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == 1 and source is not None:
        return mask.expand(-1, -1, source.shape[1], -1)
    return mask
