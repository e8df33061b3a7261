"""Soft prompts become keys and values: the model runs once on the embeddings, in a process of its own.

A server has the model in vLLM's form only, and its front end none at all. This process loads the model from
transformers, on the processor, and its memory is free again afterwards.

    python -m fastprefix.serving.vllm.soft_prompt MODEL DTYPE IN.safetensors OUT.safetensors
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.storage.validated_files import read_tensors, write_tensors
from fastprefix.serving.vllm.geometry import Geometry

SECONDS = 1800.0
_FAILED = 3  # exit status of an error that the user can correct


def run_in_child(geometry: Geometry, embeddings: Tensor) -> dict[str, Tensor]:
    """Keys ``k.<layer>`` and values ``v.<layer>`` ``[H_kv, P, D]`` of a soft prompt ``[P, d]`` of a model.

    Raises:
        ValueError: the model could not be loaded or run, or has other layers than vLLM says.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "in.safetensors", Path(scratch) / "out.safetensors"
        write_tensors({"embeddings": embeddings.contiguous()}, str(given))
        dtype = str(geometry.dtype).removeprefix("torch.")
        command = [sys.executable, "-m", __name__, geometry.model, dtype, str(given), str(made)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise fail("prompt", f"no keys and values within {SECONDS:.0f} s", "a model that runs sooner") from None
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise fail("prompt", f"a soft prompt, and the model does not run on it ({last[0]})", "one that does")
        tensors = read_tensors(made)
    shape = [geometry.num_kv_heads, len(embeddings), geometry.head_dim]
    wanted = {f"{n}.{i}": shape for n in "kv" for i in range(geometry.layers)}
    if {name: list(x.shape) for name, x in tensors.items()} != wanted:
        raise fail("prompt", "keys and values of other sizes from transformers", f"{shape} in {geometry.layers} layers")
    return tensors


@torch.no_grad()
def key_values(model: str, dtype: torch.dtype, embeddings: Tensor) -> dict[str, Tensor]:
    """The model's own keys and values of embeddings ``[P, d]`` at positions 0..P-1."""
    from transformers import AutoModelForCausalLM, DynamicCache

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    cache = DynamicCache()
    loaded(inputs_embeds=embeddings[None].to(dtype), past_key_values=cache, use_cache=True)
    layers = enumerate(cache.layers)
    return {f"{n}.{i}": x[0].contiguous() for i, y in layers for n, x in (("k", y.keys), ("v", y.values))}


def main(model: str, dtype: str, given: str, made: str) -> int:
    """Read embeddings, run the model, write keys and values; an error is one line on stderr."""
    try:
        found = key_values(model, getattr(torch, dtype), read_tensors(Path(given))["embeddings"])
        write_tensors(found, made)
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return _FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
