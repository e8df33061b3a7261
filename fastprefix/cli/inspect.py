"""``fastprefix inspect``: write a page about an adapter: what it is, what attention makes of it, what it costs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastprefix.cli.options import check_file, check_output, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix inspect``."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a prefix or soft prompt, ours or PEFT's")
    parser.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="the one it was trained on, or smollm2")
    parser.add_argument("--output", required=True, metavar="FILE", help="the page, such as report.html")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="texts to read and to go on from; default three glosses of WordNet"
    )
    parser.add_argument("--start", metavar="ADAPTER", help="folder of the same prefix before training, for the map")
    parser.add_argument(
        "--max-length", type=whole_number(2), default=96, metavar="L", help="tokens of a text, default %(default)s"
    )
    parser.add_argument(
        "--max-new-tokens", type=whole_number(), default=32, metavar="N", help="of a generation, default %(default)s"
    )
    parser.add_argument("--bf16", action="store_true", help="the model's weights in bf16")


def run(options: argparse.Namespace) -> int:
    """Write the page; returns 0.

    Raises:
        OSError, ValueError: the adapter, the model, a file or an option is wrong.
    """
    for option, folder in (("ADAPTER", options.adapter), ("--start", options.start)):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{option}: no folder {folder}, expected an adapter's")
    output = Path(options.output)
    check_output("--output", str(output.parent))
    if output.is_dir():
        raise ValueError(f"--output: {output} is a folder, expected a file")
    for file in options.text or ():
        check_file("--text", file)

    from fastprefix import inspection

    samples = inspection.read_samples(options.text) if options.text else inspection.own_samples()

    import fastprefix
    from fastprefix.hf.storage.saved_adapter import SavedAdapter
    from fastprefix.machine.files import write_atomically
    from fastprefix.models import find_model, load_model, load_tokenizer

    found = find_model(options.model)
    SavedAdapter(options.adapter)  # raises before the model is loaded if something is malformed
    tokenizer = load_tokenizer(found)
    texts = inspection.encode(samples, tokenizer, options.max_length, options.max_length // 4)
    model = load_model(found, torch.bfloat16 if options.bf16 else torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    start = None if options.start is None else fastprefix.load(model, options.start, "start")
    fastprefix.load(model, options.adapter)
    files = sum(file.stat().st_size for file in Path(options.adapter).iterdir() if file.is_file())
    result = inspection.gather(
        model,
        tokenizer,
        texts,
        adapter=Path(options.adapter).resolve().name,
        about=options.model,
        start=start,
        max_new_tokens=options.max_new_tokens,
        file_bytes=files,
        progress=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, inspection.page(result))
    print(f"written: {output}")
    return 0
