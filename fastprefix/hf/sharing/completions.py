"""``completion_logprobs``: log-probabilities of completions, for a training loop or an evaluation of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.lookup import find_installation, uninstall
from fastprefix.hf.model import dtensor, offload, probing
from fastprefix.hf.model.prompt_support import check_tokens
from fastprefix.hf.sharing import hidden_states
from fastprefix.hf.sharing.output_head import OutputHead, log_probabilities
from fastprefix.hf.sharing.plan import plan_groups
from fastprefix.hf.sharing.shared_prompt import are_ids, bare_model, groups_of, installed, prompts_of


class CompletionLogprobs(NamedTuple):
    """The result of :func:`completion_logprobs`."""

    logprobs: Tensor  # [B, R], 0 at padding
    entropies: Tensor | None  # [B, R] in nats, 0 at padding
    mask: Tensor  # [B, R] bool, which tokens are real


def completion_logprobs(
    model: Any,
    prompts: Any,
    completions: Any,
    groups: Any = None,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> CompletionLogprobs:
    """Log-probabilities of every token of completions, each prompt computed once.

    The prompts run through the model as one batch, and the completions read their keys and values; a beginning that all
    prompts have (a system prompt, few-shot examples) runs once too. Gradients flow through prompts and completions into
    all trainable parameters. The head runs for some tokens at a time, in the backward pass again, so that logits
    ``[B, R, V]`` never exist. The options of a multiple choice after one context are completions of one prompt.

    Where sharing would not be exact (active dropout, rows that outgrow a sliding window) the prompt is concatenated to
    every row, with a warning.

    Args:
        model: a causal language model of transformers, or a PeftModel around one (LoRA; patched ones).
        prompts: ``[P]`` token ids; or N prompts, ``[N, P]`` or sequences of different lengths.
        completions: ``[B, R]`` token ids padded on the right, with ``mask``; or B sequences of different lengths.
        groups: ``[B]`` ints, each completion's prompt; needed when there are several.
        mask: ``[B, R]``, 1 for tokens and 0 for padding; by default all of a tensor's tokens are real.
        temperature: what logits are divided by, above 0.
        entropy: whether to return the entropy of each prediction too.

    Returns:
        :class:`CompletionLogprobs`; log-probabilities are in fp32, of an fp64 model in fp64.

    Raises:
        ValueError: an argument does not fit, or the model cannot read a prompt in front of its rows.
    """
    bare = bare_model(model)
    probing.check_model(bare)
    check_tokens(bare)
    device = offload.device(bare.get_input_embeddings())
    rows, real = completions_of(completions, mask, device)
    tokens = prompts_of(prompts, device, name="prompts")
    chosen = groups_of(groups, tokens)
    chosen = torch.zeros(len(rows), dtype=torch.long) if chosen is None else chosen
    if len(chosen) != len(rows):
        raise fail("groups", f"{len(chosen)} groups", f"one for each of the {len(rows)} completions")
    if not isinstance(temperature, int | float) or not 1e-6 <= temperature <= 1e6:
        raise fail("temperature", repr(temperature), "a number from 1e-6 to 1e6")
    vocabulary = bare.get_input_embeddings().weight.shape[0]
    for name, ids in (("completions", rows[real]), ("prompts", torch.cat(tokens))):
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise fail(name, f"ids from {int(ids.min())} to {int(ids.max())}", f"token ids from 0 to {vocabulary - 1}")
    dtensor.refuse(bare)
    fresh = find_installation(bare) is None
    installation = installed(bare)
    if installation.selection.shared is not None or installation.selection.chosen is not None:
        raise fail(
            "model", "one inside a block of shared_prompt or prefix_batch", "one outside: a block is opened here"
        )
    if installation.selection.provider.gated:
        raise fail("model", "one with gated prompts (ADAPTION_PROMPT)", "one without: they are read beside the content")
    if not installation.facts.layers.main.causal:
        got = f"{type(bare).__name__}, which reads text in both directions"
        raise fail("model", got, "a causal language model: what follows a token must not change it")
    if not installation.facts.head_checked:
        try:
            OutputHead(installation, None).check()
        except ValueError:
            if fresh:
                uninstall(installation)
            raise
        installation.facts.head_checked = True
    plan = plan_groups(tokens, rows, real, chosen)
    owner = installation.facts.layers.main.owner
    # Where it is not exact prompts are concatenated, with a warning.
    exact = (hidden_states.why_not_now(installation) or hidden_states.why_not(installation, plan)) is None
    with hidden_states.reading(installation, plan, packed=exact) as inputs:
        output = owner(**inputs, use_cache=False)
    hidden = output[0]  # [B, 1 + R, d]
    found, entropies = log_probabilities(OutputHead(installation, output), hidden, plan.labels, temperature, entropy)
    width = rows.shape[1]
    return CompletionLogprobs(found[:, :width], None if entropies is None else entropies[:, :width], real)


def completions_of(
    completions: Any, mask: Any, device: torch.device, name: str = "completions"
) -> tuple[Tensor, Tensor]:
    """Completions as ``[B, R]`` token ids padded on the right, and which of them are real."""
    if not isinstance(completions, Tensor):
        if not isinstance(completions, Sequence) or isinstance(completions, str) or not completions:
            raise fail(name, type(completions).__name__, "a tensor [B, R] of token ids, or sequences of them")
        if mask is not None:
            raise fail("mask", type(mask).__name__, "None beside sequences, whose lengths say the same")
        if any(isinstance(row, str) for row in completions):
            raise fail(name, "strings", "their token ids")
        each = [torch.as_tensor(row) for row in completions]
        if any(row.dim() != 1 or not len(row) or not are_ids(row) for row in each):
            raise fail(name, "a sequence without ids, or nested", "one token id or more in each completion")
        lengths = torch.tensor([len(row) for row in each], device=device)
        rows = nn.utils.rnn.pad_sequence([row.long().to(device) for row in each], batch_first=True)
        return rows, torch.arange(rows.shape[1], device=device) < lengths[:, None]
    if completions.dim() != 2 or not are_ids(completions) or 0 in completions.shape:
        got = f"shape {list(completions.shape)}, {completions.dtype}"
        raise fail(name, got, "token ids [B, R], at least one token")
    rows = completions.long().to(device)
    if mask is None:
        return rows, torch.ones_like(rows, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != rows.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise fail("mask", shape, f"a tensor of completions' shape {list(rows.shape)}")
    real = mask.to(device).bool()
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise fail("mask", "a token behind padding", "completions padded on the right")
    return rows, real
