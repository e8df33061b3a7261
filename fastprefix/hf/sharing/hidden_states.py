"""Runs a :class:`SharingPlan`: the hidden states that predict every scored token of its rows.

There are two ways. Prompts and rows run as one text, which reads every weight once and which attention takes apart
(``attention/packed_prompts.py``). Or each level of the plan is a forward, whose keys and values the next level reads as
a bank (``prompt_block.py``): for models that do more than attention between tokens, behind an attached prefix, and
under ``torch.compile``, whose graphs a text of another length in every batch would not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.attention import masks, packed_prompts
from fastprefix.hf.attention.position_ids import learned_table
from fastprefix.hf.model import probing
from fastprefix.hf.model.gradient_checkpointing import checkpointed_modules, is_reentrant
from fastprefix.hf.runtime.exactness import why_not_shareable, why_too_long
from fastprefix.hf.runtime.forward_context import ForwardContext
from fastprefix.hf.runtime.lm_head_hooks import replace_hidden
from fastprefix.hf.sharing.plan import SharingPlan
from fastprefix.hf.sharing.prompt_block import PromptBlock, SharedPrompt
from fastprefix.hf.sharing.shared_prompt import opened


def why_not_now(installation: Installation) -> str | None:
    """The reason why no plan at all can run in a model as it is now; None where one can."""
    selection, facts = installation.selection, installation.facts
    if selection.shared is not None or selection.chosen is not None:
        return "a block of shared_prompt or prefix_batch is open"
    if selection.provider.gated:
        return "gated prompts (ADAPTION_PROMPT) are read beside the content"
    if (kind := selection.added()) is not None:
        return f"a {kind} is active, whose output is added to the content's"
    if selection.has_prompts():
        return "a soft prompt is active"
    shares_keys = facts.layers.kv_sources != tuple(range(len(facts.layers.modules)))
    if shares_keys and torch.is_grad_enabled() and is_reentrant(checkpointed_modules(facts.model)):
        return "reentrant checkpointing drops the gradients of keys that layers share (use_reentrant=False keeps them)"
    return None


def why_not(installation: Installation, plan: SharingPlan) -> str | None:
    """The reason why a plan's result would not be that of its whole rows; None where it is."""
    selection, facts = installation.selection, installation.facts
    active = selection.current()
    names = [] if active is None else active.distinct()
    offset = max((selection.provider.resolve(name).offset for name in names), default=0)
    reason = why_not_shareable(facts, plan.longest + offset, {}, embedded=False)
    # A model whose rotary frequencies depend on a text's length takes that of the padded row.
    return reason or why_too_long(facts, plan.longest + offset, plan.length + offset)


@contextmanager
def reading(installation: Installation, plan: SharingPlan, packed: bool = True) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs of a forward that runs a plan inside the block.

    The model's part around all layers returns ``[B, 1 + R, d]`` there: the hidden state of each row's prompt comes
    first, so that place i predicts ``plan.labels[:, i]``.

    Args:
        installation: of the model.
        plan: what to run.
        packed: whether prompts and rows may run as one text.
    """
    way = _as_one_text if packed and fits_one_text(installation, plan) else _level_by_level
    with way(installation, plan) as inputs:
        yield inputs


@contextmanager
def _level_by_level(installation: Installation, plan: SharingPlan) -> Iterator[dict[str, Tensor]]:
    """Let the forward inside the block run a plan's rows, behind forwards of what stands in front of them."""
    reader, slots = installation.reader, installation.slots
    outer = None
    with ExitStack() as stack:
        if plan.beginning is not None:
            outer = PromptBlock(SharedPrompt([plan.beginning], None), reader, slots)
            stack.enter_context(opened(installation, outer))
        block = PromptBlock(SharedPrompt(plan.prompts, plan.groups), reader, slots, outer, plan.starts)
        stack.enter_context(opened(installation, block))
        stack.enter_context(installation.head.prepending())
        yield {"input_ids": plan.rows, "attention_mask": plan.mask}


