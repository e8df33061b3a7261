"""Log-probabilities of groups by the package ``prefix_grouper``, a peer in :mod:`benches.groups`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def log_probabilities(made: Any, prompts: Tensor, completions: Tensor, group: int) -> Tensor:
    """Log-probabilities ``[B, R]`` by prefix_grouper: one row a prompt, with its completions one behind the other."""
    from prefix_grouper import PrefixGrouper
    from transformers import AttentionInterface
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    AttentionInterface.register("prefix_grouper_sdpa", _grouped_attention)
    bare = made.get_base_model()
    bare.set_attn_implementation("prefix_grouper_sdpa")
    masks = torch.ones_like(prompts), torch.ones_like(completions)
    grouper = PrefixGrouper.from_ungrouped_masks(*masks, group_sizes=group, device="cpu")
    before, behind = prompts.shape[1], completions.shape[1]
    own = torch.arange(before).expand(len(prompts), -1), (before + torch.arange(behind)).expand(len(completions), -1)
    positions = grouper.concat_input(own[0], masks[0], own[1], masks[1])
    output = bare.model(
        input_ids=grouper.concat_input(prompts, masks[0], completions, masks[1]),
        position_ids=positions,
        use_cache=False,
        grouper=grouper,
    )
    _, _, hidden, _ = grouper.split_output(output.last_hidden_state, include_prefix_last=1)
    head = bare.get_output_embeddings()
    found = ChunkedLogProbFunction.apply(
        hidden[:, :-1].reshape(-1, hidden.shape[-1]),
        head.weight,
        head.bias,
        completions.reshape(-1),
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy"),
    )
    logps: Tensor = found[0].view(completions.shape)
    return logps


def _grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, grouper: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """prefix_grouper's two calls of attention, each by the vendor's kernel as transformers calls it.

    The package makes masks of padding, for FlashAttention on a GPU. Here the prompts' call is causal without a mask,
    and the completions', which has more keys than rows, gets a lower-right causal one.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows, keys = q.shape[2], k.shape[2]
        seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        mask = None if rows == keys else seen & padding[:, None, None]
        out: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kwargs)[0]
        return out

    out: Tensor = grouper.forward(attend, query, key, value)
    return out, None
