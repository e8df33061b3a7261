"""A GRPO update of SmolLM2-135M with LoRA whose completions share prompts: TRL, prefix_grouper and ``share_prompts``.

``python -m benches.groups --measure`` takes about twenty minutes on two quiet cores and writes
``benches/results/cpu/groups.json``; without ``--measure`` the tables and the picture of ``docs/sharing.md`` are written
from that. Needs trl and peft; prefix_grouper where it is installed.

rho, beside every ratio, is the limit: the multiplications of the weights with the tokens that one way runs, divided by
those of the other. Attention, which grows with the square of a row's length, is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastprefix
from benches import prefix_grouper
from benches.pictures import COLOURS, GREY, ROOT, machine, panels_as_svg
from benches.readme import fill
from fastprefix.machine.files import write_atomically
from fastprefix.machine.timing import Timing, interleaved, ratio
from fastprefix.measure.report_tables import environment, markdown_table
from fastprefix.measure.training.compare_steps import share_weights
from fastprefix.measure.training.peft_vs_patched import Workload
from fastprefix.measure.training.saved_bytes import SavedBytes

RESULTS, PAGE = ROOT / "benches" / "results" / "cpu" / "groups.json", ROOT / "docs" / "sharing.md"
PICTURE = ROOT / "docs" / "images" / "shared_prompts.svg"
BEGIN = "<!-- measured: python -m benches.groups -->"
TRL, COMPACT, GROUPER, OURS = "TRL", "TRL, completions scored", "prefix_grouper", "fastprefix"


class Shape(NamedTuple):
    """N prompts of P tokens, G completions of R tokens each."""

    prompts: int
    group: int
    prompt: int
    completion: int

    @property
    def label(self) -> str:
        return f"N{self.prompts} G{self.group} P{self.prompt} R{self.completion}"


CHECKED = (Shape(1, 8, 256, 32), Shape(1, 8, 512, 64), Shape(1, 4, 128, 128), Shape(8, 1, 256, 32))
GRID = tuple(Shape(1, group, prompt, 32) for group in (2, 4, 8) for prompt in (128, 256, 512))


def limits(model: Any, shape: Shape) -> dict[str, float]:
    """rho against a peer that scores every token, and against one that scores completions only."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters() if p.numel() != head or p.dim() != 2)
    if shape.group == 1:  # nothing is shared, and the update is TRL's
        return {TRL: 1.0}
    whole = shape.prompts * shape.group * (shape.prompt + shape.completion)
    scored = shape.prompts * shape.group * shape.completion
    shared = shape.prompts * shape.prompt + scored
    ours = shared * body + scored * head
    return {TRL: whole * (body + head) / ours, COMPACT: (whole * body + scored * head) / ours}


