"""``shared_prompt``: a system prompt or few-shot examples that every row reads, computed once per forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import find_installation, install, uninstall
from fastprefix.hf.model import offload, probing
from fastprefix.hf.model.prompt_support import check_prompts, check_tokens
from fastprefix.hf.sharing.prompt_block import PromptBlock, SharedPrompt


@contextmanager
def shared_prompt(model: Any, input_ids: Any, groups: Any = None) -> Iterator[SharedPrompt]:
    """Let all rows inside the block share a prompt - a system prompt, few-shot examples - that is computed once.

    Every forward of a causal model inside the block behaves as if its row's prompt stood in front of the row. The
    prompt runs through the model once, separately from the batch, and every row reads its keys and values. Gradients
    flow through rows and prompt alike into all trainable parameters of the model (LoRA, or all of them). Logits and
    labels are those of the rows' own tokens; with ``labels``, the loss counts a row's first token too, which the prompt
    predicts. The logits are a view: use ``reshape``, not ``view``. Generation computes the prompt once for its cache.
    An attached prefix stands in front of the prompt.

    Blocks can be nested: the outer prompts stand in front of the inner ones, whose order the outer ``groups`` follow. A
    system prompt for the whole batch, and a question for each group, are a tree of which every token runs once.

    Where sharing would not be exact (bidirectional models, active dropout, rows that outgrow a sliding window) the
    prompt is concatenated to every row, with a warning; with a cache this raises and asks for ``use_cache=False``.

    Args:
        model: a transformers model that can carry a prefix, or a PeftModel around one (LoRA; patched ones).
            Nothing is frozen. Idle slots stay in the model after the block; :func:`detach` takes them out.
        input_ids: ``[P]`` token ids; or N prompts, ``[N, P]`` or sequences of different lengths.
        groups: ``[B]`` ints, each row's prompt; needed when there are several (GRPO: one prompt, many completions). For
            a block around another one, the prompt in front of each of the inner block's prompts.

    Yields:
        A :class:`SharedPrompt`, whose ``next_logits`` are the prompt's prediction of each row's first token.

    Raises:
        ValueError: an argument does not fit, or the model cannot carry a prefix.
    """
    bare = bare_model(model)
    probing.check_model(bare)
    check_tokens(bare)
    prompts = prompts_of(input_ids, offload.device(bare.get_input_embeddings()))
    chosen = groups_of(groups, prompts)
    installation = installed(bare)
    selection = installation.selection
    if selection.chosen is not None:
        raise fail("input_ids", "a shared prompt inside a block of prefix_batch", "one block or the other")
    if selection.provider.gated:
        raise fail("model", "one with gated prompts (ADAPTION_PROMPT)", "one without: they are read beside the content")
    outer = selection.shared
    assert outer is None or isinstance(outer, PromptBlock)
    shared = SharedPrompt(prompts, chosen)
    with opened(installation, PromptBlock(shared, installation.reader, installation.slots, outer)):
        yield shared


@contextmanager
def opened(installation: Installation, block: PromptBlock) -> Iterator[None]:
    """Let this thread's forwards inside the block read the block's prompts."""
    with installation.lock.block(), installation.selection.sharing(block), installation.configs.switched_on():
        yield


def installed(bare: Any) -> Installation:
    """The Installation of a bare model, made if there is none.

    Raises:
        ValueError: the model cannot carry prompts; it is left as it was.
    """
    found = find_installation(bare)
    installation = install(bare) if found is None else found
    try:
        check_prompts(installation.facts)
    except ValueError:
        if found is None:
            uninstall(installation)
        raise
    return installation


def bare_model(model: Any) -> Any:
    """The transformers model inside a PeftModel; any other model itself."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "get_base_model") else None
    if config is None:
        return model
    bare = model.get_base_model()
    if config.is_prompt_learning and find_installation(bare) is None:
        raise fail("model", f"a PeftModel with {config.peft_type.value}", "one that fastprefix.patch was called on")
    return bare


def groups_of(groups: Any, prompts: Sequence[Tensor]) -> Tensor | None:
    """Each row's prompt, ``[B]`` on the CPU; None where there is one prompt and nothing was said."""
    if groups is None:
        if len(prompts) > 1:
            raise fail("groups", "None", f"the prompt of each row, as there are {len(prompts)} prompts")
        return None
    if isinstance(groups, str):
        raise fail("groups", repr(groups), "[B] ints")
    chosen = torch.as_tensor(groups).reshape(-1).cpu()
    if not len(chosen) or not are_ids(chosen):
        raise fail("groups", repr(groups), "[B] ints")
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < len(prompts):
        raise fail("groups", f"{int(chosen.min())}..{int(chosen.max())}", f"0..{len(prompts) - 1}")
    return chosen.long()


def prompts_of(input_ids: Any, device: torch.device, name: str = "input_ids") -> list[Tensor]:
    """Token ids ``[P]``, ``[N, P]``, or N sequences of different lengths, as N tensors."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() not in (1, 2) or not are_ids(input_ids) or 0 in input_ids.shape:
            got = f"shape {list(input_ids.shape)}, {input_ids.dtype}"
            raise fail(name, got, "token ids [P] or [N, P], at least one token")
        rows = list(input_ids.reshape(-1, input_ids.shape[-1]))
    elif isinstance(input_ids, Sequence) and input_ids and not isinstance(input_ids, str):
        nested = [input_ids] if isinstance(input_ids[0], int) else input_ids
        if any(isinstance(row, str) for row in nested):
            raise fail(name, "strings", "their token ids")
        rows = [torch.as_tensor(row) for row in nested]
        if any(len(row) and not are_ids(row) for row in rows if row.dim() == 1):
            raise fail(name, "numbers that are not whole", "token ids")
    else:
        raise fail(name, type(input_ids).__name__, "a tensor of token ids, or sequences of them")
    if any(row.dim() != 1 or len(row) == 0 for row in rows):
        raise fail(name, "an empty or nested sequence", "at least one token id in each prompt")
    return [row.long().to(device) for row in rows]


def are_ids(x: Tensor) -> bool:
    """Whether a tensor's numbers are whole."""
    return not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool
