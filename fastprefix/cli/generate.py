"""``fastprefix generate``: complete a prompt with an adapter, or with the model alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from fastprefix.cli.options import whole_number
from fastprefix.data.chat import render
from fastprefix.data.pairs import prompt_ids
from fastprefix.models import EXPECTED, Found, complete, find_model, load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix generate``."""
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


def run(options: argparse.Namespace) -> int:
    """Print a completion.

    Returns:
        0, the exit status.

    Raises:
        OSError, ValueError: the adapter, the model or an option is wrong.
    """
    if options.system is not None and not options.chat:
        raise ValueError("--system: expected --chat with it")
    if not Path(options.adapter).is_dir():
        raise ValueError(f"no folder {options.adapter}, expected an adapter's, as fastprefix train or PEFT writes it")
    # The cheapest checks come first: reading an adapter imports transformers.
    given = None if options.model is None else find_model(options.model)
    prompt = _prompt(options.prompt)

    import fastprefix
    from fastprefix.hf.storage.saved_adapter import SavedAdapter

    stored = SavedAdapter(options.adapter)  # raises before the model is loaded if something is malformed
    found = given or _base_model(stored.peft, options.adapter)
    tokenizer = load_tokenizer(found)
    ids = _chat_ids(prompt, options.system, tokenizer) if options.chat else prompt_ids(prompt, tokenizer)
    model = load_model(found, torch.bfloat16 if options.bf16 else torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    fastprefix.load(model, options.adapter)
    if options.without:
        fastprefix.set_prefix(model, None)
    print(complete(model, tokenizer, torch.tensor(ids), options.max_new_tokens))
    return 0


def _base_model(configuration: dict[str, Any], adapter: str) -> Found:
    """The model that an adapter's configuration names."""
    name = configuration.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"--model: got none, and {adapter} does not say what it was trained on; expected {EXPECTED}")
    try:
        return find_model(name)
    except ValueError as error:
        raise ValueError(f"{error} ({name} is what {adapter} says it was trained on)") from None


def _prompt(given: str | None) -> str:
    if given is None:
        if sys.stdin.isatty():
            print("the prompt, then Ctrl-D:", file=sys.stderr)
        # echo in a shell ends with a newline; prompts in training data do not.
        given = sys.stdin.read().removesuffix("\n")
    if not given:
        raise ValueError("--prompt: got no text, expected some, or some on standard input")
    return given


def _chat_ids(prompt: str, system: str | None, tokenizer: Any) -> list[int]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    text = render([*messages, {"role": "user", "content": prompt}], tokenizer, answer=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