def candidates(model: nn.Module, shape: Shape) -> dict[str, Workload]:
    """The forward and loss of an update, by each way."""
    import peft
    from trl.trainer import utils

    n, rows = shape.prompts, shape.prompts * shape.group
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40000, (n, shape.prompt), generator=generator)
    completions = torch.randint(100, 40000, (rows, shape.completion), generator=generator)
    ids = torch.cat([prompts.repeat_interleave(shape.group, 0), completions], 1)
    labels = ids.clone()
    labels[:, : shape.prompt] = -100
    advantages = torch.randn(rows, 1, generator=generator)

    def policy() -> Any:
        bare: Any = share_weights(model)
        bare.config.use_cache = False
        utils.add_fused_lm_head(bare, outputs=("log_probs", "entropy"))
        torch.manual_seed(0)
        made: Any = peft.get_peft_model(bare, peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
        return made.train()

    def loss(logps: Tensor) -> Tensor:
        ratios = torch.exp(logps - logps.detach())
        return -torch.min(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages).mean()

    def whole(made: Any) -> Tensor:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return loss(made(**given, fused_lm_head=True).log_probs[:, -shape.completion :])

    def compact(made: Any) -> Tensor:
        # TRL scores completions only where Triton runs; the same choice here shows its update as it is on a GPU.
        before, utils._use_triton = utils._use_triton, lambda device: True
        try:
            return whole(made)
        finally:
            utils._use_triton = before

    def workload(forward: Callable[[Any], Tensor], made: Any) -> Workload:
        return Workload(made, lambda: forward(made))

    ours = policy()
    sharing = fastprefix.share_prompts(_trainer_class()(ours))
    runs = {TRL: workload(whole, policy()), COMPACT: workload(compact, policy()), OURS: workload(whole, ours)}
    if find_spec("prefix_grouper") is not None and shape.group > 1:
        grouper = prefix_grouper.log_probabilities
        runs[GROUPER] = workload(lambda made: loss(grouper(made, prompts, completions, shape.group)), policy())
    with torch.no_grad():
        want = runs[TRL].forward()
        for name, run in runs.items():
            if not torch.allclose(run.forward(), want, rtol=1e-3, atol=1e-5):
                raise AssertionError(f"{name} computes another loss")
    if (sharing.computed < sharing.given) != (shape.group > 1) or sharing.not_shared:
        raise AssertionError(f"{sharing} of {shape.label}")
    return runs


def _trainer_class() -> Any:
    from trl import GRPOTrainer

    class Trainer(GRPOTrainer):
        """What ``share_prompts`` looks at of a trainer, without a dataset."""

        def __init__(self, model: Any) -> None:
            self.model, self.ref_model = model, None

    return Trainer


def take(model: Any, shapes: tuple[Shape, ...], repeats: int, peers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Measure updates of these shapes."""
    rows = []
    for shape in shapes:
        runs = {name: run for name, run in candidates(model, shape).items() if name in (*peers, OURS)}
        saved = {}
        for name, run in runs.items():
            with SavedBytes(exclude=run.model.parameters()) as count:
                forward = run.forward()
            forward.backward()  # TRL's head holds what it saved until then
            saved[name] = count.total
            del forward
            gc.collect()
        gc.collect()
        timings = _rounds(runs, repeats)
        row = {
            "label": shape.label,
            "shape": list(shape),
            "rho": limits(model, shape),
            "seconds": {name: timing.median for name, timing in timings.items()},
            "slower": {name: list(ratio(timings, name, OURS)) for name in timings if name != OURS},
            "saved": saved,
        }
        rows.append(row)
        print(row, flush=True)
        del runs
        gc.collect()
    return rows


def _rounds(runs: dict[str, Workload], repeats: int) -> dict[str, Timing]:
    """Interleaved timings of what ran once already. Garbage is collected between rounds, as it is gigabytes here."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(repeats):
        first = turn % len(names)
        order = {name: runs[name] for name in names[first:] + names[:first]}
        for name, timing in interleaved(order, 1, warmup=0).items():
            samples[name] += timing.samples
        gc.collect()
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def measure(repeats: int) -> dict[str, Any]:
    """Everything that the page says."""
    from fastprefix.assets.smollm2 import load_smollm2

    model = load_smollm2()[0]
    return {
        "environment": environment("cpu"),
        "threads": torch.get_num_threads(),
        "checked": take(model, CHECKED, repeats, (TRL, COMPACT, GROUPER)),
        "grid": take(model, GRID, max(repeats - 2, 2), (TRL,)),
    }


def section(found: dict[str, Any]) -> str:
    """What was measured, for ``docs/sharing.md``."""
    rows = []
    for row in found["checked"]:
        for name, (median, low, high) in row["slower"].items():
            limit = f"{row['rho'][name]:.2f}" if name in row["rho"] else ""
            saved = row["saved"]
            rows.append(
                (
                    row["label"],
                    name,
                    f"{median:.2f}x ({low:.2f} to {high:.2f})",
                    limit,
                    f"{saved[name] / 2**20:.0f} MiB",
                    f"{saved[OURS] / 2**20:.0f} MiB",
                    f"{saved[OURS] / saved[name]:.2f}",
                )
            )
    grid = [
        (
            row["label"],
            f"{row['slower'][TRL][0]:.2f}x",
            f"{row['rho'][TRL]:.2f}",
            f"{row['saved'][TRL] / 2**20:.0f} MiB",
            f"{row['saved'][OURS] / 2**20:.0f} MiB",
        )
        for row in found["grid"]
    ]
    return "\n".join(
        (
            f"Measured on {machine(found)}. The ways take turns within one process; a ratio",
            "is the median over the rounds, followed by its quartiles.",
            "",
            markdown_table(("update", "other way", "other / fastprefix", "rho", "saved: other", "ours", "part"), rows),
            "",
            "N prompts of P tokens, G completions of R tokens each. `TRL` is its update as it is on a CPU, where it",
            "scores prompts too; `TRL, completions scored` makes the choice that it makes on a GPU. rho is the limit:",
            "the multiplications of weights with tokens that the other way does, divided by ours. Attention is not in",
            "it, whose rows are shorter here, nor what TRL does with scores of prompts: a ratio may exceed it.",
            "",
            "More groups and prompts, one prompt each, against TRL's update as it is on a CPU:",
            "",
            markdown_table(("update", "TRL / fastprefix", "rho", "saved: TRL", "fastprefix"), grid),
        )
    )


def draw(found: dict[str, Any]) -> str:
    """Time and memory of an update by P, for each group size G, as SVG."""
    styles = {2: ":", 4: "--", 8: "-"}
    series = {
        what: [
            (group, name, [(r["shape"][2], value(r, name)) for r in found["grid"] if r["shape"][1] == group])
            for group in styles
            for name in (TRL, OURS)
        ]
        for what, value in (
            ("seconds of an update", lambda r, name: r["seconds"][name]),
            ("MiB saved for the backward pass", lambda r, name: r["saved"][name] / 2**20),
        )
    }

    def plot(panels: Any) -> None:
        for axes, (what, lines) in zip(panels, series.items(), strict=True):
            for group, name, points in lines:
                colour = COLOURS["peft" if name == TRL else "ours"]
                axes.plot(*zip(*points, strict=True), styles[group], color=colour, label=f"{name}, G = {group}")
            axes.set_title(what, color=GREY, fontsize=10)
            axes.set_xlabel("prompt tokens P", color=GREY)
            axes.set_ylim(bottom=0)
        panels[0].legend(frameon=False, labelcolor=GREY, fontsize=8, loc="upper left")

    return panels_as_svg(plot, f"SmolLM2-135M with LoRA, R = 32; {machine(found)}")


def pages() -> dict[Any, str]:
    """The page and the picture, as they ought to be from the results on disk."""
    found = json.loads(RESULTS.read_text())
    return {PAGE: fill(PAGE.read_text(), section(found), BEGIN), PICTURE: draw(found)}


def main() -> None:
    """Measure on request, then write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure first")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a row; of the grid two fewer")
    args = parser.parse_args()
    if args.measure:
        write_atomically(RESULTS, json.dumps(measure(args.repeats), indent=1) + "\n")
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
