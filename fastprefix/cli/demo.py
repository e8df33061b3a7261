"""``fastprefix demo``: train a prefix on a real model and compare it with PEFT's."""

from __future__ import annotations

import argparse

from fastprefix.cli.options import check_output, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix demo``."""
    parser.add_argument(
        "--steps", type=whole_number(), default=40, metavar="N", help="training steps, default %(default)s"
    )
    parser.add_argument(
        "--output", default="fastprefix-demo", metavar="DIR", help="folder of the results, default %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="few steps and no timing: does it run here?")


def run(options: argparse.Namespace) -> int:
    """Run the demo and return its exit status."""
    check_output("--output", options.output)

    from fastprefix.demo import run as run_demo

    return run_demo(options.steps, options.output, options.quick)
