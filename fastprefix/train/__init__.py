"""``fastprefix train``: a prefix or a soft prompt for a causal language model, from a file of examples."""

from __future__ import annotations

import argparse

from fastprefix.train.checkpointing import checkpoint_layers

__all__ = ["checkpoint_layers", "train"]


def train(options: argparse.Namespace) -> int:
    """Train, show what it changed, save the adapter; options as ``fastprefix train --help``.

    What is wrong is told in the order of what it costs to find: options and files, data, the model's name, the model.

    Returns:
        0, the exit status.

    Raises:
        OSError, ValueError: a file or an option is wrong.
    """
    from fastprefix.data import read_data
    from fastprefix.models import find_model
    from fastprefix.options import check_file, check_output

    if options.method == "prompt" and options.prefix_projection:
        raise ValueError("--prefix-projection: expected --method prefix with it: a soft prompt has no MLP")
    if options.init is not None and options.init_text is not None:
        raise ValueError("--init and --init-text: expected one of the two")
    check_output("--output", options.output)
    check_file("--data", options.data)
    if options.eval_data is not None:
        check_file("--eval-data", options.eval_data)
    data = read_data(options.data)
    heldout = None if options.eval_data is None else read_data(options.eval_data)
    if heldout is not None and heldout.kind != data.kind:
        raise ValueError(f"--eval-data: got {heldout.about}, expected lines of the same kind as --data: {data.about}")
    found = find_model(options.model)

    from fastprefix.train.run import run

    return run(options, found, data, heldout)
