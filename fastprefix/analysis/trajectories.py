"""``activations``: how each task's rows move through the layers, in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastprefix.analysis.forward import check_batch, checked, forward, run, selected
from fastprefix.analysis.projection import pca, silhouette, two_groups
from fastprefix.analysis.result import Result, figure
from fastprefix.errors import fail
from fastprefix.hf.adapters.lookup import find_installation

At = Literal["last", "mean"]


@dataclass(frozen=True)
class Activations(Result):
    """The states of rows of several tasks after each layer, in two dimensions; on the CPU, in fp64.

    Attributes:
        tasks: the tasks' names.
        labels: ``[N]``, each row's task as an index into ``tasks``.
        points: ``[L + 1, N, 2]``, each row's state in front of the first layer and after each one.
        explained: ``[2]``, the share of the variance that each axis shows.
        silhouette: ``[L + 1]``, how well the tasks are told apart by the whole states, from -1 to 1; nan for one task.
        distance: ``[tasks, tasks]``, the distance of the tasks' mean states after the last layer.
        groups: 0 or 1 for each task: the split of the mean states after the last layer into the two closest groups.
    """

    tasks: tuple[str, ...]
    labels: Tensor
    points: Tensor
    explained: Tensor
    silhouette: Tensor
    distance: Tensor
    groups: tuple[int, ...]

    def plot(self) -> Any:
        """A line for each row from layer to layer, and how far the tasks are told apart by layer."""
        made = figure(10.0, 4.6)
        paths, scores = made.subplots(1, 2, width_ratios=(3, 2))
        for i, task in enumerate(self.tasks):
            own = self.points[:, self.labels == i]
            for row in range(own.shape[1]):
                paths.plot(*own[:, row].T.tolist(), color=f"C{i}", linewidth=0.6, alpha=0.5)
            paths.plot(*own[-1].T.tolist(), "o", color=f"C{i}", markersize=4, label=task)
        paths.set(xlabel=f"{self.explained[0]:.0%} of the variance", ylabel=f"{self.explained[1]:.0%}")
        paths.legend(frameon=False)
        scores.plot(range(len(self.silhouette)), self.silhouette.tolist(), "o-", markersize=3)
        scores.set(title="silhouette of the tasks", xlabel="layer", ylim=(-1.0, 1.05))
        return made


def activations(
    model: Any, batches: Mapping[str, Mapping[str, Any]], name: str | None = None, at: At = "last"
) -> Activations:
    """The path of each row's hidden state through the layers, for rows of several tasks.

    Sedov et al. (2024, 2412.18582) find the states of language tasks in one cluster and those of arithmetic in another.
    The states of each layer are moved to a mean of 0 and scaled to a root mean square norm of 1 over all rows, as their
    norms grow from layer to layer. The axes are the principal components of all layers' states together.

    Args:
        model: with or without a prefix attached. It runs in eval mode, without gradients.
        batches: for each task by its name, the keyword arguments of the model's forward; see :func:`prefix_mass`.
        name: of a prefix that all rows read; None for those that the model's next forward reads, or none.
        at: the state of a row's ``"last"`` token that is not padding, or the ``"mean"`` of all that are not. Of an
            encoder-decoder it is the decoder's.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if at not in ("last", "mean"):
        raise fail("at", repr(at), "'last' or 'mean'")
    if not isinstance(batches, Mapping) or not batches:
        raise fail("batches", repr(batches), "a mapping of tasks' names to batches")
    found, labels = [], []
    for i, batch in enumerate(batches.values()):
        states = _states(model, batch, name, at)  # [L + 1, B, d]
        found.append(states)
        labels += [i] * states.shape[1]
    states, tasks = torch.cat(found, 1), torch.tensor(labels)
    states = states - states.mean(1, keepdim=True)
    tiny = torch.finfo(states.dtype).tiny
    states = states / states.square().sum(2).mean(1).sqrt().clamp(min=tiny)[:, None, None]
    shown = pca(states.flatten(0, 1))
    means = torch.stack([states[-1][tasks == i].mean(0) for i in range(len(batches))])
    return Activations(
        tuple(map(str, batches)),
        tasks,
        shown.points.unflatten(0, states.shape[:2]),
        shown.explained,
        torch.tensor([silhouette(layer, tasks) for layer in states], dtype=torch.float64),
        (means[:, None] - means).norm(dim=2),
        tuple(two_groups(means)),
    )


def _states(model: Any, batch: Mapping[str, Any], name: str | None, at: At) -> Tensor:
    """``[L + 1, B, d]`` in fp64 on the CPU."""
    if name is None and find_installation(model) is None:
        check_batch(batch)
        output = forward(model, batch, output_hidden_states=True)
    else:
        installation = checked(model, batch)
        with selected(installation, name):
            output = run(installation, batch, lambda layer: None, output_hidden_states=True)
        model = installation.model
    decodes = bool(getattr(model.config, "is_encoder_decoder", False))
    states = output.decoder_hidden_states if decodes else output.hidden_states
    if not states:
        got = f"{type(model).__name__}, which returns no hidden states"
        raise fail("model", got, "a model that does, with output_hidden_states=True")
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    shape = states[0].shape[:2]
    if mask is None:
        mask = torch.ones(shape)
    elif tuple(mask.shape) != tuple(shape):
        raise fail("batches", f"an attention mask of shape {list(mask.shape)}", f"[B, S] = {list(shape)}")
    weight = mask.double().cpu()
    if at == "last":
        last = (weight * torch.arange(1, shape[1] + 1)).argmax(1)
        weight = torch.nn.functional.one_hot(last, shape[1]).double()
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
    return torch.stack([torch.einsum("bsd,bs->bd", layer.double().cpu(), weight) for layer in states])
