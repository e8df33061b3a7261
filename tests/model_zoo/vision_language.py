"""Tiny random models that read images beside text, whose outer modules merge the two, make masks or count positions."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.model_zoo.row import GQA

IMAGE, VIDEO, VISION_START = 98, 97, 96  # token ids
_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_PATCHES = {**{key: GQA[key] for key in _WIDTHS}, "image_size": 8, "patch_size": 4}


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_PATCHES),
        text_config=transformers.LlamaConfig(**GQA),
        image_token_id=IMAGE,
    )


def _gemma3() -> Any:
    layer_types = ["sliding_attention", "full_attention"]
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=64, layer_types=layer_types),
        vision_config=transformers.SiglipVisionConfig(**_PATCHES),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=VISION_START,
        eoi_token_id=VIDEO,
    )


def _paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**GQA, head_dim=8),
        vision_config=transformers.SiglipVisionConfig(**_PATCHES),
        image_token_id=IMAGE,
        projection_dim=32,
    )


def _qwen2_5_vl() -> Any:
    vision = {key: GQA[key] for key in ("hidden_size", "intermediate_size")}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return transformers.Qwen2_5_VLConfig(
        text_config={**GQA, "rope_parameters": rope},
        vision_config={
            **vision, "depth": 2, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
    )  # fmt: skip


CONFIGS = {
    "LlavaForConditionalGeneration": _llava,
    "Gemma3ForConditionalGeneration": _gemma3,
    "PaliGemmaForConditionalGeneration": _paligemma,
    "Qwen2_5_VLForConditionalGeneration": _qwen2_5_vl,
}


def build(cls: str) -> Any:
    """A random model in eval mode and fp64, its weights large enough that attention matters."""
    torch.manual_seed(0)
    model = getattr(transformers, cls)(CONFIGS[cls]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.double().eval()


def with_image(cls: str, ids: Tensor) -> dict[str, Any]:
    """One image in front of a row's text ``[1, S]``."""
    torch.manual_seed(1)
    if cls.startswith("Qwen2_5"):  # a grid of 2 x 2 merged patches
        pixels = torch.randn(16, 3 * 2 * 4 * 4, dtype=torch.float64)
        row = torch.cat([torch.tensor([[VISION_START, *[IMAGE] * 4]]), ids], 1)
        types = (row == IMAGE).int()
        grid = torch.tensor([[1, 4, 4]])
        return {"input_ids": row, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}
    row = torch.cat([torch.full((1, 4), IMAGE), ids], 1)
    return {"input_ids": row, "pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64)}
