"""``fastprefix generate``: what a model says with an adapter, or without it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.data.chat import render
from fastprefix.data.pairs import prompt_ids
from fastprefix.models import EXPECTED, Found, find_model, load_model, load_tokenizer


def generate(options: argparse.Namespace) -> int:
    """Print a completion; options as ``fastprefix generate --help``.

    Returns:
        0, the exit status.

    Raises:
        OSError, ValueError: the adapter, the model or an option is wrong.
    """
    if options.system is not None and not options.chat:
        raise ValueError("--system: expected --chat with it")
    if not Path(options.adapter).is_dir():
        raise ValueError(f"no folder {options.adapter}, expected an adapter's, as fastprefix train or PEFT writes it")
    # Of what is wrong, the cheapest to find comes first: reading an adapter imports transformers.
    given = None if options.model is None else find_model(options.model)
    prompt = _prompt(options.prompt)

    import fastprefix
    from fastprefix.hf.storage.saved_adapter import SavedAdapter

    stored = SavedAdapter(options.adapter)  # told before the model is loaded, where something is malformed
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


@torch.no_grad()
def complete(model: Any, tokenizer: Any, ids: Tensor, max_new_tokens: int) -> str:
    """What a model in eval mode says after a prompt ``[L]``, the likeliest token each time."""
    ids = ids[None].to(model.device)
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad = tokenizer.pad_token_id
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        max_length=None,  # a model that brings its own would be told in a warning that both are set
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=None) if pad is None else pad,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


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
        # A shell's echo ends its line; no prompt that was trained on does.
        given = sys.stdin.read().removesuffix("\n")
    if not given:
        raise ValueError("--prompt: got no text, expected some, or some on standard input")
    return given


def _chat_ids(prompt: str, system: str | None, tokenizer: Any) -> list[int]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    text = render([*messages, {"role": "user", "content": prompt}], tokenizer, answer=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
