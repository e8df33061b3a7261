"""Tile tables: which row answers, what a bad table says of itself, and tables that are found by timing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastprefix import prefix_attention
from fastprefix.backends.launch import tile_config
from fastprefix.backends.launch.tile_config import Tile
from fastprefix.cli.bench_kernels import DECODING, TRAINING
from fastprefix.measure import Leaves, Problem, Timing
from fastprefix.measure.kernels import autotune
from fastprefix.measure.kernels.autotune import tune
from fastprefix.measure.kernels.search_space import AXES, candidate_tiles
from fastprefix.measure.kernels.tuning_targets import TuningTarget, tuning_targets
from fastprefix.measure.operator.correctness import broken_rule

H100 = (90, "NVIDIA H100 80GB HBM3")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Write = Callable[..., Path]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes tables, by name, into a folder that stands in the place of the shipped one."""
    monkeypatch.setattr(tile_config, "FOLDER", tmp_path)
    monkeypatch.delenv("FASTPREFIX_TILES", raising=False)

    def write(name: str, **kernels: Any) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(kernels))
        return path

    tile_config.forget()
    yield write
    tile_config.forget()


def row(D: int, S: int | None = None, itemsize: int = 2, **tile: Any) -> dict[str, Any]:
    return {"D": D, "itemsize": itemsize, **({} if S is None else {"S": S}), **tile}


def warps(device: tuple[int, str], D: int = 64, itemsize: int = 2, S: int = 512, kernel: str = "fwd") -> int:
    return tile_config.tile(kernel, device, D, itemsize, S).num_warps


def test_the_nearest_length_in_octaves_and_the_smallest_head_dim_that_fits(shipped: Write) -> None:
    rows = [row(128, 512, num_warps=4), row(128, 8192, num_warps=8), row(256, 512, num_warps=16)]
    shipped("sm_80", fwd=[*rows, row(64, itemsize=4, num_warps=2)])
    found = {S: warps((80, ""), 128, S=S) for S in (0, 1, 512, 1023, 2048, 4096, 10**6)}
    assert found == {0: 4, 1: 4, 512: 4, 1023: 4, 2048: 4, 4096: 8, 10**6: 8}
    assert [warps((80, ""), D) for D in (16, 128, 256)] == [4, 4, 16]
    assert warps((80, ""), 64, itemsize=4) == 2
    for D, itemsize, kernel in ((128, 4, "fwd"), (64, 2, "bwd_dq")):
        with pytest.raises(ValueError, match=f"no row for {kernel}, D = {D}, itemsize = {itemsize}"):
            warps((80, ""), D, itemsize, kernel=kernel)


