"""Saves that are killed: at each of their steps, and at random; run as a process of its own, which forks the victims.

    python -m tests.support.kill_during_save steps|twice|random FOLDER COUNT      prints what was found as JSON

A kill is no power cut: what the system was told is not lost. So flushing to the disk is a step here that takes no time.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import fastprefix
from fastprefix.hf.storage.atomic_folder import committed
from fastprefix.hf.storage.model_card import is_ours
from tests.support.fault_injection import at_step
from tests.support.saved_adapters import CONFIG, KINDS, WEIGHTS, numbers, same
from tests.support.tiny_models import tiny_model

# Of the folder's adapter by the one that is saved: other numbers, and every change of what files there are.
CHANGES = (
    ("direct", "projected"),
    ("projected", "prompt"),
    ("direct", "direct"),
    ("projected", "projected"),
    ("projected", "direct"),
    ("prompt", "projected"),
    ("direct", "frozen"),
    ("projected", "layers"),
    ("layers", "direct"),
)


def attached(kind: str, seed: int) -> tuple[Any, dict[str, Tensor]]:
    """A model with a prefix, the same for a seed, and its numbers."""
    model = tiny_model()
    torch.manual_seed(seed)
    return model, numbers(fastprefix.attach(model, KINDS[kind]()))


def forked(run: Callable[[], Any]) -> bool:
    """Run something in a process of its own; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a save failed that nobody killed")
    return os.WIFSIGNALED(status)


def kill() -> None:
    """Nothing of this process runs after it."""
    os.kill(os.getpid(), signal.SIGKILL)


def seen_by_peft(folder: Path) -> tuple[bytes, bytes] | None:
    """PEFT's two files; None where it finds no adapter."""
    if not (folder / CONFIG).exists():
        return None
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


def check_peft(folder: Path) -> None:
    """PEFT reads the numbers of the file that it finds; no adapter, or one that is not for PEFT, it refuses."""
    from peft import PeftModel

    if not (folder / CONFIG).exists():
        with suppress(ValueError):
            PeftModel.from_pretrained(tiny_model(), str(folder))
            raise AssertionError("PEFT read an adapter without its configuration")
        return
    if json.loads((folder / CONFIG).read_text())["peft_type"] == "FASTPREFIX":
        return
    encoder = PeftModel.from_pretrained(tiny_model(), str(folder)).prompt_encoder["default"]
    stored = load_file(folder / WEIGHTS)["prompt_embeddings"]
    rows = [encoder.frozen_embedding] if getattr(encoder, "num_frozen_tokens", 0) else []
    rows += [encoder.trainable_embedding if rows else encoder.embedding.weight]
    assert torch.equal(torch.cat(rows).detach(), stored), "PEFT read other numbers"


class Change:
    """One adapter in a folder, and another one that is saved over it."""

    def __init__(self, folder: Path, old: str, new: str) -> None:
        self.folder, self.spare = folder / "adapter", folder / "spare"
        model, self.old = attached(old, 1)
        for place in (self.spare, folder / "whole"):
            fastprefix.save(model, place)
        self.model, self.new = attached(new, 2)
        fastprefix.save(self.model, folder / "whole")
        self.pairs = [seen_by_peft(self.spare), seen_by_peft(folder / "whole")]
        self.names = {path.name for path in (folder / "whole").iterdir()}
        assert self.pairs[0] != self.pairs[1]

    def start(self) -> None:
        """The old adapter, whole, and a file of somebody else's."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.spare, self.folder)
        (self.folder / "README.md").write_text("mine")

    def save(self, step: int) -> None:
        """Save the new one and be killed at a step."""
        with at_step(step, kill):
            fastprefix.save(self.model, self.folder)

    def load(self, step: int) -> None:
        """Load what is there and be killed at a step."""
        with at_step(step, kill):
            fastprefix.load(tiny_model(), self.folder)

    def check(self, peft: bool = True) -> str:
        """Which adapter is there; everybody finds it whole."""
        pair = seen_by_peft(self.folder)
        assert (self.folder / "README.md").read_text() == "mine", "somebody's file was replaced"
        may_miss = self.pairs[0][0] != self.pairs[1][0]  # type: ignore[index]
        assert pair in self.pairs or (pair is None and may_miss), "PEFT would read a mixture"
        if peft:
            check_peft(self.folder)
        found = numbers(fastprefix.load(tiny_model(), self.folder))
        which = "old" if same(found, self.old) else "new"
        assert which == "old" or same(found, self.new), "neither adapter"
        # Loading has finished the save: PEFT finds the same adapter.
        assert seen_by_peft(self.folder) == self.pairs[which == "new"], "PEFT finds another adapter than load"
        return which

    def finish(self) -> None:
        """The next save leaves its own files and the other's, and nothing else."""
        fastprefix.save(self.model, self.folder)
        assert {path.name for path in self.folder.iterdir()} == {*self.names, "README.md"}
        assert self.check(peft=False) == "new"


