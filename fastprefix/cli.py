"""The command line: ``fastprefix demo | train | generate | bench | memory | explain``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastprefix.options import check_output, positive_number, whole_number
from fastprefix.quiet import quiet_imports

USER_ERROR, INTERRUPTED, READER_GONE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        its exit status: 0; 2 for what the user can put right, told in one line on stderr; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    options = _parser(words).parse_args(words)
    try:
        with quiet_imports():
            return int(_COMMANDS[options.command].run(options))
    except BrokenPipeError:
        # Whoever reads has had enough, as head does; what is buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except KeyboardInterrupt:
        print(f"\nfastprefix {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if options.traceback:
            raise
        print(f"fastprefix {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    from fastprefix import __version__

    parser = argparse.ArgumentParser(prog="fastprefix", description="Prefix tuning at the cost of the frozen model.")
    parser.add_argument("--version", action="version", version=f"fastprefix {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(name, help=command.about, description=command.about)
        if name == asked:  # the others' options would cost their imports
            sub.add_argument("--traceback", action="store_true", help="show where an error comes from")
            command.add_arguments(sub)
    return parser


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=whole_number(), default=40, metavar="N", help="training steps, default %(default)s"
    )
    parser.add_argument(
        "--output", default="fastprefix-demo", metavar="DIR", help="folder of the results, default %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="few steps and no timing: does it run here?")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
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


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a prefix or soft prompt, ours or PEFT's")
    parser.add_argument(
        "--model", metavar="DIR_OR_NAME", help="the one it was trained on; default what the adapter's files name"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="as it is; default standard input, less its last newline")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message in the chat's template")
    parser.add_argument("--system", metavar="TEXT", help="of --chat: the system's message")
    parser.add_argument(
        "--max-new-tokens", type=whole_number(), default=64, metavar="N", help="at most, default %(default)s"
    )
    parser.add_argument("--without", action="store_true", help="what the model says alone, to compare")
    parser.add_argument("--bf16", action="store_true", help="the model's weights in bf16, as train --bf16")


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="a folder, a name on the hub, or smollm2")
    parser.add_argument("--adapter", metavar="DIR", help="of a saved prefix, ours or PEFT's; default a new one")
    parser.add_argument(
        "--num-virtual-tokens", type=whole_number(), default=16, metavar="P", help="of a new one, default %(default)s"
    )


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from fastprefix.measure import commands

    commands.add_bench_arguments(parser)


def _memory_arguments(parser: argparse.ArgumentParser) -> None:
    from fastprefix.measure import commands

    commands.add_memory_arguments(parser)


def _demo(options: argparse.Namespace) -> int:
    check_output("--output", options.output)

    from fastprefix.demo import run

    return run(options.steps, options.output, options.quick)


def _train(options: argparse.Namespace) -> int:
    from fastprefix.train import train

    return train(options)


def _generate(options: argparse.Namespace) -> int:
    from fastprefix.generate import generate

    return generate(options)


def _bench(options: argparse.Namespace) -> int:
    from fastprefix.measure import commands

    return commands.bench_main(options)


def _memory(options: argparse.Namespace) -> int:
    from fastprefix.measure import commands

    return commands.memory_main(options)


def _explain(options: argparse.Namespace) -> int:
    from fastprefix.models import find_model, load_model

    found = find_model(options.model)
    if options.adapter is not None and not Path(options.adapter).is_dir():
        raise ValueError(f"--adapter: no folder {options.adapter}")

    import fastprefix
    from fastprefix.hf.explain import check_carries

    model = load_model(found, causal=False)
    check_carries(model)
    if options.adapter is None:
        fastprefix.attach(model, fastprefix.PrefixConfig(options.num_virtual_tokens))
    else:
        fastprefix.load(model, options.adapter)
    print(fastprefix.explain(model))
    return 0


class _Command(NamedTuple):
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


_COMMANDS = {
    "demo": _Command("Train a prefix on a real model and compare it with PEFT.", _demo_arguments, _demo),
    "train": _Command("Train a prefix or a soft prompt on pairs, chats or texts.", _train_arguments, _train),
    "generate": _Command("Complete a prompt with an adapter.", _generate_arguments, _generate),
    "bench": _Command("Time the operator and its peers in one process.", _bench_arguments, _bench),
    "memory": _Command("Count the bytes that a training step saves for backward.", _memory_arguments, _memory),
    "explain": _Command("Show what a prefix does in a model's layers, and why.", _explain_arguments, _explain),
}


if __name__ == "__main__":
    sys.exit(main())
