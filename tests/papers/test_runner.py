"""Results of experiments: run by seed, kept and read, judged, drawn, and the page made of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benches.papers import __main__ as command
from benches.papers import page, runner
from benches.papers.agreement import disagreements
from benches.papers.collection import CLAIMS, experiments
from benches.papers.experiment import Experiment, Outcome, Row, Statement, values_of

EXPERIMENTS = {x.name: x for x in experiments()}


def made(a: float, b: float = 1.0) -> runner.Found:
    """Results of two seeds of an experiment with two rows."""
    outcomes = (Outcome({"a": a - 1, "b": b}), Outcome({"a": a + 1, "b": b}))
    return runner.Found("made", False, {"device": "a processor", "torch": "2"}, (0, 1), (1.0, 1.0), outcomes)


def judged(tolerance: float = 0.5) -> Experiment:
    rows = (Row("a", "first", tolerance=tolerance), Row("b", "second"))
    statement = Statement("The first is above three in every seed.", lambda x: min(x["a"]) > 3)
    return dataclasses.replace(EXPERIMENTS["constructions"], name="made", rows=rows, statements=(statement,))


def test_every_experiment_says_what_it_is() -> None:
    assert {x.claim for x in EXPERIMENTS.values()} == set(CLAIMS)
    for x in EXPERIMENTS.values():
        keys = [row.key for row in x.rows]
        assert len(keys) == len(set(keys)) and x.statements and x.differs and x.against, x.name
        assert "](https://arxiv.org/abs/" in x.papers or "](https://aclanthology.org/" in x.papers, x.name
        assert len(x.seeds) == 3 or x.seeds == (0,), x.name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_kept_results_are_those_of_the_experiment(name: str) -> None:
    """What is kept has every row and seed, and agrees with itself; its picture is there."""
    x, kept = EXPERIMENTS[name], runner.read(runner.path_of(name))
    assert kept.seeds == x.seeds
    for outcome in kept.outcomes:
        assert set(outcome.measured) == {row.key for row in x.rows}
    assert disagreements(x, kept, kept) == []
    x.draw(kept.outcomes)
    assert (page.PICTURES / f"{name}.png").is_file()


def test_nothing_is_kept_that_no_experiment_has() -> None:
    names = {path.stem.removesuffix("-full") for path in runner.RESULTS.glob("*.json")}
    assert names == set(EXPERIMENTS)
    assert {path.stem for path in page.PICTURES.glob("*.png")} == set(EXPERIMENTS)


def test_the_page_is_current() -> None:
    assert page.PAGE.read_text() == page.page(), "run python -m benches.papers --draw"
    for claim in CLAIMS.values():
        assert f"\n## {claim}\n" in page.PAGE.read_text()


def test_the_page_names_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One experiment may have been run again elsewhere."""
    kept = [runner.read(runner.path_of(name)) for name in ("bias", "constructions")]
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    for found, device in zip(kept, ("one processor", "another processor"), strict=True):
        runner.write(dataclasses.replace(found, environment={**found.environment, "device": device}))
    said = " ".join(page.page().split())
    assert re.search(r"Measured on another processor, torch \S+ and on one processor, torch \S+, one thread", said)


def test_a_later_run_agrees_within_the_tolerance() -> None:
    assert disagreements(judged(), made(7.0), made(7.4)) == []
    (said,) = disagreements(judged(), made(7.0), made(7.6))
    assert said == "first: 7.6 is further than 0.5 from 7"
    (said,) = disagreements(judged(), made(7.0), made(float("nan")))[:1]
    assert "nan" in said


def test_a_later_run_agrees_in_every_statement() -> None:
    (said,) = disagreements(judged(tolerance=5.0), made(7.0), made(3.5))
    assert said == "The first is above three in every seed. This was True, and is False."


def test_a_row_that_only_one_run_has_is_named() -> None:
    later = dataclasses.replace(made(7.0), outcomes=(Outcome({"a": 7.0}),))
    assert disagreements(judged(), made(7.0), later) == ["second: only one of the runs has it"]


def test_results_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    found = dataclasses.replace(made(1 / 3), outcomes=(Outcome({"a": 0.1234567891}, {"points": [[1.0, 2.0]]}),))
    runner.write(found)
    kept = runner.read(runner.path_of("made"))
    assert kept.outcomes == (Outcome({"a": 0.1234568}, {"points": [[1.0, 2.0]]}),)
    assert dataclasses.replace(kept, outcomes=found.outcomes) == found


def test_a_run_agrees_with_what_was_kept_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept fractions have seven digits, kept counts have all of theirs."""
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    found = made(1 / 3, b=354_823_168.0)
    runner.write(found)
    kept = runner.read(runner.path_of("made"))
    assert kept.outcomes[0].measured["b"] == 354_823_168.0
    assert disagreements(judged(tolerance=0.0), kept, found) == []
    assert disagreements(judged(tolerance=0.0), kept, made(1 / 3 + 1e-5, b=354_823_168.0))
    assert disagreements(judged(tolerance=0.0), kept, made(1 / 3, b=354_823_169.0))


@pytest.mark.slow
def test_runs_in_processes_of_its_own_and_checks_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run and a check of it, as the command line starts them; then a check against a number that was not found."""
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "PICTURES", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "papers.md")
    monkeypatch.setattr(command, "PAGE", runner.ROOT / "papers.md")
    assert command.main(["--only", "constructions", "--processes", "1"]) == 0
    values = values_of(runner.read(runner.path_of("constructions")).outcomes)
    assert values["sentences"] == [100.0, 100.0, 100.0] and (tmp_path / "constructions.png").is_file()
    assert command.main(["--only", "constructions", "--check"]) == 0
    path = runner.path_of("constructions")
    path.write_text(path.read_text().replace('"words":100.0', '"words":50.0'))
    assert command.main(["--only", "constructions", "--check"]) == 1
    assert re.search(r"DIFFERS\n.*100 is further than 0 from 50", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nonsense"], "--only: got nonsense, expected .*constructions"),
        (["--processes", "0"], "--processes: got 0, expected at least 1"),
        (["--draw", "--check"], "--draw runs nothing"),
        (["--full", "--only", "constructions"], "none of these experiments has a full size"),
    ],
)
def test_wrong_command_lines(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.slow
def test_a_failure_names_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="nonsense, seed 0: "):
        list(runner.run([dataclasses.replace(judged(), name="nonsense")], False, 1))
