"""What a key or value that is not finite does behind a padding mask, where its score is hidden and its product is not.

A softmax gives it the weight 0, and 0 times nan is nan: whether it counts depends on how a kernel multiplies. So each
backend is measured, and the table in ``docs/operator.md`` says what was found.
"""

from __future__ import annotations

import torch

from fastprefix import prefix_attention
from tests.support.operator_calls import make_call

HIDDEN, REACHES = "hidden", "reaches the outputs of its row and the gradients"


def measured(backend: str, name: str) -> str:
    """What nan in a padded place of ``"k"`` or ``"v"`` does in a backend; another row's output is never touched."""
    torch.manual_seed(0)
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[0, :2] = False
    call = make_call()
    with torch.no_grad():
        call.leaves[name][0, :, :2] = float("nan")
    o = prefix_attention(**call.leaves, key_padding_mask=padding, backend=backend)
    real, other = o[0, :, 2:], o[1]
    assert other.isfinite().all()
    grads = torch.autograd.grad(real.sum(), [x for n, x in call.leaves.items() if n != name])
    clean = bool(real.isfinite().all()) and all(bool(x.isfinite().all()) for x in grads)
    return HIDDEN if clean else REACHES
