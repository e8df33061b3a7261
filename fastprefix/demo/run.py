"""The demo from end to end; every number that it prints is measured in this run."""

from __future__ import annotations

import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import fastprefix
from fastprefix import init, inspection
from fastprefix.assets.glosses import load_glosses
from fastprefix.assets.smollm2 import load_smollm2
from fastprefix.data import encode_pairs
from fastprefix.demo import compare, plot, training
from fastprefix.machine.files import write_atomically
from fastprefix.measure.report_tables import environment

PROMPT = "A glossary of nouns with one brief definition for each.\n"
NUM_VIRTUAL_TOKENS = 12
NUMBERS, PICTURE, PAGE = "demo.json", "demo.png", "inspect.html"
QUICK_STEPS, QUICK_HELDOUT = 3, 8


def run(steps: int = 40, output: str | Path = "fastprefix-demo", quick: bool = False) -> int:
    """Train, save, load in PEFT, measure and plot; ``quick`` takes few steps and measures nothing.

    Returns:
        0, the exit status.

    Raises:
        ImportError: a package is missing; the message says how to install it.
        OSError: ``output`` cannot be written.
    """
    start, folder = time.perf_counter(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    _require("peft", "tqdm", "matplotlib")
    print("fastprefix demo: SmolLM2-135M learns to gloss nouns as WordNet does", flush=True)
    steps = min(steps, QUICK_STEPS) if quick else steps
    results: dict[str, Any] = {"environment": environment("cpu"), "steps": steps}
    model, tokenizer = load_smollm2()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # caused by PEFT's calls
        _train(model, tokenizer, folder, quick, results)
        rows = [] if quick else _compare(tokenizer, folder, results)
    plot.plot(folder / PICTURE, results["losses"], results["heldout_loss"], rows)
    results["total_seconds"] = time.perf_counter() - start
    _write(folder, results)
    print(f"\nall of it in {_minutes(results['total_seconds'])}; in {folder}: adapter/, {NUMBERS}, {PICTURE}, {PAGE}")
    return 0


def _train(model: Any, tokenizer: Any, folder: Path, quick: bool, results: dict[str, Any]) -> None:
    heldout = load_glosses("heldout", QUICK_HELDOUT if quick else None)
    examples = heldout[:3]
    config = fastprefix.PrefixConfig(NUM_VIRTUAL_TOKENS, init=init.text(PROMPT, tokenizer))
    prefix = fastprefix.attach(model, config)
    started = copy.deepcopy(prefix)
    fastprefix.save(model, folder / "start")
    parameters = list(prefix.parameters())
    trained = sum(p.numel() for p in parameters)
    total = sum(p.numel() for p in model.parameters())
    print(f"a prefix of {NUM_VIRTUAL_TOKENS} tokens starts at the model's own keys and values of {PROMPT!r}")
    print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})")

    losses = results["heldout_loss"] = {}
    fastprefix.set_prefix(model, None)
    losses["without"] = training.heldout_loss(model, heldout, tokenizer)
    before = training.generate(model, examples, tokenizer)
    print(f"held-out loss without prefix    {losses['without']:.3f}", flush=True)
    fastprefix.set_prefix(model, "default")
    losses["untrained"] = training.heldout_loss(model, heldout, tokenizer)
    print(f"held-out loss untrained prefix  {losses['untrained']:.3f}", flush=True)
    results["losses"] = training.train(model, parameters, load_glosses("train"), tokenizer, results["steps"])
    losses["trained"] = training.heldout_loss(model, heldout, tokenizer)
    print(f"held-out loss trained prefix    {losses['trained']:.3f}", flush=True)
    after = training.generate(model, examples, tokenizer)
    results["generations"] = []
    for pair, without, with_prefix in zip(examples, before, after):
        word = pair["prompt"].split("\n")[0].removeprefix("gloss: ")
        print(f"\n  {word}\n    without prefix: {without}\n    trained prefix: {with_prefix}")
        results["generations"].append({"word": word, "without": without, "trained": with_prefix})

    adapter = folder / "adapter"
    fastprefix.save(model, adapter)
    size = sum(file.stat().st_size for file in adapter.iterdir())
    fresh, _ = load_smollm2()
    batch = encode_pairs(heldout[: training.BATCH_SIZE], tokenizer)
    difference = results["peft_max_logit_difference"] = training.peft_difference(model, fresh, adapter, batch)
    print(f"\nadapter of {size / 2**20:.1f} MiB saved; PeftModel.from_pretrained on a fresh model reads it:")
    print(f"largest logit difference {difference:.1e}, below {training.MAX_LOGIT_DIFFERENCE}: the same model")
    _write(folder, results)
    _inspect(model, tokenizer, folder, started, size, quick)


def _inspect(model: Any, tokenizer: Any, folder: Path, started: Any, size: int, quick: bool) -> None:
    """Write the page that ``fastprefix inspect FOLDER/adapter --start FOLDER/start`` would write."""
    texts = inspection.encode(inspection.own_samples(), tokenizer, 96, 24)
    new_tokens = 8 if quick else 32
    found = inspection.gather(
        model,
        tokenizer,
        texts,
        adapter="adapter",
        about="SmolLM2-135M",
        start=started,
        max_new_tokens=new_tokens,
        file_bytes=size,
    )
    write_atomically(folder / PAGE, inspection.page(found))
    print(f"what the prefix does: {folder / PAGE}")


def _compare(tokenizer: Any, folder: Path, results: dict[str, Any]) -> list[compare.Row]:
    text = "\n".join(pair["prompt"] + pair["completion"] for pair in load_glosses("train", 100))
    model, _ = load_smollm2()
    B, S = compare.ROWS, compare.TOKENS
    ids = torch.tensor(tokenizer(text)["input_ids"][: B * S]).view(B, S)
    rows: list[compare.Row] = []
    for length in compare.LENGTHS:
        print(f"measuring a training step at P = {length}, in turns ...", flush=True)
        rows += compare.compare(model, ids, length)
        print(f"  {rows[-1].rounds} rounds")
        results["step"] = {"batch": B, "tokens": S, "rows": [r.to_json() for r in rows]}
        _write(folder, results)
    print("\n" + compare.table(rows))
    return rows


def _write(folder: Path, results: dict[str, Any]) -> None:
    write_atomically(folder / NUMBERS, json.dumps(results, indent=1) + "\n")


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo also needs {', '.join(missing)}: pip install 'fastprefix[demo]'")


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
