"""What a key or value that is not finite does behind a padding mask, where its score is hidden and its product is not.

A softmax gives it the weight 0, and 0 times nan is nan: whether it counts depends on how a kernel multiplies. So each
backend is measured, and the table in ``docs/operator.md`` says what was found.
"""

from __future__ import annotations

import torch

from fastprefix import prefix_attention
from tests.support.operator_calls import make_call

HIDDEN, REACHES = "hidden", "reaches the outputs of its row and the gradients"
REACHES_OUTPUTS = "reaches the outputs of its row"
# Of a backend that runs in an emulator here: what `forward_alone` finds there, for keys and for values.
EMULATED = {"cuda": {"k": HIDDEN, "v": REACHES_OUTPUTS}}


def padded(name: str, **options: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Leaves of a call with nan in a padded place of ``"k"`` or ``"v"``, and the padding mask."""
    torch.manual_seed(0)
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[0, :2] = False
    call = make_call(**options)  # type: ignore[arg-type]
    with torch.no_grad():
        call.leaves[name][0, :, :2] = float("nan")
    return call.leaves, padding


def measured(backend: str, name: str) -> str:
    """What nan in a padded place of ``"k"`` or ``"v"`` does in a backend; another row's output is never touched."""
    leaves, padding = padded(name)
    o = prefix_attention(**leaves, key_padding_mask=padding, backend=backend)
    real, other = o[0, :, 2:], o[1]
    assert other.isfinite().all()
    grads = torch.autograd.grad(real.sum(), [x for n, x in leaves.items() if n != name])
    clean = bool(real.isfinite().all()) and all(bool(x.isfinite().all()) for x in grads)
    return HIDDEN if clean else REACHES


def forward_alone(backend: str, name: str) -> str:
    """The same of a forward in bf16."""
    leaves, padding = padded(name, dtype=torch.bfloat16)
    with torch.no_grad():
        o = prefix_attention(**leaves, key_padding_mask=padding, backend=backend)
    assert o[1].isfinite().all()
    return HIDDEN if bool(o[0, :, 2:].isfinite().all()) else REACHES_OUTPUTS
