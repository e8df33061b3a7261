"""A language model's own head, applied to hidden states some at a time, so that no ``[B, S, V]`` logits ever exist."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.model import probing
from fastprefix.hf.runtime.lm_head_hooks import replace_hidden
from fastprefix.hf.sharing.plan import IGNORED

_ELEMENTS = 1 << 24  # of the logits that exist at once: 64 MiB in fp32


class OutputHead:
    """The model's forward with the part around all layers left out: scaling, soft caps and LoRA are the model's own.

    Args:
        installation: of the model.
        output: what the part around all layers returned in a forward; its fields other than the hidden states are
            passed on to the head as they are.
    """

    def __init__(self, installation: Installation, output: Any) -> None:
        self.installation, self.model = installation, installation.model
        self.owner: nn.Module = installation.facts.layers.main.owner
        self.output = output

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[T, V]`` of hidden states ``[T, d]``."""

        def instead(*args: Any, **kwargs: Any) -> Any:
            return replace_hidden(copy.copy(self.output), hidden[None])

        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        before = self.owner.__dict__.get("forward")
        # An attribute of the module's own hides the method of its class.
        self.owner.__dict__["forward"] = instead
        try:
            with self.installation.forward.bypass():
                output = self.model(input_ids=ids, use_cache=False)
        finally:
            if before is None:
                del self.owner.__dict__["forward"]
            else:
                self.owner.__dict__["forward"] = before
        logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
        return logits[0]

    def check(self) -> None:
        """Raise ValueError for a model whose logits are not a function of its last hidden states alone."""
        inputs = self.installation.facts.layers.main.dummy_inputs(tokens=3)
        kept: list[Any] = []
        handle = self.owner.register_forward_hook(lambda module, args, output: kept.append(copy.copy(output)))
        try:
            with probing.evaluating(self.model), self.installation.forward.bypass():
                output = self.model(**inputs, use_cache=False)
        finally:
            handle.remove()
        name = type(self.model).__name__
        want = output[0] if isinstance(output, tuple) else output.get("logits")
        if self.owner is self.model or not isinstance(want, Tensor) or want.dim() != 3:
            raise fail("model", name, "a causal language model with a head (AutoModelForCausalLM)")
        with probing.evaluating(self.model):
            got = OutputHead(self.installation, kept[0])(kept[0][0][0])
        if not torch.allclose(got.float(), want[0].float(), rtol=1e-2, atol=1e-2 * float(want.abs().max())):
            raise fail("model", f"{name}, whose head reads more than hidden states", "a head of hidden states alone")


def log_probabilities(
    head: OutputHead, hidden: Tensor, labels: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of labels, and entropies, computed for some tokens at a time and again in the backward pass.

    Args:
        head: the model's head.
        hidden: ``[B, S, d]``, place i predicts label i.
        labels: ``[B, S]`` token ids; ``IGNORED`` where nothing is scored.
        temperature: what the logits are divided by.
        entropy: whether to compute ``[B, S]`` entropies too, in nats.

    Returns:
        ``[B, S]`` log-probabilities in fp32 (fp64 for fp64), 0 where nothing is scored, and the entropies or None.
    """
    scored = labels != IGNORED
    states, wanted = hidden[scored], labels[scored]

    def chunk(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(x)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        total = logits.logsumexp(-1, keepdim=True)
        chosen = (logits.gather(1, ids[:, None]) - total)[:, 0]
        if not entropy:
            return chosen, chosen.new_empty(0)
        # -inf stands where a vocabulary is padded: a probability of 0, which adds nothing.
        finite = logits.masked_fill(logits == float("-inf"), 0.0)
        return chosen, total[:, 0] - ((logits - total).exp() * finite).sum(-1)

    size = max(_ELEMENTS // _vocabulary(head.model), 1)
    pairs = []
    for x, ids in zip(states.split(size), wanted.split(size), strict=True):
        if torch.is_grad_enabled():
            # With the random state of the forward, for dropout in the head (LoRA's).
            pairs.append(checkpoint(chunk, x, ids, use_reentrant=False))
        else:
            pairs.append(chunk(x, ids))
    found, entropies = zip(*pairs, strict=True)
    return _placed(found, scored), _placed(entropies, scored) if entropy else None


def _placed(parts: Any, scored: Tensor) -> Tensor:
    values = torch.cat(list(parts))
    return values.new_zeros(scored.shape).masked_scatter(scored, values)


def _vocabulary(model: Any) -> int:
    embeddings = model.get_output_embeddings() or model.get_input_embeddings()
    return int(embeddings.weight.shape[0])
