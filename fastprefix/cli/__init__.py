"""The command line: ``fastprefix demo``, ``train`` and the other commands of the table below.

Each command is a module of this folder with two functions: ``add_arguments(parser)`` declares its options, and
``run(options)`` runs it and returns the exit status.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from fastprefix.cli.quiet_imports import quiet_imports

USER_ERROR, INTERRUPTED, READER_GONE = 2, 130, 141

# What ``fastprefix --help`` says of each command.
COMMANDS = {
    "demo": "Train a prefix on a real model and compare it with PEFT.",
    "train": "Train a prefix or a soft prompt on pairs, chats or texts.",
    "cartridge": "Train a prefix that stands for a document, and measure how well it does.",
    "generate": "Complete a prompt with an adapter.",
    "inspect": "Write a page about an adapter: attention on it, its slots, what it changes and what it costs.",
    "serve": "Serve a model and a folder of adapters with vLLM.",
    "bench": "Time the operator and its peers in one process.",
    "memory": "Count the bytes that a training step saves for backward.",
    "explain": "Show what a prefix does in a model's layers, and why.",
    "verify": "Check every backend on this device and time those that are right.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        its exit status: 0; 2 for an error that the user can correct, told in one line on stderr; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    options = _parser(words).parse_args(words)
    try:
        with quiet_imports():
            return int(_import_command(options.command).run(options))
    except BrokenPipeError:
        # The reader closed the pipe, as head does; the buffered rest must not raise again at exit.
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


class Command(Protocol):
    """The two functions that the module of a command has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's options to its parser."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the command and return its exit status."""


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    from fastprefix import __version__

    parser = argparse.ArgumentParser(prog="fastprefix", description="Prefix tuning at the cost of the frozen model.")
    parser.add_argument("--version", action="version", version=f"fastprefix {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, about in COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about)
        if name == asked:  # options of the other commands would cost their imports
            sub.add_argument("--traceback", action="store_true", help="show where an error comes from")
            _import_command(name).add_arguments(sub)
    return parser


def _import_command(name: str) -> Command:
    """Import the module of one command: the others' imports would slow down every call."""
    command: Command
    match name:
        case "demo":
            from fastprefix.cli import demo as command
        case "train":
            from fastprefix.cli import train as command
        case "cartridge":
            from fastprefix.cli import cartridge as command
        case "generate":
            from fastprefix.cli import generate as command
        case "inspect":
            from fastprefix.cli import inspect as command
        case "serve":
            from fastprefix.cli import serve as command
        case "bench":
            from fastprefix.cli import bench as command
        case "memory":
            from fastprefix.cli import memory as command
        case "explain":
            from fastprefix.cli import explain as command
        case _:
            from fastprefix.cli import verify as command
    return command
