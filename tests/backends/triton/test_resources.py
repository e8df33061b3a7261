"""The gate on what shipped kernels take of a GPU: that it holds, and that it can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fastprefix import cli
from fastprefix.backends.launch import launcher, tile_config
from fastprefix.cli.bench_kernels import TARGETS
from fastprefix.measure.kernels import compile_report
from fastprefix.measure.kernels.compile_matrix import CompileCase, CompileJob, plan_compilation, trace_launches
from fastprefix.measure.kernels.compile_report import SHARED, Usage, find_faults
from fastprefix.measure.kernels.kernel_calls import HELPERS, KERNEL_CALLS, P16

CONSTRAINTS = (Path(__file__).parents[3] / "constraints.txt").read_text()
(COMPILER,) = re.findall(r"^triton==(\S+)", CONSTRAINTS, re.MULTILINE)
tables_are_for_this_compiler = pytest.mark.skipif(
    version("triton") != COMPILER, reason=f"tiles are fitted to the registers that triton {COMPILER} allocates"
)
GOOD = Usage(registers=168, stack=0, shared=100_000, wgmma=True, tma=True)
FWD = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_P": 64, "num_warps": 8, "num_stages": 2, "TMA": True}


def bench(*options: str, table: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``fastprefix bench --resources`` in a process of its own: in this one kernels may be interpreted."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTPREFIX_TILES")}
    env.update({} if table is None else {"FASTPREFIX_TILES": str(table)})
    command = [sys.executable, "-m", "fastprefix.cli", "bench", "--resources", "--markdown", *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def rows(out: str) -> list[list[str]]:
    """Cells of the table's body."""
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def check_survey(done: subprocess.CompletedProcess[str], targets: Sequence[str] = tuple(TARGETS)) -> None:
    found = rows(done.stdout)
    told = "\n".join(line for line in done.stdout.splitlines() if not line.endswith("good |"))
    assert done.returncode == 0 and found, told + done.stderr
    assert all(row[-1] == "good" and row[11] == "0" for row in found)
    for target in targets:
        assert {tile_config.launched(row[0]) for row in found if row[1] == target} == {*KERNEL_CALLS, *HELPERS}


@pytest.mark.slow
@tables_are_for_this_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits(target: str, tmp_path: Path) -> None:
    """Of every kernel and its general form one shipped tile, that of bf16 and D = 128, where registers are scarce."""
    shipped = tile_config.read(tile_config.FOLDER / f"{target}.json")
    sizes = {name: [row for row in rows if (row["D"], row["itemsize"]) == (128, 2)] for name, rows in shipped.items()}
    table = tmp_path / "sample.json"
    table.write_text(json.dumps({name: [max(rows, key=lambda row: row.get("S", 0))] for name, rows in sizes.items()}))
    check_survey(bench("--quick", "--target", target, table=table), [target])


@pytest.mark.slow
@pytest.mark.exhaustive
@tables_are_for_this_compiler
def test_what_takes_most_of_every_tile_compiles_and_fits() -> None:
    check_survey(bench("--quick"))


@pytest.mark.slow
@pytest.mark.exhaustive
@tables_are_for_this_compiler
def test_everything_compiles_and_fits() -> None:
    check_survey(bench())