def at_steps(folder: Path, count: int) -> dict[str, Any]:
    """So many of the changes, killed at every step."""
    found: dict[str, Any] = {"kills": 0}
    for old, new in CHANGES[:count]:
        change, seen = Change(folder / f"{old}-{new}", old, new), []
        for step in itertools.count(1):
            change.start()
            killed = forked(lambda change=change, step=step: change.save(step))  # type: ignore[misc]
            seen.append(change.check())
            if not killed:
                break
            found["kills"] += 1
            if step % 4 == 0:
                change.finish()
        # The old adapter up to one step, the new one from there.
        assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen), seen
    return found


def twice(folder: Path, count: int) -> dict[str, Any]:
    """Killed behind the commit, and whoever would finish it - a load, a save - at each of its own first steps."""
    found = {"kills": 0}
    for old, new in CHANGES[:count]:
        change = Change(folder / f"{old}-{new}", old, new)
        for step in itertools.count(1):
            change.start()
            if not forked(lambda change=change, step=step: change.save(step)):  # type: ignore[misc]
                break
            if committed(change.folder) is None:
                continue
            half = folder / "half"
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(change.folder, half)
            for again, second in itertools.product((change.load, change.save), range(1, 16)):
                shutil.rmtree(change.folder)
                shutil.copytree(half, change.folder)
                found["kills"] += forked(lambda again=again, second=second: again(second))  # type: ignore[misc]
                assert change.check(peft=False) == "new"
    return found


def at_random(folder: Path, count: int) -> dict[str, Any]:
    """Processes that save one adapter after another, killed at any time."""
    folder.mkdir(parents=True)
    chosen = random.Random(0)
    ring = [attached(kind, seed) for seed, kind in enumerate(("direct", "projected", "direct", "prompt", "layers"))]
    fastprefix.save(ring[0][0], folder)
    last, overtaken = 0, 0
    for _ in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for turn in itertools.count(last + 1):
                fastprefix.save(ring[turn % len(ring)][0], folder)
                os.write(writer, b".")
        os.close(writer)
        time.sleep(chosen.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as done:
            last += len(done.read())
        found = numbers(fastprefix.load(tiny_model(), folder))
        if not same(found, ring[last % len(ring)][1]):
            last += 1  # committed, and killed before it could say so
            overtaken += 1
            assert same(found, ring[last % len(ring)][1]), "neither the last adapter nor the next"
        check_peft(folder)
        assert is_ours((folder / "README.md").read_text()), "half a card"
    return {"kills": count, "saves": last, "killed behind the commit": overtaken}


if __name__ == "__main__":
    mode, place, number = sys.argv[1:]
    os.fsync = lambda handle: None  # type: ignore[assignment]
    print(json.dumps({"steps": at_steps, "twice": twice, "random": at_random}[mode](Path(place), int(number))))
