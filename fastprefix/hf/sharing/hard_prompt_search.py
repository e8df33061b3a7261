"""``search_hard_prompt``: the tokens in front of some rows that make their labels likely, found by their gradient.

AutoPrompt (Shin et al. 2020, section 2.2) with the batch of exchanges of GCG (Zou et al. 2023): where a token's
embedding changes from e to e_w, the loss changes by about (e_w - e)^T dL/de. The tokens that promise most are the
candidates, and the exact loss of each decides. All candidates run through the model as one batch of prompts, which the
rows then read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.model import offload, probing
from fastprefix.hf.model.prompt_support import check_tokens
from fastprefix.hf.sharing.completions import completion_logprobs, completions_of
from fastprefix.hf.sharing.hard_prompt import HardPrompt, read_state, write_state
from fastprefix.hf.sharing.shared_prompt import bare_model, prompts_of
from fastprefix.validation import is_int

IGNORED = -100  # a label that does not count, as in transformers
LARGEST_BATCH = 1024  # rows that run at once: candidates times rows


class _Task(NamedTuple):
    """Rows ``[B, R]``, which of their tokens are real, and which are labels, ``[B, R]`` bool."""

    model: Any
    rows: Tensor
    real: Tensor
    counted: Tensor

    def losses(self, prompts: Tensor) -> Tensor:
        """The exact loss of each prompt of ``[N, P]``."""
        B = len(self.rows)
        found = []
        for some in prompts.split(max(1, LARGEST_BATCH // B)):
            groups = torch.arange(len(some)).repeat_interleave(B)
            repeated = self.rows.repeat(len(some), 1), self.real.repeat(len(some), 1)
            each = completion_logprobs(self.model, some, repeated[0], groups, mask=repeated[1]).logprobs
            found.append(-(each.view(len(some), B, -1) * self.counted).sum((1, 2)) / self.counted.sum())
        return torch.cat(found)

    def gradient(self, prompt: Tensor) -> Tensor:
        """``[P, V]``: by how much the loss changes with each token in each place, to first order."""
        table = self.model.get_input_embeddings()
        with torch.no_grad():
            ids = torch.cat([prompt.expand(len(self.rows), -1), self.rows], 1)
            embeds = table(ids)
        P = len(prompt)
        moved = torch.zeros_like(embeds[0, :P], requires_grad=True)
        with torch.enable_grad():
            inputs = torch.cat([embeds[:, :P] + moved, embeds[:, P:]], 1)
            mask = torch.cat([torch.ones_like(ids[:, :P]), self.real.to(ids.dtype)], 1)
            output = self.model(inputs_embeds=inputs, attention_mask=mask)
            logits = output.logits[:, P - 1 : -1][self.counted]
            loss = nn.functional.cross_entropy(logits.float(), self.rows[self.counted])
        (gradient,) = torch.autograd.grad(loss, moved)
        return gradient.float() @ table.weight.detach().float().T


def search_hard_prompt(
    model: Any,
    rows: Any,
    labels: Any = None,
    *,
    num_tokens: int = 5,
    start: Any = None,
    steps: int = 50,
    candidates: int = 64,
    top_k: int = 64,
    allowed: Sequence[int] | Tensor | None = None,
    strategy: Literal["gradient", "random"] = "gradient",
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: Callable[[int, HardPrompt], None] | None = None,
) -> HardPrompt:
    """Search the P tokens in front of the rows that make their labels most likely. Nothing is trained.

    A step computes one gradient, draws candidates that exchange one token each, computes their exact losses, and takes
    the best one if it is better than what there was. After a step that found nothing better, some candidates exchange
    two tokens, or swap two of the prompt's own, and more tokens are drawn from. Candidates run as prompts that are
    computed once each, not once for each row (see :func:`completion_logprobs`).

    Args:
        model: a causal language model of transformers.
        rows: ``[B, R]`` token ids, or B sequences of different lengths: what follows the prompt.
        labels: the rows again, with -100 for tokens that do not count; None counts all of them.
        num_tokens: P, unless ``start`` has a length.
        start: ``[P]`` token ids to begin with; None draws them from ``allowed``.
        steps: how many steps in all, those of an earlier run with the same ``state`` among them.
        candidates: how many exchanges are looked at in a step.
        top_k: for each place, how many of the most promising tokens are drawn from; twice as many after each step in
            a row that finds nothing better.
        allowed: ids that the prompt may consist of; None allows the whole vocabulary.
        strategy: ``"random"`` draws exchanges from all allowed tokens, for comparison.
        seed: of the draws. The same call finds the same prompt.
        state: a file in which the search is kept after each step, and from which it goes on after an interruption.
        progress: called after each step with its number and what has been found.

    Raises:
        ValueError: an argument does not fit, or ``state`` is of another search.
    """
    bare = bare_model(model)
    probing.check_model(bare)
    check_tokens(bare)
    for name, number in (("num_tokens", num_tokens), ("candidates", candidates), ("top_k", top_k)):
        if not is_int(number) or number < 1:
            raise fail(name, repr(number), "an int of at least 1")
    if not is_int(steps) or steps < 0:
        raise fail("steps", repr(steps), "an int of at least 0")
    if strategy not in ("gradient", "random"):
        raise fail("strategy", repr(strategy), "'gradient' or 'random'")
    device = offload.device(bare.get_input_embeddings())
    task = _task(bare, rows, labels, device)
    usable = _usable(allowed, bare.get_input_embeddings().weight.shape[0], device)
    with _evaluating(bare):
        found = _begin(task, usable, start, num_tokens, seed)
        file = None if state is None else Path(state)
        digest = _digest(task, usable, found, [candidates, top_k, strategy, seed])
        if file is not None and file.exists():
            found = read_state(file, digest)
        for step in range(len(found.losses) - 1, steps):
            found = _step(task, usable, found, candidates, top_k, strategy, torch.Generator().manual_seed(seed + step))
            if file is not None:
                write_state(file, digest, found)
            if progress is not None:
                progress(step + 1, found)
    return found


def _step(
    task: _Task, usable: Tensor, now: HardPrompt, candidates: int, top_k: int, strategy: str, random: torch.Generator
) -> HardPrompt:
    prompt = torch.tensor(now.ids, device=usable.device)
    P, V = len(prompt), len(usable)
    places = torch.arange(P, device=usable.device)
    if strategy == "gradient":
        promise = (-task.gradient(prompt)).masked_fill(~usable, -torch.inf)
    else:
        promise = torch.rand(P, V, generator=random).to(usable.device).masked_fill(~usable, -torch.inf)
    promise[places, prompt] = -torch.inf
    stuck = len(now.losses) - 1 - now.losses.index(now.loss)  # steps that have found nothing better
    best = promise.topk(min(top_k << min(stuck, 20), int(usable.sum()) - 1), dim=1)
    pairs = best.values.isfinite().nonzero()  # place and rank

    def draw(count: int) -> tuple[Tensor, Tensor]:
        """Places and tokens of ``count`` different exchanges, or of as many as there are."""
        place, rank = pairs[torch.randperm(len(pairs), generator=random)[:count].to(pairs.device)].unbind(1)
        return place, best.indices[place, rank]

    place, token = draw(candidates)
    changed = prompt.repeat(len(place), 1)
    every = torch.arange(len(place), device=prompt.device)
    changed[every, place] = token
    if stuck and P > 1:
        # No single exchange may be left that helps: every third candidate has a second one, and another has two of the
        # prompt's own tokens swapped.
        second = draw(len(every[1::3]))
        changed[every[1::3][: len(second[0])], second[0]] = second[1]
        for row in every[2::3]:
            one, other = torch.randperm(P, generator=random)[:2].tolist()
            changed[row] = prompt
            changed[row, [one, other]] = prompt[[other, one]]
    with torch.no_grad():
        losses = task.losses(changed)
    lowest = int(losses.argmin())
    loss, ids = float(losses[lowest]), changed[lowest].tolist()
    if not loss < now.loss:
        loss, ids = now.loss, now.ids
    return HardPrompt(ids, [*now.losses, loss], now.evaluated + len(changed))


def _begin(task: _Task, usable: Tensor, start: Any, num_tokens: int, seed: int) -> HardPrompt:
    if start is None:
        ids = usable.nonzero().flatten()
        drawn = torch.randint(len(ids), (num_tokens,), generator=torch.Generator().manual_seed(seed))
        prompt = ids[drawn.to(ids.device)]
    else:
        (prompt,) = prompts_of(torch.as_tensor(start).reshape(1, -1), usable.device, name="start")
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < len(usable):
            got = f"ids from {int(prompt.min())} to {int(prompt.max())}"
            raise fail("start", got, f"token ids from 0 to {len(usable) - 1}")
    with torch.no_grad():
        loss = float(task.losses(prompt[None])[0])
    return HardPrompt(prompt.tolist(), [loss], 1)


def _task(model: Any, rows: Any, labels: Any, device: torch.device) -> _Task:
    ids, real = completions_of(rows, None, device, name="rows")
    if labels is None:
        return _Task(model, ids, real, real)
    if isinstance(labels, Tensor):
        wanted = labels.to(device)
    else:
        each = [torch.as_tensor(row, device=device) for row in labels]
        wanted = nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=IGNORED)
    if wanted.shape != ids.shape:
        raise fail("labels", f"shape {list(wanted.shape)}", f"the rows' {list(ids.shape)}")
    counted = wanted != IGNORED
    if not counted.any() or bool((wanted != ids)[counted].any()) or bool((counted & ~real).any()):
        expected = f"the rows' tokens, or {IGNORED} where they do not count"
        raise fail("labels", "none, or others than the rows' tokens", expected)
    return _Task(model, ids, real, counted)


def _usable(allowed: Any, vocabulary: int, device: torch.device) -> Tensor:
    """``[V]`` bool."""
    if allowed is None:
        return torch.ones(vocabulary, dtype=torch.bool, device=device)
    ids = torch.as_tensor(allowed).reshape(-1).long()
    if len(ids.unique()) < 2 or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise fail("allowed", f"{len(ids)} ids", f"two ids or more, from 0 to {vocabulary - 1}")
    return torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, ids, True).to(device)


def _digest(task: _Task, usable: Tensor, begun: HardPrompt, settings: list[Any]) -> str:
    """A name of a search: its rows, labels, settings and start, with the start's loss for the model's numbers."""
    found = hashlib.sha256(json.dumps([type(task.model).__name__, begun.ids, round(begun.loss, 4), settings]).encode())
    for x in (task.rows, task.real, task.counted, usable):
        found.update(x.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
