"""Runs experiments, each seed in a process with one thread, and keeps what they found as JSON."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benches.papers.collection import experiments
from benches.papers.experiment import Experiment, Outcome
from fastprefix.machine.files import write_atomically
from fastprefix.measure.report_tables import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benches" / "results" / "papers"


@dataclass(frozen=True)
class Found:
    """What all seeds of one experiment found, and where."""

    name: str
    full: bool
    environment: dict[str, Any]
    seeds: tuple[int, ...]
    seconds: tuple[float, ...]  # of one core, by seed
    outcomes: tuple[Outcome, ...]


def path_of(name: str, full: bool = False) -> Path:
    """Where the results of an experiment are kept."""
    return RESULTS / f"{name}{'-full' if full else ''}.json"


def read(path: Path) -> Found:
    """Results that were kept."""
    kept = json.loads(path.read_text())
    outcomes = tuple(Outcome(**outcome) for outcome in kept.pop("outcomes"))
    return Found(**{**kept, "seeds": tuple(kept["seeds"]), "seconds": tuple(kept["seconds"]), "outcomes": outcomes})


def write(found: Found) -> None:
    """Keep results."""
    path = path_of(found.name, found.full)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(rounded(asdict(found)), separators=(",", ":")) + "\n")


def rounded(x: Any) -> Any:
    """Fractions with seven digits, which is what fp32 has; points of a picture need no more."""
    if isinstance(x, float) and not x.is_integer():
        return float(f"{x:.7g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list | tuple) else x


def run(chosen: Sequence[Experiment], full: bool, processes: int) -> Iterator[Found]:
    """Run experiments side by side, the longest first; yields each as soon as its last seed is done.

    Raises:
        RuntimeError: a run failed; the message names the experiment and the seed.
    """
    waiting = sorted(((x, seed) for x in chosen for seed in x.seeds), key=lambda work: -work[0].minutes)
    done: dict[str, dict[int, tuple[Outcome, float]]] = {x.name: {} for x in chosen}
    machine = environment("cpu")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_one, x.name, seed, full): (x, seed) for x, seed in waiting}
        for future in as_completed(futures):
            x, seed = futures[future]
            done[x.name][seed] = _result(future, x.name, seed, pool)
            if len(done[x.name]) == len(x.seeds):
                results = [done[x.name][seed] for seed in x.seeds]
                seconds = tuple(used for _, used in results)
                yield Found(x.name, full, machine, x.seeds, seconds, tuple(outcome for outcome, _ in results))


def _result(future: Future[Any], name: str, seed: int, pool: ProcessPoolExecutor) -> tuple[Outcome, float]:
    try:
        outcome, used = future.result()
        return outcome, used
    except Exception as error:
        pool.shutdown(wait=False, cancel_futures=True)
        raise RuntimeError(f"{name}, seed {seed}: {error}") from error


def _one(name: str, seed: int, full: bool) -> tuple[Outcome, float]:
    import torch

    torch.set_num_threads(1)
    experiment = experiments([name])[0]
    began = time.process_time()
    outcome = experiment.run(seed, full)
    expected = {row.key for row in experiment.rows}
    if differing := sorted(expected ^ set(outcome.measured)):
        raise ValueError(f"only one of the rows and what was measured has {', '.join(differing)}")
    return outcome, time.process_time() - began