@pytest.mark.slow
def test_tiles_that_are_too_large_fail_the_gate(tmp_path: Path) -> None:
    tile = {"itemsize": 2, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_P": 16, "num_stages": 2, "TMA": True}
    spilling, piled = {**tile, "D": 128, "num_warps": 4}, {**tile, "D": 64, "num_warps": 8, "num_stages": 8}
    table = tmp_path / "large.json"
    table.write_text(json.dumps({"fwd": [spilling, piled], "forward": [piled]}))
    done = bench("--quick", "--target", "sm_90", table=table)
    verdicts = {row[2]: row[-1] for row in rows(done.stdout)}
    assert done.returncode == 1 and set(verdicts) == {"128", "64"}
    assert "spills: " in verdicts["128"] and "shared memory: " in verdicts["64"]
    assert "large.json: nothing asks for forward row 0" in done.stdout


def test_a_table_that_is_none_is_one_line(tmp_path: Path) -> None:
    table = tmp_path / "bad.json"
    table.write_text('{"fwd": [{"D": 64, "itemsize": 2, "BLOCK_M": 48}]}')
    done = bench(table=table)
    assert done.returncode == cli.USER_ERROR and done.stderr.count("\n") == 1
    assert f"{table}, fwd row 0, BLOCK_M: got 48" in done.stderr


@pytest.mark.parametrize(
    ("kernel", "options", "usage", "capability", "reason"),
    [
        ("fwd", {}, {}, 90, None),
        ("fwd", {}, {"stack": 8}, 90, "spills: 8 bytes"),
        ("fwd", {}, {"shared": SHARED[90] + 1}, 90, "shared memory: 232449 bytes of 232448"),
        ("fwd", {}, {"shared": SHARED[90], "wgmma": False}, 90, "no tensor-core instruction"),
        ("fwd", {}, {"mma": True}, 90, "mma.sync where wgmma is possible"),
        ("fwd", {}, {"wgmma": False, "mma": True}, 90, "mma.sync where wgmma is possible"),
        ("fwd", {"BLOCK_M": 32}, {"wgmma": False, "mma": True}, 90, None),
        ("fwd", {"num_warps": 2}, {"wgmma": False, "mma": True}, 90, None),
        ("fwd", {}, {"tma": False}, 90, "no TMA instruction"),
        ("fwd", {"TMA": False}, {"tma": False}, 90, None),
        ("fwd", {"TMA": False}, {"wgmma": False, "mma": True, "tma": False}, 80, None),
        ("fwd", {"TMA": False}, {"wgmma": False, "mma": True, "shared": SHARED[80] + 1}, 80, "shared memory"),
        ("bwd_dkdv", {"BLOCK_M": 32}, {"mma": True}, 90, "mma.sync where"),
        ("bwd_dkdv", {"BLOCK_N": 32}, {"mma": True}, 90, None),
        ("bwd_dprefix", {"BLOCK_D": 64, "BLOCK_DV": 64, "BLOCK_P": 16}, {"mma": True}, 90, "mma.sync where"),
        ("bwd_dprefix", {"BLOCK_D": 64, "BLOCK_DV": 32, "BLOCK_P": 16}, {"mma": True}, 90, None),
        ("bwd_dprefix", {"BLOCK_D": 32, "BLOCK_DV": 32, "BLOCK_P": 64}, {"mma": True}, 90, "mma.sync where"),
        ("epilogue_bwd", {"BLOCK_D": 32, "BLOCK_DV": 32}, {"mma": True}, 90, None),
        ("epilogue_bwd", {"BLOCK_D": 64, "BLOCK_DV": 64}, {"mma": True}, 90, "mma.sync where"),
        ("bwd_delta", {"TMA": False}, {"wgmma": False}, 90, None),
        ("bwd_delta", {"TMA": False}, {"wgmma": False, "stack": 4}, 90, "spills"),
    ],
)
def test_the_verdict(
    kernel: str, options: dict[str, Any], usage: dict[str, Any], capability: int, reason: str | None
) -> None:
    found = find_faults(kernel, {**FWD, **options}, Usage(**{**vars(GOOD), **usage}), capability)
    assert len(found) == (reason is not None) and (reason or "") in "".join(found)


def test_a_kernel_that_does_not_compile_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CompileCase(80, "", "fwd", 64, 2, 512, P16)

    def breaks(*args: Any) -> Usage:
        raise RuntimeError("`ptxas` failed with error code 255")

    monkeypatch.setattr(launcher, "INTERPRETER", False)
    monkeypatch.setattr(compile_report, "usage_of", breaks)
    with tile_config.forced("fwd", tile_config.Tile()):
        result = compile_report.compile_job(CompileJob([call], 0))
    assert result.usage is None and result.reasons == [
        "does not compile: RuntimeError: `ptxas` failed with error code 255"
    ]


def test_the_driver_is_put_back() -> None:
    from triton.runtime import driver

    before = driver._active
    with pytest.raises(KeyError), compile_report._target(90):
        target = driver.active.get_current_target()
        assert (target.backend, target.arch, target.warp_size) == ("cuda", 90, 32)
        raise KeyError
    assert driver._active is before


@pytest.mark.skipif(not launcher.INTERPRETER, reason="kernels are not interpreted here")
def test_the_interpreter_has_nothing_to_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--resources"]) == cli.USER_ERROR
    assert "got TRITON_INTERPRET=" in capsys.readouterr().err


def test_without_triton_or_its_tools_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "INTERPRETER", False)
    monkeypatch.setattr(compile_report.Path, "exists", lambda path: False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["bench", "--resources"]) == cli.USER_ERROR
    assert "got no cuobjdump, expected" in capsys.readouterr().err
    monkeypatch.setattr(compile_report.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--resources"]) == cli.USER_ERROR
    assert "got no triton, expected" in capsys.readouterr().err


Write = Callable[..., Path]
BF16, FP32 = {"D": 256, "itemsize": 2}, {"D": 64, "itemsize": 4}
ROWS: dict[str, Any] = {kernel: [BF16, FP32] for kernel in KERNEL_CALLS}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a table, by name, into a folder that stands in the place of the shipped one."""
    monkeypatch.setattr(tile_config, "FOLDER", tmp_path)
    monkeypatch.setattr(launcher, "INTERPRETER", False)  # nothing is launched, and the rows of a GPU are asked for
    monkeypatch.delenv("FASTPREFIX_TILES", raising=False)

    def table(name: str, **kernels: Any) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(kernels))
        return path

    tile_config.forget()
    yield table
    tile_config.forget()


def planned(jobs: list[CompileJob]) -> set[tuple[str, int, str]]:
    """Kernel, head dim and variant of every call that is compiled."""
    return {(call.kernel, call.D, call.variant.name) for job in jobs for call in job.calls}


def test_the_shipped_tables_lack_nothing_and_have_nothing_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "INTERPRETER", False)
    monkeypatch.delenv("FASTPREFIX_TILES", raising=False)
    jobs, missing = plan_compilation(list(TARGETS.values()), quick=True)
    assert not missing
    assert {(call.capability, call.kernel) for job in jobs for call in job.calls} == {
        (capability, kernel) for capability in TARGETS.values() for kernel in KERNEL_CALLS
    }


def test_every_row_is_planned_in_every_variant(write: Write) -> None:
    write("sm_80", **ROWS)
    jobs, missing = plan_compilation([80])
    assert not missing
    pointers = {k: [v.name for v in f.variants if "strides" not in v.has] for k, f in KERNEL_CALLS.items()}
    assert planned(jobs) == {(k, row["D"], name) for k, names in pointers.items() for row in ROWS[k] for name in names}
    fewer, _ = plan_compilation([80], quick=True)
    assert 0 < len(fewer) < len(jobs) and planned(fewer) < planned(jobs)
    assert all(set(family.quick) <= set(family.variants) for family in KERNEL_CALLS.values())


def test_rare_arguments_and_strides_go_to_rows_of_their_own(write: Write) -> None:
    write("sm_80", **ROWS)
    write("sm_90", fwd=[{**BF16, "TMA": True}], fwd_general=[BF16])
    jobs, missing = plan_compilation([90])
    calls = [call for job in jobs for call in job.calls if (call.kernel, call.D) == ("fwd", 256)]
    taken = {
        name: {x.variant.name for x in calls if trace_launches(x).last.kernel == name}
        for name in ("fwd", "fwd_general")
    }
    assert not missing
    assert taken["fwd"] == {"P 16", "G 3", "padding, window"}
    assert taken["fwd_general"] == {"strides", "softcap, window", "segments", "bias", "bank, padding"}


def test_what_a_table_lacks_or_has_in_vain(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("sm_80", **{**ROWS, "fwd": [FP32], "bwd_dq": [*ROWS["bwd_dq"], BF16], "epilogue_fwd": [FP32]})
    write("nvidia_h200", target="sm_90", fwd=[BF16])
    _, missing = plan_compilation([80, 90])
    assert missing == [
        "sm_80: tiles: no row for fwd, D = 64, itemsize = 2",
        "sm_80: tiles: no row for fwd, D = 256, itemsize = 2",
        "sm_80: tiles: no row for epilogue_fwd, D = 64, itemsize = 2",
        "sm_80: tiles: no row for epilogue_fwd, D = 256, itemsize = 2",
        "sm_80, sm_80.json: nothing asks for bwd_dq row 2",
        "sm_90: got no table sm_90.json",
        "sm_90: tiles: no row for epilogue_fwd, D = 64, itemsize = 2",
        "sm_90: tiles: no row for epilogue_fwd, D = 256, itemsize = 2",
    ]
    mine = write("mine", fwd=[BF16, BF16], forward=[BF16])
    monkeypatch.setenv("FASTPREFIX_TILES", str(mine))
    jobs, missing = plan_compilation([80])
    assert {call.kernel for job in jobs for call in job.calls} == {"fwd"}
    assert missing == [f"sm_80, mine.json: nothing asks for {row}" for row in ("fwd row 1", "forward row 0")]
