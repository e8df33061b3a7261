"""``TokenDropout``: drops whole tokens of a prefix while it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TokenDropout(nn.Module):
    """Keeps each token of a layer's prefix with probability 1 - p, in training mode alone.

    One draw serves all rows of a forward, so that no row needs a prefix of its own. It comes from the CPU's generator,
    whose state checkpointing restores, and reading it waits for no device.

    Args:
        p: the probability of dropping a token.
        num_frozen_tokens: leading tokens that always stay.
    """

    def __init__(self, p: float, num_frozen_tokens: int) -> None:
        super().__init__()
        self.p, self.num_frozen_tokens = p, num_frozen_tokens

    def forward(
        self, k: Tensor, v: Tensor, bias: Tensor | None, mesh: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys ``[H_kv, P, D]``, values ``[H_kv, P, D_v]`` and bias ``[H_kv, P]`` of the tokens that stay.

        ``mesh``: the processes that have the other heads of these tokens, which all drop what the first one draws.
        """
        if not self.training:
            return k, v, bias
        drawn = torch.rand(k.shape[1])
        if mesh is not None:
            drawn = drawn.to(k.device)
            torch.distributed.broadcast(drawn, group=mesh.get_group(), group_src=0)
        stays = drawn >= self.p
        stays[: self.num_frozen_tokens] = True
        places = stays.nonzero()[:, 0].to(k.device)
        return k[:, places], v[:, places], None if bias is None else bias[:, places]
