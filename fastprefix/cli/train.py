"""``fastprefix train``: a prefix or a soft prompt for a causal language model, from a file of examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastprefix.cli.options import check_file, check_output, positive_number, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix train``."""
    files = parser.add_argument_group("files")
    files.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="causal language model, or smollm2")
    files.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help='JSON lines, all {"prompt": ..., "completion": ...}, or all {"messages": [{"role": ..., "content": ...}, '
        '...]}, or all {"text": ...}; completions, what the assistant says, or all of a text is trained on',
    )
    files.add_argument("--eval-data", metavar="FILE", help="held-out lines of the same kind")
    files.add_argument("--output", required=True, metavar="DIR", help="of checkpoints and, at the end, the adapter")
    files.add_argument(
        "--save-start", metavar="DIR", help="keep the adapter as it is before training, for fastprefix inspect --start"
    )
    prefix = parser.add_argument_group("prefix")
    prefix.add_argument(
        "--method",
        choices=("prefix", "prompt"),
        default="prefix",
        help="keys and values in every layer, or a soft prompt: input embeddings; default %(default)s",
    )
    prefix.add_argument(
        "--num-virtual-tokens",
        type=whole_number(),
        metavar="P",
        help="prefix tokens, default as many as --init-text has, or 16",
    )
    prefix.add_argument("--prefix-projection", action="store_true", help="train an MLP that gives keys and values")
    prefix.add_argument(
        "--init",
        choices=("data", "random"),
        help="start at what the model makes of the first P tokens of --data (default), or at random",
    )
    prefix.add_argument("--init-text", metavar="TEXT", help="start at what the model makes of this text, cut to P")
    steps = parser.add_argument_group("training")
    steps.add_argument(
        "--lr", type=positive_number, default=1e-2, metavar="LR", help="learning rate of AdamW, default %(default)s"
    )
    steps.add_argument("--epochs", type=positive_number, default=3.0, metavar="N", help="default %(default)s")
    steps.add_argument("--max-steps", type=whole_number(), metavar="N", help="in place of --epochs")
    steps.add_argument(
        "--batch-size", type=whole_number(), default=8, metavar="B", help="rows a step, default %(default)s"
    )
    steps.add_argument("--max-length", type=whole_number(), metavar="L", help="cut longer rows to L tokens")
    steps.add_argument("--gradient-checkpointing", action="store_true", help="recompute layers in the backward pass")
    steps.add_argument("--bf16", action="store_true", help="frozen weights in bf16; the prefix stays fp32")
    steps.add_argument(
        "--save-steps", type=whole_number(), metavar="N", help="checkpoint every N steps, default every epoch"
    )
    steps.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    steps.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help="default %(default)s")


def run(options: argparse.Namespace) -> int:
    """Train, show what training changed, and save the adapter.

    The cheapest checks come first, so that an error is told as early as possible: options and files, then the data,
    then the model's name, then the model itself.

    Returns:
        0, the exit status.

    Raises:
        OSError, ValueError: a file or an option is wrong.
    """
    from fastprefix.data import read_data
    from fastprefix.models import find_model

    if options.method == "prompt" and options.prefix_projection:
        raise ValueError("--prefix-projection: expected --method prefix with it: a soft prompt has no MLP")
    if options.init is not None and options.init_text is not None:
        raise ValueError("--init and --init-text: expected one of the two")
    check_output("--output", options.output)
    if options.save_start is not None:
        check_output("--save-start", options.save_start)
        if Path(options.save_start).resolve() == Path(options.output).resolve():
            raise ValueError(f"--save-start: got {options.save_start}, expected another folder than --output")
    check_file("--data", options.data)
    if options.eval_data is not None:
        check_file("--eval-data", options.eval_data)
    data = read_data(options.data)
    heldout = None if options.eval_data is None else read_data(options.eval_data)
    if heldout is not None and heldout.kind != data.kind:
        raise ValueError(f"--eval-data: got {heldout.about}, expected lines of the same kind as --data: {data.about}")
    found = find_model(options.model)

    from fastprefix.train.run import run_training

    return run_training(options, found, data, heldout)
