"""What the device suite judges by: does each call depend on its arguments, each model on its prefix, and the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import device, sanitize
from benches.device_suite import compiled_kernels
from benches.device_suite.operator_calls import CALLS
from benches.device_suite.parallel_compile import CompilePool
from benches.device_suite.plan import OperatorCheck, OperatorTiming, TrainingTiming, jobs
from fastprefix.measure import Problem
from fastprefix.measure.operator.correctness import broken_rule, eager, results, truth

SMALL = {name: call.small() for name, call in CALLS.items()}
H100 = (90, "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("name", SMALL)
def test_the_rule_knows_every_argument(name: str) -> None:
    """Eager and the oracle agree on each; leave one out, or take it for all, and the rule is broken."""
    call = SMALL[name]
    leaves, options = call.build()
    want, peer = truth(call.problem, leaves, options), eager(call.problem, leaves, options)
    for key, x in want.items():
        torch.testing.assert_close(peer[key].double(), x, rtol=2e-4, atol=2e-5)
    assert broken_rule(call.problem, leaves, peer, options) is None
    for left_out in set(options) - {"prefix_ids", *(["prefix_lens"] if call.packed else [])}:
        fewer: dict[str, Any] = {key: x for key, x in options.items() if key != left_out}
        got = results(leaves, causal=call.problem.causal, backend="reference", **fewer)
        assert broken_rule(call.problem, leaves, got, options), left_out
    if "prefix_ids" in options:
        wrong = results(
            leaves,
            causal=call.problem.causal,
            backend="reference",
            **{**options, "prefix_ids": options["prefix_ids"] * 0},
        )
        assert broken_rule(call.problem, leaves, wrong, options)


def test_every_argument_of_the_operator_is_there() -> None:
    named = {key for call in SMALL.values() for key in call.build()[1]}
    assert named == {
        *("key_padding_mask", "segment_ids", "q_start", "window", "softcap", "sinks", "bias", "gate", "scale"),
        *("prefix_ids", "prefix_lens", "prefix_bias"),
    }, "dropout_p is left out on purpose"
    assert any(call.width for call in CALLS.values()) and any(call.master for call in CALLS.values())


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT"])
def test_models_are_held_to_concatenation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from benches.device_suite.model_correctness import ModelUnderTest, cases, release
    from benches.device_suite.operator_correctness import verdict

    judged = dict(cases(name, "reference", "fp32", "cpu", smoke=True))
    assert {verdict(judge) for judge in judged.values()} == {"ok"}
    own = ModelUnderTest._pairs
    monkeypatch.setattr(ModelUnderTest, "_pairs", lambda self, dtype: [(k, 1.01 * v) for k, v in own(self, dtype)])
    assert verdict(judged["logits and gradients"]).startswith("wrong: logits")
    monkeypatch.undo()
    monkeypatch.setattr(ModelUnderTest, "_positions", lambda self, inputs: torch.zeros_like(inputs["input_ids"]))
    assert verdict(judged["padded"]).startswith("wrong: logits")
    release()


def test_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main(["--list"]) == 0
    rows, total = capsys.readouterr().out.splitlines()[-1].split(" rows, about ")
    plan = jobs("cuda", smoke=False)
    assert int(rows) == len(plan) == len({job.key for job in plan})
    assert float(total.split(" s of a budget")[0]) <= device.BUDGET
    assert device.main(["--list", "--only", "step"]) == 0
    steps = [job for job in plan if isinstance(job, TrainingTiming)]
    assert f"\n{len(steps)} rows, " in capsys.readouterr().out
    assert {(job.batch, job.num_virtual_tokens) for job in steps} == {(8, 16), (8, 128), (8, 2048)}
    modes = {(job.mode, job.graphs) for job in plan if isinstance(job, OperatorTiming)}
    assert modes == {(m, False) for m in ("forward", "backward", "lowest", "decode")} | {("decode", True)}


def _count(calls: list[compiled_kernels.MetaCall], place: compiled_kernels.Device) -> int:
    found, reasons = compiled_kernels.distinct_kernels(calls, place)
    assert not reasons
    return len(found)


def test_kernels_are_told_apart() -> None:
    """One more of a size that only moves a pointer is no other kernel; another head dim, a mask or a dtype is."""
    pytest.importorskip("triton")
    place = (0, "interpreter")  # whose tiles are always there
    x = Problem.train(2, 8, 2, 128, 32, 64, dtype=torch.bfloat16)
    forward = compiled_kernels.MetaCall(x, None)
    assert _count([forward], place) == 1
    same = [forward, compiled_kernels.MetaCall(replace(x, B=3, S=240, T=240), None)]
    assert _count(same, place) == 1
    other = [replace(x, D=128), replace(x, dtype=torch.float16), replace(x, S=130, T=130)]
    more = [compiled_kernels.MetaCall(y, None) for y in other]
    assert _count([forward, compiled_kernels.MetaCall(x, None, padded=True), *more], place) == 5
    trained = compiled_kernels.meta_calls(
        [OperatorCheck("shapes", "triton", "bf16"), OperatorTiming(x, "backward"), OperatorTiming(x, "lowest")]
    )
    assert compiled_kernels.MetaCall(x, compiled_kernels._needs(("prefix_k", "prefix_v"))) in trained
    assert all(source.epilogue for source in compiled_kernels.meta_calls([OperatorCheck("shapes", "aten", "bf16")]))
    assert compiled_kernels.meta_calls([OperatorCheck("shapes", "reference", "bf16")]) == []


def test_the_plan_reaches_every_kernel() -> None:
    pytest.importorskip("triton")
    reached = set()
    for source in compiled_kernels.meta_calls(
        job for job in jobs("cuda", smoke=False) if isinstance(job, OperatorCheck)
    ):
        reached |= {launch.kernel.__name__ for launch in compiled_kernels.launches(source, (0, "interpreter"))}
    assert reached == sanitize.kernels()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles for no device")
def test_other_processes_compile() -> None:
    pytest.importorskip("triton")
    plan = [OperatorTiming(Problem.train(2, 4, 2, 64, 16, 32), "lowest")]
    with CompilePool(plan, (0, "interpreter")) as compilers:
        assert (compilers.wait() or "").startswith("3 kernels compiled by ")
        assert compilers.wait() is None
    with CompilePool([], (0, "interpreter")) as compilers:
        assert compilers.wait() is None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the whole of it is run by hand there")
def test_every_kernel_is_launched_for_the_sanitizer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert sanitize.main([]) == 2
    assert sanitize.main(["--smoke"]) == 0, capsys.readouterr().out
    assert "never launched" not in capsys.readouterr().out


@pytest.mark.parametrize("fused", [False, True])
def test_the_cartridge_of_pefts_comparison_starts_from_its_text(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from benches import metamathqa
    from tests.support.tiny_models import tiny_model

    folder = tmp_path / metamathqa.experiment(tmp_path, 8, 0.005, fused)
    assert json.loads((folder / "training_params.json").read_text()) == {"optimizer_kwargs": {"lr": 0.005}}
    ids = [3, 4, 5]
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: lambda text: {"input_ids": ids})
    model = peft.get_peft_model(tiny_model(), peft.PeftConfig.from_pretrained(folder))
    model = metamathqa.started(model, 8, fused)
    rows = torch.tensor([[6, 7, 8, 9]])
    text = torch.tensor([(ids * 3)[:8]])
    with torch.no_grad():
        want = tiny_model()(torch.cat([text, rows], 1)).logits[:, 8:]
        torch.testing.assert_close(model(input_ids=rows).logits, want, rtol=1e-4, atol=1e-4)
