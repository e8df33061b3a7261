"""What the model that reads the whole text predicts: its k likeliest tokens, and the probability of all others.

Storing every logit of every token would take gigabytes. Of the k likeliest tokens the log-probabilities are kept, and
of all others their sum, so that the divergence below is exact where k is the size of the vocabulary, and else a lower
bound of the exact one: it does not see how the rest is distributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastprefix.errors import fail


@dataclass(frozen=True)
class Targets:
    """Predictions of n tokens."""

    ids: Tensor  # [n, k] int32, the likeliest first
    logprobs: Tensor  # [n, k] fp32 (fp64 of an fp64 model)
    rest: Tensor  # [n], the log-probability of all other tokens together; -inf where there are none
    label: Tensor  # [n], the log-probability of the token that follows in the row

    def __getitem__(self, rows: slice) -> Targets:
        return Targets(self.ids[rows], self.logprobs[rows], self.rest[rows], self.label[rows])

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(self.ids.to(device), self.logprobs.to(device), self.rest.to(device), self.label.to(device))


def targets_of(logits: Tensor, labels: Tensor, top_k: int) -> Targets:
    """The targets that logits ``[n, V]`` give; ``labels [n]`` are the tokens that follow.

    Raises:
        ValueError: ``top_k`` is not 1 to V.
    """
    if not 1 <= top_k <= logits.shape[-1]:
        raise fail("top_k", top_k, f"1 to {logits.shape[-1]}, the size of the vocabulary")
    logprobs = _float(logits).log_softmax(-1)
    top, ids = logprobs.topk(top_k, -1)
    return Targets(ids.int(), top, _rest(logprobs, ids), logprobs.gather(-1, labels[:, None])[:, 0])


def distillation_loss(logits: Tensor, targets: Targets) -> Tensor:
    """``[n]`` KL divergences, in nats, of predictions ``[n, V]`` from the targets: the loss that trains a cartridge.

    Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266, section 4.2). The tokens outside the teacher's k likeliest are
    one event.
    """
    logprobs = _float(logits).log_softmax(-1)
    ids = targets.ids.long()
    loss = (targets.logprobs.exp() * (targets.logprobs - logprobs.gather(-1, ids))).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return loss
    return loss + targets.rest.exp() * (targets.rest - _rest(logprobs, ids))


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _rest(logprobs: Tensor, ids: Tensor) -> Tensor:
    """``[n]`` log of the sum of all other probabilities."""
    return logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)


def join(parts: list[Targets]) -> Targets:
    """Targets one after the other."""
    names = ("ids", "logprobs", "rest", "label")
    return Targets(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def write(path: Path, targets: Targets, digest: str) -> None:
    """Write a file that is whole at every moment; ``digest`` names what the targets belong to."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.part")
    save_file({name: x.contiguous() for name, x in vars(targets).items()}, temporary, metadata={"digest": digest})
    temporary.replace(path)


def read(path: Path, digest: str) -> Targets:
    """The targets of a file that :func:`write` wrote.

    Raises:
        ValueError: they belong to something else.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("digest") != digest:
            raise fail(str(path), "predictions of another text, model or data", "those of this run, or no such file")
        return Targets(*(file.get_tensor(name) for name in ("ids", "logprobs", "rest", "label")))
