"""Makes a small input of the kind that a model reads (text, image or sound), to run the model once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.model import offload


def dummy_inputs(model: Any, tokens: int = 2) -> dict[str, Tensor]:
    """A tensor of ones for the model's main input: ``[1, tokens]`` ids, an image of the right size, or a short sound.

    Raises:
        ValueError: the model has another main input; its class and that input are named.
    """
    name, shape = model.main_input_name, None
    if name == "input_ids":
        return {name: torch.ones(1, tokens, dtype=torch.long, device=offload.device(model))}
    if name == "pixel_values":
        shape = _image(model.config)
    elif name == "input_values":
        shape = _sound(model.config)
    elif name == "input_features":
        shape = _spectrogram(model)
    if shape is None:
        expected = "a model of input_ids, or of images or sounds whose size its config tells"
        raise fail("model", f"{type(model).__name__}, which reads {name}", expected)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {name: torch.ones(1, *shape, dtype=dtype, device=offload.device(model))}


def _image(config: Any) -> tuple[int, ...] | None:
    """``(channels, height, width)``, or ``(frames, channels, height, width)`` for a model of videos."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, Sequence) or len(size) != 2:
        return None
    frames = getattr(config, "num_frames", None)
    image = (getattr(config, "num_channels", 3), *size)
    return image if frames is None else (frames, *image)


def _sound(config: Any) -> tuple[int, ...] | None:
    """``(samples,)`` that give two frames after a stack of convolutions, or a spectrogram's ``(frames, bins)``."""
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if kernels and strides:
        samples = 2
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return (samples,)
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        return config.max_length, config.num_mel_bins
    return None


def _spectrogram(model: nn.Module) -> tuple[int, ...] | None:
    """``(bins, frames)``, with as many frames as fill an encoder's fixed positions after its convolutions."""
    bins, frames = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if not isinstance(bins, int) or not isinstance(frames, int):
        return None
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            frames *= module.stride[0]
    return bins, frames
