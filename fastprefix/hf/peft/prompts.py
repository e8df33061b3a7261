"""The forward of PEFT's soft prompts: runs the prompt once and the rows, and returns PEFT's ``[B, P + S, ...]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.peft.adapters import task
from fastprefix.hf.runtime.exactness import why_not_shareable, why_too_long
from fastprefix.hf.runtime.forward_context import AdapterSelection, PrefixBank
from fastprefix.hf.runtime.lm_head_hooks import keeps_some


def forward(model: Any, installation: Installation, selected: AdapterSelection, kwargs: dict[str, Any]) -> Any:
    """The base model's output for the rows, with the prompt's positions in front, as in PEFT."""
    base = model.base_model
    return_dict = kwargs.pop("return_dict", None)
    return_dict = getattr(base.config, "return_dict", True) if return_dict is None else return_dict
    cache = kwargs.get("past_key_values")
    continues = cache is not None and cache.get_seq_length() > 0
    if continues or keeps_some(kwargs) or pools(model):
        output = base(**kwargs, return_dict=True)
    else:
        names = selected.distinct()
        options = {name: kwargs[name] for name in ("output_hidden_states",) if name in kwargs}
        with installation.lock.hold():
            resolved = [installation.selection.provider.resolve(name) for name in names]
            bank, prompt = installation.reader.make_bank(names, resolved, base, options)
            with installation.forward.preparing(bank):
                output = base(**kwargs, return_dict=True)
        _join(output, prompt, _rows(installation, bank, selected, kwargs))
    return output if return_dict else output.to_tuple()


def outgrows(
    model: Any, installation: Installation, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """The reason why a generation after ``tokens`` prompt tokens may grow too long to share the prompt; else None."""
    config = kwargs.get("generation_config") or model.generation_config
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids", kwargs.get("inputs_embeds")))
    if ids is None:
        return None
    if installation.facts.reads_token_ids:
        return why_not_shareable(installation.facts, tokens, {})
    new, whole = (kwargs.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length"))
    last = ids.shape[1] + new if new is not None else max(whole or 0, ids.shape[1] + 20)  # 20 is generate's default
    window = installation.facts.layers.window
    if window is not None and tokens + last > window:
        return f"it may outgrow a window of {window} tokens"
    return why_too_long(installation.facts, tokens + last)


def pools(model: Any) -> bool:
    """Whether the model's output is pooled, without positions."""
    return task(model) == "SEQ_CLS"


def _rows(
    installation: Installation, bank: PrefixBank, selected: AdapterSelection, kwargs: dict[str, Any]
) -> list[int]:
    return [bank.names.index(name) for name in selected.rows(installation.facts.layers.batch_size(kwargs))]


def _join(output: Any, prompt: Any, rows: list[int]) -> None:
    """Put the prompts' outputs ``[N, P, ...]`` in front of the rows' ``[B, S, ...]``, in place."""
    shared = len(set(rows)) == 1

    def join(first: Tensor, rest: Tensor) -> Tensor:
        own = first[rows[0]].expand(len(rows), -1, -1) if shared else first[torch.tensor(rows, device=first.device)]
        return torch.cat([own.to(rest.dtype), rest], 1)

    for name in ("logits", "last_hidden_state"):
        if isinstance(output.get(name), Tensor) and output[name].dim() == 3:
            output[name] = join(prompt[name], output[name])
    if output.get("hidden_states") is not None:
        pairs = zip(prompt["hidden_states"], output["hidden_states"], strict=True)
        output["hidden_states"] = tuple(join(*pair) for pair in pairs)
