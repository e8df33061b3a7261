"""Encoders of images and sounds."""

from __future__ import annotations

from typing import Any

from tests.model_zoo.row import NO_TOKENS, SIZES, Row, row

_VISION = {**SIZES, "image_size": 32, "patch_size": 8}
_SPEECH = {
    **SIZES,
    "conv_dim": (16,),
    "conv_kernel": (4,),
    "conv_stride": (2,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}


def _image(title: str, family: str, **options: Any) -> Row:
    return row(title, family, "Model", {**_VISION, **options}, notes="images", peft=NO_TOKENS, content="image")


def _sound(title: str, family: str, options: dict[str, Any] = _SPEECH, content: str = "sound") -> Row:
    return row(title, family, "Model", options, notes="sounds", peft=NO_TOKENS, content=content)


ROWS: dict[str, Row] = {
    "vit": _image("ViT", "ViT"),
    "deit": _image("DeiT", "DeiT"),
    "dinov2": _image("DINOv2", "Dinov2"),
    "dinov3_vit": _image("DINOv3 (ViT)", "DINOv3ViT", pos_embed_rescale=None),
    "clip_vision": _image("CLIP (vision)", "CLIPVision"),
    "siglip_vision": _image("SigLIP (vision)", "SiglipVision"),
    "wav2vec2": _sound("Wav2Vec2", "Wav2Vec2"),
    "hubert": _sound("HuBERT", "Hubert"),
    "ast": _sound(
        "AST", "AST", {**SIZES, "patch_size": 8, "num_mel_bins": 16, "max_length": 24}, content="spectrogram"
    ),
}
