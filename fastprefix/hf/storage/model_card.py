"""The model card, ``README.md``, that ``save`` writes next to an adapter's files.

Its last line holds a digest of the text above. A card that somebody has written or edited, PEFT included, does not have
its own digest, and is left as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from fastprefix.hf.storage.atomic_folder import resolve_path
from fastprefix.hf.storage.peft_format import ENCODER, OWN, WEIGHTS
from fastprefix.hf.storage.saved_modules import BASE
from fastprefix.prefixes.llama_adapter import LlamaAdapterConfig
from fastprefix.prefixes.memory import PrefixMemoryConfig
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt

CARD = "README.md"
_TAGS = {
    "PROMPT_TUNING": "prompt-tuning",
    "ADAPTION_PROMPT": "llama-adapter",
    "P_TUNING": "p-tuning",
    "CARTRIDGE": "cartridge",
}
_MARK = "<!-- Written by fastprefix.save, which replaces this card unless it was edited: {} -->\n"
_BASE = "BASE_MODEL"  # in the examples, where the model's name is not known
_HERE = "path/to/this/folder"


def may_write(folder: Path) -> bool:
    """Whether a save may write its card: there is none yet, or the one that is there is an unedited one of ours."""
    path = resolve_path(folder, CARD)
    if not os.path.lexists(path):
        return True
    try:
        return is_ours(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a folder, a dangling link, or no text: somebody else's
        return False


def is_ours(text: str) -> bool:
    """Whether a card is as :func:`card` made it."""
    *above, last = text.splitlines(keepends=True) or [""]
    return last == _mark("".join(above))


def _mark(text: str) -> str:
    return _MARK.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def write(text: str, path: str) -> None:
    """Write a card."""
    Path(path).write_text(text, encoding="utf-8", newline="\n")


def card(model: Any, prefix: Prefix | SoftPrompt, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The card of an adapter, the same text for the same adapter.

    Args:
        model: the transformers model that the adapter is of.
        prefix: the adapter.
        config: the content of ``adapter_config.json``.
        tensors: the content of ``adapter_model.safetensors``.
    """
    kind, base, peft = config["peft_type"], _base_model(model), config["peft_type"] != OWN
    if isinstance(prefix, SoftPrompt):  # also one that PEFT has no kind for
        kind = "PROMPT_TUNING" if prefix.encoder is None else "P_TUNING"
    tags = ["fastprefix", _TAGS.get(kind, "prefix-tuning")]
    data = ModelCardData(base_model=base, library_name="peft" if peft else "fastprefix", tags=tags)
    title = "Soft prompt" if isinstance(prefix, SoftPrompt) else "Prefix"
    if isinstance(prefix.config, LlamaAdapterConfig):
        title = "LLaMA-Adapter"
    of = f"`{base}`" if base is not None else f"a {_class(model) or type(model).__name__}"
    parts = [
        f"---\n{data.to_yaml().strip()}\n---\n",
        f"# {title} for {of}\n",
        "\n".join(_facts(prefix, tensors)) + "\n",
        "## Use\n",
        _example(model, base, "import fastprefix", "fastprefix.load(model, {})  # or the repository's name"),
    ]
    if peft:
        load = "model = PeftModel.from_pretrained(model, {})"
        parts += ["PEFT reads the same files:\n", _example(model, base, "from peft import PeftModel", load)]
    else:
        parts.append("PEFT has no format for this prefix and refuses it.\n")
    text = "\n".join(parts) + "\n"
    return text + _mark(text)


def _facts(prefix: Prefix | SoftPrompt, tensors: Mapping[str, Tensor]) -> list[str]:
    own = sum(x.numel() for name, x in tensors.items() if not name.startswith(BASE))
    beside = sum(x.numel() for name, x in tensors.items() if name.startswith(BASE))
    if isinstance(prefix, SoftPrompt):
        kind = "prompt tuning" if prefix.encoder is None else "P-tuning"
        places = {"before": "in front of the text", "after": "after the given text"}
        place = places.get(str(prefix.config.place), f"in place of the token {prefix.config.place} in the text")
        what = f"trained embeddings {place} ({kind})"
    elif isinstance(prefix.config, LlamaAdapterConfig):
        what = f"trained prompts behind gates in {len(prefix.layer_indices)} attention layers (LLaMA-Adapter)"
    elif isinstance(prefix.config, PrefixMemoryConfig):
        what = f"trained matrices of the heads of {len(prefix.layer_indices)} attention layers (Prefix-Tuning+)"
    else:
        layers = len(prefix.layer_indices)
        what = f"trained keys and values in {layers} attention layer{'s' * (layers > 1)} (prefix tuning)"
        what += ", added through trained gates" if prefix.config.gate is not None else ""
    found = [f"- Kind: {what}", f"- Virtual tokens: {prefix.num_virtual_tokens}", f"- Parameters: {own:,}"]
    if prefix.encoder is not None:
        network = "LSTM" if isinstance(prefix, SoftPrompt) and prefix.encoder.kind == "lstm" else "MLP"
        found.append(f"- Trained through an {network}: `{ENCODER}` holds it, `{WEIGHTS}` what it computes")
    if beside:
        names = sorted({name.removeprefix(BASE).rpartition(".")[0] for name in tensors if name.startswith(BASE)})
        found.append(f"- Saved with it: {', '.join(f'`{name}`' for name in names)}, {beside:,} numbers")
    return found


def _example(model: Any, base: str | None, first: str, load: str) -> str:
    name = _class(model) or "AutoModel"
    lines = [
        first,
        f"from transformers import {name}",
        "",
        f'model = {name}.from_pretrained("{base or _BASE}")',
        load.format(f'"{_HERE}"'),
    ]
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _class(model: Any) -> str | None:
    """The name of a model's class in transformers, without what wrappers such as FSDP2 derive; None for other code."""
    found = (c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.models."))
    return next(found, None)


def _base_model(model: Any) -> str | None:
    """The model's name on the Hub; None for a folder of this machine, whose path means nothing elsewhere."""
    name = getattr(model.config, "_name_or_path", None)
    if not isinstance(name, str) or not name or os.path.lexists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