@contextmanager
def _as_one_text(installation: Installation, plan: SharingPlan) -> Iterator[dict[str, Tensor]]:
    """Let the forward inside the block run a plan as one text ``[1, T]``, and return ``[B, 1 + R, d]``."""
    forward, slots, configs = installation.forward, installation.slots, installation.configs
    first = installation.facts.default_positions.first
    behind = 0 if plan.beginning is None else len(plan.beginning)
    starts = [first + (behind if plan.starts is None else plan.starts[n]) for n in range(len(plan.prompts))]
    layout, ids, positions = packed_prompts.pack(
        plan.beginning, plan.prompts, plan.groups.tolist(), plan.rows, starts, first
    )

    def unpack(module: nn.Module, args: Any, output: Any) -> Any:
        return replace_hidden(output, packed_prompts.unpack(layout, output[0]))

    context = ForwardContext(layers=[None] * len(slots), packed=layout)
    with installation.lock.block(), installation.lock.hold(), forward.bypass(), configs.switched_on():
        handle = installation.facts.layers.main.owner.register_forward_hook(unpack)
        forward.context, masks.requested.none = context, True
        slots.set_packed(layout)
        if installation.checkpointing.active():
            installation.checkpointing.wrap_functions()
        try:
            yield {"input_ids": ids, "position_ids": positions}
        finally:
            handle.remove()
            forward.context, masks.requested.none = None, False
            slots.set_packed(None)


def fits_one_text(installation: Installation, plan: SharingPlan) -> bool:
    """Whether a plan may run as one text: nothing is attached, no position is beyond a table, and the model packs."""
    owner = installation.facts.layers.main.owner
    table = learned_table(owner)
    last = plan.longest + max(plan.starts or [0]) + installation.facts.default_positions.first
    short = table is None or last <= table.num_embeddings - getattr(table, "offset", 0)
    return short and installation.selection.current() is None and packs(installation)


def packs(installation: Installation) -> bool:
    """Whether a model computes prompts and rows as one text as it does one after the other; it is run once to see."""
    facts = installation.facts
    if facts.packs is None:
        facts.packs = not installation.query_scaling.handles and _same_when_packed(installation)
    return facts.packs


def _same_when_packed(installation: Installation) -> bool:
    facts = installation.facts
    owner = facts.layers.main.owner
    ids = facts.layers.main.dummy_inputs(tokens=3)["input_ids"]
    few = torch.arange(1, 10, device=ids.device)
    plan = SharingPlan(
        beginning=few[:2],
        prompts=[few[2:4], few[3:6]],
        starts=None,
        groups=torch.tensor([1, 0, 1]),
        rows=few[:6].view(3, 2),
        mask=torch.ones(3, 2, dtype=torch.long, device=ids.device),
        labels=torch.ones(3, 3, dtype=torch.long, device=ids.device),
        given=0,
        length=0,
    )
    found: list[Tensor] = []
    # The part around all layers by itself, and through whatever stands around it.
    ways = ((owner, True), (facts.model, True), (owner, False))
    device = ids.device.type
    with probing.evaluating(facts.model), torch.autocast(device, enabled=False):
        for module, packed in ways:
            try:
                with (_as_one_text if packed else _level_by_level)(installation, plan) as inputs:
                    found.append(_returned(owner, module, inputs))
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                return False  # the model's own, as it does not take such a text
    want = found[-1].double()
    # In 16 bits a layer's own rounding is large: what is refused for it runs level by level.
    limit = (8 if found[-1].element_size() == 2 else 64) * torch.finfo(found[-1].dtype).eps * want.abs().max()
    return all(x.shape == want.shape and bool((x.double() - want).abs().max() <= limit) for x in found[:-1])


def _returned(owner: nn.Module, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden states that the part around all layers returns last in a forward of this module."""
    kept: list[Tensor] = []
    handle = owner.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    try:
        module(**inputs, use_cache=False)
    finally:
        handle.remove()
    return kept[-1]
