"""``fastprefix explain``: print what a prefix does in each layer of a model, and which backend runs it."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastprefix.cli.options import whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix explain``."""
    parser.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="a folder, a name on the hub, or smollm2")
    parser.add_argument("--adapter", metavar="DIR", help="of a saved prefix, ours or PEFT's; default a new one")
    parser.add_argument(
        "--num-virtual-tokens", type=whole_number(), default=16, metavar="P", help="of a new one, default %(default)s"
    )


def run(options: argparse.Namespace) -> int:
    """Print the explanation of a model with a new prefix or with a saved adapter; returns 0."""
    from fastprefix.models import find_model, load_model

    found = find_model(options.model)
    if options.adapter is not None and not Path(options.adapter).is_dir():
        raise ValueError(f"--adapter: no folder {options.adapter}")

    import fastprefix
    from fastprefix.hf.explain import check_carries
    from fastprefix.verification import first_use

    model = load_model(found, causal=False)
    check_carries(model)
    with first_use.held(quiet=True):  # what is known is told, and nothing verified
        if options.adapter is None:
            fastprefix.attach(model, fastprefix.PrefixConfig(options.num_virtual_tokens))
        else:
            fastprefix.load(model, options.adapter)
    print(fastprefix.explain(model))
    return 0
