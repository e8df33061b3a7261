"""Images and sounds: for classes that read nothing else, and beside a text with their placeholder tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

_FRAMES = 32


def alone(model: Any) -> list[Any]:
    """Cases for a class whose main input is no text."""
    from tests.sweep.models.inputs import Case

    config, main = model.config, model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    torch.manual_seed(3)
    shapes: list[tuple[int, ...]] = []
    if main == "pixel_values":
        for side in _sides(config):
            channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
            frames = getattr(config, "num_frames", None)
            shapes += [(2, frames, channels, *side)] if isinstance(frames, int) else []
            shapes += [(2, channels, *side)]
    elif main == "pixel_values_videos":
        for side in _sides(config):
            shapes += [(2, getattr(config, "frames_per_clip", 2), 3, *side)]
    elif main in ("input_values", "input_features"):
        bins = next((x for x in _fields(config, "num_mel_bins", "feature_size", "input_feat_per_channel")), 16)
        frames = next((x for x in _fields(config, "max_source_positions")), _FRAMES)
        shapes += [(2, bins, 2 * frames), (2, _FRAMES, bins), (2, getattr(config, "max_length", 24), bins)]
        shapes += [(2, 800), (2, 1, 800), (2, 4000)]
    found, offers = [], [{main: torch.randn(*shape)} for shape in shapes]
    if "grid_thw" in parameters:
        offers = _patches(config, next(iter(parameters)))
    for values in offers:
        try:
            with torch.no_grad():
                model(**values, **_target(model))
        except Exception as error:
            last = error
            continue
        found.append(Case("sound" if main in ("input_values", "input_features") else "image", values))
        break
    else:
        raise last if offers else ValueError(f"nothing is known of {main}")
    return found


def _patches(config: Any, main: str) -> list[dict[str, Tensor]]:
    """Two images as rows of patches, with their grids."""
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3
    patch = getattr(config, "patch_size", 8)
    grid = torch.tensor([[1, 4, 4]] * 2)
    sizes = [channels * times * patch * patch for times in (1, 2)] if isinstance(patch, int) else []
    found = [{main: torch.randn(32, size), "grid_thw": grid} for size in sizes]
    return found


def _target(model: Any) -> dict[str, Tensor]:
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        return {"decoder_input_ids": torch.full((2, 3), 5)}
    return {}


def _fields(config: Any, *names: str) -> list[int]:
    holders = [config, *(getattr(config, n, None) for n in ("encoder", "encoder_config", "audio_config"))]
    return [v for h in holders if h is not None for n in names if isinstance(v := getattr(h, n, None), int)]


def _sides(config: Any) -> list[tuple[int, int]]:
    size = getattr(config, "image_size", None)
    if size is None:
        size = getattr(getattr(config, "vision_config", None), "image_size", 32)
    own = [(size, size)] if isinstance(size, int) else [tuple(size)] if size is not None else []
    return [*own, (32, 32), (64, 64), (224, 224)]


def beside(model: Any, text: Tensor) -> list[tuple[str, dict[str, Tensor]]]:
    """A text with one image, or one sound, in every row, where the placeholders can be counted."""
    found = []
    for kind, finder, offers in (("image", "get_image_features", _images), ("sound", "get_audio_features", _sounds)):
        token = _placeholder(model.config, kind)
        if token is None or not callable(getattr(model, finder, None)):
            continue
        parameters = inspect.signature(model.forward).parameters
        for offer in offers(model.config, parameters):
            count = _count(getattr(model, finder), offer)
            if count is None or count % len(text) or not 0 < count // len(text) <= 300:
                continue
            inputs = _with_places(model, text, token, count // len(text), kind, parameters)
            try:
                with torch.no_grad():
                    model(**inputs, **offer)
            except Exception:
                continue
            found.append((kind, {**inputs, **offer}))
            break
    parameters = inspect.signature(model.forward).parameters
    if not found and "pixel_values" in parameters and _placeholder(model.config, "image") is None:
        found = _side_by_side(model, text, _images(model.config, parameters))
    return found


def _side_by_side(model: Any, text: Tensor, offers: list[dict[str, Tensor]]) -> list[tuple[str, dict[str, Tensor]]]:
    """A text and an image that do not share a row of tokens (CLIP)."""
    for offer in offers:
        try:
            with torch.no_grad():
                model(input_ids=text, **offer)
        except Exception:
            continue
        return [("image", {"input_ids": text, **offer})]
    return []


def _placeholder(config: Any, kind: str) -> int | None:
    names = ("image_token_id", "image_token_index") if kind == "image" else ("audio_token_id", "audio_token_index")
    return next((x for n in names if isinstance(x := getattr(config, n, None), int)), None)


def _with_places(model: Any, text: Tensor, token: int, count: int, kind: str, parameters: Any) -> dict[str, Tensor]:
    """Two tokens, the places of an image, and the rest."""
    rows = len(text)
    places = text.new_full((rows, count), token)
    parts = [text[:, :2], places, text[:, 2:]]
    special = {n: getattr(model.config, n, None) for n in ("vision_start_token_id", "vision_end_token_id")}
    if kind == "image" and all(isinstance(x, int) for x in special.values()):
        parts[1] = torch.cat([text.new_full((rows, 1), special["vision_start_token_id"]), places,
                              text.new_full((rows, 1), special["vision_end_token_id"])], 1)  # fmt: skip
    whole = torch.cat(parts, 1)
    found = {"input_ids": whole}
    if "mm_token_type_ids" in parameters:
        found["mm_token_type_ids"] = (whole == token).long()
    if "token_type_ids" in parameters:
        # PaliGemma's say what is to be predicted, those of others where images are.
        predicts = "PaliGemma" in type(model).__name__
        found["token_type_ids"] = torch.zeros_like(whole) if predicts else (whole == token).long()
    return found


def _count(features: Any, offer: dict[str, Tensor]) -> int | None:
    """How many places the features of an offer fill."""
    arguments = inspect.signature(features).parameters
    # Some hand everything on to the model inside.
    everything = offer if {"args", "kwargs"} & set(arguments) else {}
    for given in (everything, {k: v for k, v in offer.items() if k in arguments}):
        try:
            with torch.no_grad():
                result = features(**given)
            break
        except Exception:
            continue
    else:
        return None
    if not isinstance(result, Tensor | list | tuple):
        pooled = getattr(result, "pooler_output", None)
        result = getattr(result, "last_hidden_state", None) if pooled is None else pooled
    if isinstance(result, list | tuple):
        if not all(isinstance(x, Tensor) for x in result):
            return None
        return sum(x.shape[:-1].numel() for x in result)
    return result.shape[:-1].numel() if isinstance(result, Tensor) else None


def _images(config: Any, parameters: Any) -> list[dict[str, Tensor]]:
    """What could be two images, in the forms that image processors give."""
    torch.manual_seed(3)
    vision: Any = getattr(config, "vision_config", None) or config
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    patch = getattr(vision, "patch_size", 8)
    patch = patch if isinstance(patch, int) else patch[0]
    found: list[dict[str, Tensor]] = []
    for grid in ("image_grid_thw", "image_grid_hws"):
        if grid in parameters:
            frames = getattr(vision, "temporal_patch_size", 1) or 1
            for times in sorted({frames, 1, 2}):
                flat = torch.randn(2 * 16, channels * times * patch * patch)
                thw = [[1, 4, 4]] if grid == "image_grid_thw" else [[4, 4]]
                found.append({"pixel_values": flat, grid: torch.tensor(thw * 2)})
                shaped = flat.view(32, channels, times * patch, patch) if times == 1 else None
                if shaped is not None:
                    found.append({"pixel_values": shaped, grid: torch.tensor(thw * 2)})
    if "image_merge_sizes" in parameters:
        found = [{**offer, "image_merge_sizes": torch.tensor([2, 2])} for offer in found]
    if "spatial_shapes" in parameters:
        flat = torch.randn(2, 16, channels * patch * patch)
        shapes, mask = torch.tensor([[4, 4]] * 2), torch.ones(2, 16, dtype=torch.long)
        found.append({"pixel_values": flat, "spatial_shapes": shapes, "pixel_attention_mask": mask})
    if "image_position_ids" in parameters:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
        found.append({"pixel_values": torch.randn(2, 16, channels * patch * patch), "image_position_ids": places})
    for height, width in _sides(vision):
        image = torch.randn(2, channels, height, width)
        sizes = torch.tensor([[height, width]] * 2)
        if "image_sizes" in parameters:
            found.append({"pixel_values": image, "image_sizes": sizes})
            for tiles in (3, 5, 2):
                tiled = torch.randn(2, tiles, channels, height, width)
                found.append({"pixel_values": tiled, "image_sizes": sizes})
        found += [{"pixel_values": image}, {"pixel_values": image[:, None]}]
        if "pixel_attention_mask" in parameters:
            seen = torch.ones(2, 1, height, width, dtype=torch.bool)
            found.append({"pixel_values": image[:, None], "pixel_attention_mask": seen})
        if height >= 64:
            break
    return found


def _sounds(config: Any, parameters: Any) -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    audio: Any = getattr(config, "audio_config", None) or config
    bins = next((x for x in _fields(audio, "num_mel_bins", "feature_size", "input_feat_size", "input_dim")), 16)
    found: list[dict[str, Tensor]] = []
    for frames in (2 * getattr(audio, "max_source_positions", 16), _FRAMES, 64, 128, 200):
        for shape in ((2, bins, frames), (2, frames, bins)):
            for name in ("input_features", "audio_features"):
                if name not in parameters:
                    continue
                base = {name: torch.randn(*shape)}
                mask = torch.ones(2, frames, dtype=torch.long)
                masks = [m for m in ("feature_attention_mask", "input_features_mask") if m in parameters]
                found += [{**base, m: x} for m in masks for x in (mask, mask.bool())] + [base]
    if "input_values" in parameters:
        found += [{"input_values": torch.randn(2, 800)}, {"input_values": torch.randn(2, 1, 800)}]
    return found
