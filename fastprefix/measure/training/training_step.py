"""Training steps of one model with a prefix by several methods: ours, PEFT's, concatenation; and without a prefix.

Needs transformers; PEFT's needs peft.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.api import attach
from fastprefix.measure.training import concatenated_attention
from fastprefix.measure.training.saved_bytes import SavedBytes
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.prefix import Prefix


class TrainingStep:
    """A training step: forward, backward and AdamW on the trained parameters. A call takes a step and returns the loss.

    Attributes:
        model: the model as a user would call it.
        trained: the parameters that AdamW updates.
        ids: ``[B, S]`` token ids, which are the labels too.
        prefix: our prefix module; None in the other methods.
        backend: the backend of our operator.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Iterable[Tensor],
        ids: Tensor,
        prefix: Prefix | None = None,
        backend: str = "auto",
        **forward: Any,
    ) -> None:
        self.model = model
        self.trained = list(trained)
        self.ids = ids
        self.prefix = prefix
        self.backend = backend
        self._forward = forward
        self._optimizer = torch.optim.AdamW(self.trained, lr=1e-3)

    def loss(self) -> Tensor:
        """The loss of one forward."""
        with force_backend(self.backend):
            loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, **self._forward).loss
        return loss

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def saved_bytes(self) -> int:
        """The bytes that one forward saves for its backward; parameters and their views are not counted."""
        with SavedBytes(exclude=self.model.parameters()) as saved:
            loss = self.loss()
        total = saved.total
        del loss
        return total

    def peak_bytes(self) -> int | None:
        """The peak of bytes allocated during one step in addition to those before it; None without CUDA."""
        if self.ids.device.type != "cuda":
            return None
        self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@contextmanager
def force_backend(backend: str) -> Iterator[None]:
    """Run whole models with the named backend, which they read from the environment; ``auto`` changes nothing."""
    before = os.environ.get("FASTPREFIX_BACKEND")
    if backend != "auto":
        os.environ["FASTPREFIX_BACKEND"] = backend
    try:
        yield
    finally:
        if backend != "auto":
            os.environ.pop("FASTPREFIX_BACKEND")
            if before is not None:
                os.environ["FASTPREFIX_BACKEND"] = before


def frozen_step(model: nn.Module, ids: Tensor) -> TrainingStep:
    """A step of the frozen model without a prefix, whose backward goes down as far as a prefix makes it go.

    A zero vector is added to the values of the lowest layer (its ``v_proj``) and trained. Like a prefix, it makes
    autograd run through every layer, including the attention of the lowest one, and stop there. In a model without a
    ``v_proj``, the vector is added to the embeddings, below the projections of the lowest layer.
    """
    model.requires_grad_(False)
    linears = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
    start: Any = next((m for n, m in linears if n.endswith("v_proj")), None)
    if start is None:
        start = model.get_input_embeddings()  # type: ignore[operator]
    width = start.out_features if isinstance(start, nn.Linear) else start.weight.shape[1]
    shift = nn.Parameter(torch.zeros(width, dtype=start.weight.dtype, device=start.weight.device))
    start.register_forward_hook(lambda module, args, out: out + shift)
    return TrainingStep(model, [shift], ids, use_cache=False)


def ours_step(model: nn.Module, ids: Tensor, num_virtual_tokens: int, backend: str = "auto") -> TrainingStep:
    """A step with a prefix from ``fastprefix.attach``, whose operator runs on the named backend."""
    prefix = attach(model, PrefixConfig(num_virtual_tokens=num_virtual_tokens))
    return TrainingStep(model, prefix.parameters(), ids, prefix, backend, use_cache=False)


def cat_step(model: nn.Module, ids: Tensor, num_virtual_tokens: int) -> TrainingStep:
    """A step with a concatenated prefix, see :mod:`concatenated_attention`.

    Raises:
        ValueError: a prefix cannot be concatenated in this model's attention.
    """
    trained = concatenated_attention.install(model, num_virtual_tokens)
    positions = torch.arange(num_virtual_tokens, num_virtual_tokens + ids.shape[1], device=ids.device)[None]
    return TrainingStep(model, trained, ids, use_cache=False, position_ids=positions)


def peft_step(model: nn.Module, ids: Tensor, num_virtual_tokens: int) -> TrainingStep:
    """A step of PEFT's PREFIX_TUNING as shipped; PEFT passes the prefix in the cache, so the cache stays on.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    wrapped = get_peft_model(model, config)
    return TrainingStep(wrapped, [p for p in wrapped.parameters() if p.requires_grad], ids)
