"""Finds, loads and runs the model that ``--model`` names: a folder, a name on the Hugging Face hub, or ``smollm2``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMOLLM2 = "smollm2"
EXPECTED = f"a model's folder, its name on the Hugging Face hub, or {SMOLLM2}"
# Timeout of the one request that decides whether to use the hub; without it the client retries for half a minute.
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Found:
    """Where a model was found."""

    name: str  # as the user gave it
    source: str  # the argument for from_pretrained
    local: bool  # whether it is on this machine, so that no network is needed


def find_model(name: str) -> Found:
    """Find a model without loading it, and without transformers.

    A folder comes first, then the hub. If the hub does not answer, a model in its cache is used as it is.

    Raises:
        ValueError: there is no such model; the message says what was given and what is expected.
        ImportError: ``smollm2`` without its package.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Found(name, name, local=True)
        adapter = ", but an adapter's adapter_config.json" if (path / "adapter_config.json").is_file() else ""
        raise ValueError(f"--model: {name} has no config.json{adapter}; expected {EXPECTED}")
    if name == SMOLLM2:
        from fastprefix.assets.smollm2 import smollm2_dir

        return Found(name, str(smollm2_dir()), local=True)
    if path.is_file():
        raise ValueError(f"--model: {name} is a file, expected {EXPECTED}")
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ValueError(f"--model: no folder {name}")
    return _on_hub(name)


def _on_hub(name: str) -> Found:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    got = f"--model: got {name!r}, which is no folder here"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{got} and no name that the hub could have; expected {EXPECTED}") from None
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        if not cached:
            raise ValueError(f"{got}, and the hub shows no model of this name; expected {EXPECTED}") from None
    except HfHubHTTPError as error:
        if not cached:
            raise ValueError(f"{got}, and the hub says: {_first_line(error)}; expected {EXPECTED}") from None
    except Exception as error:  # no network; the class depends on the HTTP client of the installed huggingface_hub
        if not cached:
            why = f"not in the hub's cache, and the hub does not answer ({_first_line(error)})"
            raise ValueError(f"{got} and {why}; expected {EXPECTED}") from None
    else:
        return Found(name, name, local=False)
    return Found(name, name, local=True)


def load_tokenizer(found: Found) -> Any:
    """The tokenizer of a model; ValueError where there is none."""
    from transformers import AutoTokenizer

    with _loading(found, "its tokenizer"):
        return AutoTokenizer.from_pretrained(found.source, local_files_only=found.local, trust_remote_code=False)


def load_model(found: Found, dtype: torch.dtype = torch.float32, causal: bool = True) -> Any:
    """The model, in eval mode on the CPU.

    Args:
        found: where the model is.
        dtype: dtype of the weights.
        causal: whether to require a causal language model; else the class that the configuration names is loaded.

    Raises:
        ValueError: the model cannot be read, or is not a causal language model and ``causal`` is set.
    """
    import transformers

    options: dict[str, Any] = {"local_files_only": found.local, "trust_remote_code": False}
    with _loading(found, "its configuration"):
        config = transformers.AutoConfig.from_pretrained(found.source, **options)
    architecture = next(iter(config.architectures or ()), "")
    if causal:
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            what = architecture or type(config).__name__
            raise ValueError(f"--model: got {found.name}, of class {what}, expected a causal language model")
        kind = transformers.AutoModelForCausalLM
    else:
        kind = getattr(transformers, architecture, transformers.AutoModel)
    if not hasattr(kind, "_model_mapping"):  # only transformers' Auto classes take such an option
        del options["trust_remote_code"]
    with _loading(found, "its weights"):
        return kind.from_pretrained(found.source, dtype=dtype, **options).eval()


@torch.no_grad()
def complete(model: Any, tokenizer: Any, ids: Tensor, max_new_tokens: int) -> str:
    """The greedy completion of a prompt ``[L]`` by a model in eval mode."""
    ids = ids[None].to(model.device)
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad = tokenizer.pad_token_id
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        max_length=None,  # a model with its own max_length would otherwise warn that both are set
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=None) if pad is None else pad,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@contextmanager
def _loading(found: Found, what: str) -> Iterator[None]:
    """Turn errors into ValueErrors that name the option and the part that was being read."""
    from safetensors import SafetensorError

    from fastprefix.assets.cache import no_progress_bars

    try:
        with no_progress_bars():
            yield
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"--model: {found.name}: {what} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