def test_tables_in_turn(shipped: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named, the device's, the architecture's, sm_80; each may lack what the next one has."""
    for number, (name, D) in enumerate((("sm_80", 256), ("sm_90", 128), ("nvidia_h100_80gb_hbm3", 64), ("mine", 32))):
        shipped(name, fwd=[row(D, num_warps=1 << number)])
    assert [warps(H100, D) for D in (16, 64, 128, 256)] == [4, 4, 2, 1]
    assert [warps((90, "another"), D) for D in (64, 128, 256)] == [2, 2, 1]
    assert warps((120, "newer"), 64) == 1 and warps((86, "older"), 64) == 1
    monkeypatch.setenv("FASTPREFIX_TILES", str(tile_config.FOLDER / "mine.json"))
    assert [warps(H100, D) for D in (16, 64, 256)] == [8, 4, 1]
    shipped("wide", fwd=[row(256, num_warps=32)])
    monkeypatch.setenv("FASTPREFIX_TILES", str(tile_config.FOLDER / "wide.json"))
    assert [warps(H100, D) for D in (32, 64, 256)] == [32, 4, 32], "tuned for one head dim, it answers no other's"


def test_the_interpreter_has_a_table_of_its_own(shipped: Write) -> None:
    shipped("interpreter", fwd=[row(256, num_warps=2)])
    shipped("sm_80", fwd=[row(64, num_warps=4)])
    assert warps((0, "interpreter"), 64) == 2 and warps((80, ""), 64) == 4


def test_a_tile_that_is_forced_answers_everything(shipped: Write) -> None:
    shipped("sm_80", fwd=[row(64)], bwd_dq=[row(64)])
    outer, inner = Tile(BLOCK_M=16), Tile(BLOCK_M=32)
    with tile_config.recorded() as asked, tile_config.forced("fwd", outer):
        with tile_config.forced("fwd", inner):
            assert tile_config.tile("fwd", H100, 256, 8, 1) == inner
        assert tile_config.tile("fwd", H100, 64, 2, 5) == outer
        assert tile_config.tile("bwd_dq", H100, 64, 2, 5) == Tile()
    assert tile_config.tile("fwd", H100, 64, 2, 5) == Tile()
    assert [(x.kernel, x.D, x.S, x.tile) for x in asked] == [
        ("fwd", 256, 1, inner),
        ("fwd", 64, 5, outer),
        ("bwd_dq", 64, 5, Tile()),
    ]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("BLOCK_M", 48, "a power of two from 16 to 1024"),
        ("BLOCK_P", 8, "a power of two from 16"),
        ("num_warps", "4", "a power of two from 1 to 32"),
        ("num_stages", 2.0, "a whole number from 1 to 8"),
        ("num_warps", True, "a power of two"),
        ("TMA", 1, "true or false"),
        ("BLOCK_K", 64, "one of the fields D, itemsize, S, BLOCK_M"),
        ("D", 80, "a power of two from 16 to 256"),
        ("itemsize", 8, "a power of two from 2 to 4"),
        ("S", 0, "a whole number from 1"),
    ],
)
def test_a_bad_row_is_named_with_its_field(shipped: Write, field: str, value: Any, expected: str) -> None:
    path = shipped("sm_80", fwd=[row(64), {**row(64), field: value}])
    with pytest.raises(ValueError) as error:
        tile_config.tile("fwd", H100, 64, 2, 512)
    assert f"{path}, fwd row 1, {field}: got {value!r}, expected {expected}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a table of tiles"),
        ("[]", "got list"),
        ('{"fwd": {"D": 64}}', "expected a list of rows"),
        ('{"fwd": [64]}', "fwd row 0: got 64, expected an object"),
        ('{"fwd": [{"D": 64}]}', "fwd row 0, itemsize: got nothing"),
        ('{"target": 90}', "target: got 90"),
        (None, "expected a table of tiles"),
    ],
)
def test_what_is_no_table_says_so(
    text: str | None, message: str, shipped: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("FASTPREFIX_TILES", str(path))
    with pytest.raises(ValueError) as error:
        tile_config.tile("fwd", H100, 64, 2, 512)
    assert str(path) in str(error.value) and message in str(error.value)


def test_tables_say_what_they_are_for(shipped: Write) -> None:
    assert tile_config.capability(shipped("sm_90", fwd=[])) == 90
    assert tile_config.capability(shipped("nvidia_h200", target="sm_90", fwd=[])) == 90
    with pytest.raises(ValueError, match="got no target"):
        tile_config.capability(shipped("nvidia_l4", fwd=[]))


def test_candidates_are_few_and_differ_from_the_present_tile() -> None:
    for kernel in (*AXES, "fwd_general"):
        for D in (64, 128, 256):
            found = candidate_tiles(kernel, D, Tile())
            assert 4 <= len(set(found)) == len(found) <= 100 and Tile() not in found, kernel
    assert not any(tile.TMA for tile in candidate_tiles("fwd_general", 64, Tile()))
    assert not candidate_tiles("bwd_delta", 64, Tile())


def test_problems_that_are_tuned_without_a_shape() -> None:
    names = {target.name for shape in TRAINING for target in tuning_targets(Problem.train(*shape))}
    assert names | {target.name for shape in DECODING for target in tuning_targets(Problem.decode(*shape))} == {
        "fused",
        "epilogue",
        "decode",
    }


TINY = Problem.train(1, 2, 1, 16, 8, 16, device=DEVICE)
CANDIDATES = [Tile(32, 32, 16, num_warps=2), Tile(16, 32, 16, num_warps=2)]


def _one_to_two(fns: dict[str, Callable[[], None]], *args: Any) -> dict[str, Timing]:
    for fn in fns.values():
        fn()
    return {name: Timing((1.0 if name == "new" else 2.0,)) for name in fns}


def test_what_is_tuned_is_written_and_then_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(autotune, "interleaved", _one_to_two)
    out, told = tmp_path / "tuned.json", []
    outcomes = tune([TINY], out, ["fwd"], lambda kernel, D, tile: CANDIDATES, 1, told.append)
    assert outcomes == told and [(x.asked.kernel, x.best, x.tried) for x in outcomes] == [("fwd", CANDIDATES[0], 2)]
    assert (outcomes[0].before, outcomes[0].after, outcomes[0].discarded) == (2.0, 1.0, {})
    monkeypatch.setenv("FASTPREFIX_TILES", str(out))
    with tile_config.recorded() as asked, torch.no_grad():
        prefix_attention(**Leaves.random(TINY).inputs, backend="triton")
    assert [(x.kernel, x.tile) for x in asked] == [("fwd", CANDIDATES[0])]


def test_candidates_that_are_wrong_or_fail_are_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter(("o: error 1.00e+00, eager's 1.00e-07", None))
    monkeypatch.setattr(autotune, "broken_rule", lambda *args: next(verdicts))

    def fails(fns: dict[str, Callable[[], None]], *args: Any) -> dict[str, Timing]:
        if "new" in fns:
            raise RuntimeError("out of resource: shared memory")
        return _one_to_two(fns)

    monkeypatch.setattr(autotune, "interleaved", fails)
    (outcome,) = tune([TINY], tmp_path / "tuned.json", ["fwd"], lambda kernel, D, tile: CANDIDATES, 1)
    assert outcome.best == outcome.asked.tile and (outcome.before, outcome.after) == (2.0, 2.0)
    wrong, failed = (outcome.discarded[tile] for tile in CANDIDATES)
    assert wrong.startswith("wrong: o: error") and "out of resource" in failed


PROBLEMS = [TINY, Problem.decode(2, 2, 1, 20, 24, 16, device=DEVICE)]


@pytest.mark.parametrize(
    "target", [target for problem in PROBLEMS for target in tuning_targets(problem)], ids=lambda x: x.name
)
def test_every_route_gives_all_that_it_can_and_gives_it_right(target: TuningTarget) -> None:
    leaves = Leaves.random(target.problem, requires_grad=True)
    got = target(leaves)
    assert len(got) == (2 if target.name == "decode" else 7)
    assert broken_rule(target.problem, leaves, got) is None


@pytest.mark.slow
def test_every_kernel_is_found_and_timed_alone(tmp_path: Path) -> None:
    outcomes = tune(PROBLEMS, tmp_path / "tuned.json", None, lambda kernel, D, tile: [], 1)
    assert [x.asked.kernel for x in outcomes] == list(AXES) == list(tile_config.read(tmp_path / "tuned.json"))
    assert all(x.before == x.after > 0 for x in outcomes)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastprefix import cli

    monkeypatch.setattr(autotune.tune, "__defaults__", (None, lambda kernel, D, tile: CANDIDATES, 1, print))
    monkeypatch.setattr(autotune, "interleaved", _one_to_two)
    out = tmp_path / "tuned.json"
    options = ["--shape", "1,2,1,16,8,16", "--dtype", "fp32", "--kernel", "fwd", "--out", str(out)]
    assert cli.main(["bench", "--tune", *options]) == 0
    told = capsys.readouterr().out
    assert "fwd D16 32 bits S16: 2 s with" in told and "-> 1 s with 32/32/16 2 warps" in told
    assert f"FASTPREFIX_TILES={out}" in told and tile_config.read(out)
    for words, message in (
        (["--tune", "--kernel", "forward"], "--kernel forward: expected one of fwd"),
        (["--tune", "--resources"], "expected one of them"),
        (["--out", "x.json"], "--out: expected --tune with it"),
        (["--target", "sm_80"], "--target: expected --resources with it"),
        (["--tune", "--shape", "1,2,1,16,8,16", "--dtype", "fp64"], "torch.float64"),
    ):
        assert cli.main(["bench", *words]) == cli.USER_ERROR
        assert message in capsys.readouterr().err
