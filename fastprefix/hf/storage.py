"""``save`` and ``load``: PEFT's files, and beside them what PEFT has no field for.

    adapter_config.json          PEFT's PrefixTuningConfig (CartridgeConfig with frozen tokens)
    adapter_model.safetensors    prompt_embeddings [P, 2*L*H_kv*D], slots 2i and 2i+1 layer i's keys and values
    fastprefix_config.json       our own configuration
    prefix_encoder.safetensors   the MLP, when one is trained: training resumes from it

What PEFT cannot represent (a subset of layers, position_offset="none", layers of different shapes) is written with
``peft_type`` FASTPREFIX and one tensor per layer, so that PEFT refuses it instead of computing something else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastprefix.hf.files import field, read_json, read_tensors, replace
from fastprefix.hf.install import attach, installation
from fastprefix.prefixes import init
from fastprefix.prefixes.config import LayerShape, PrefixConfig
from fastprefix.prefixes.prefix import Prefix
from fastprefix.validation import fail

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, ENCODER = "fastprefix_config.json", "prefix_encoder.safetensors"
FORMAT_VERSION = 1
EMBEDDINGS = "prompt_embeddings"

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def pack(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """PEFT's ``prompt_embeddings``: ``[P, 2*L*H_kv*D]`` from L keys and values ``[H_kv, P, D]``."""
    slots = [x for pair in zip(keys, values, strict=True) for x in pair]
    return torch.stack(slots).permute(2, 0, 1, 3).flatten(1).contiguous()


def unpack(embeddings: Tensor, shapes: Sequence[LayerShape]) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse of :func:`pack`."""
    heads, dim, _ = shapes[0]
    slots = embeddings.unflatten(1, (2 * len(shapes), heads, dim)).permute(1, 2, 0, 3)  # [2L, H_kv, P, D]
    return [x.contiguous() for x in slots[0::2]], [x.contiguous() for x in slots[1::2]]


def _is_peft(prefix: Prefix, num_layers: int) -> bool:
    """Whether PEFT can represent, and would compute, what this prefix is."""
    shapes = set(prefix.shapes)
    uniform = len(shapes) == 1 and prefix.shapes[0].head_dim == prefix.shapes[0].value_dim
    return uniform and len(prefix.shapes) == num_layers and prefix.config.position_offset == "after_prefix"


def save(model: Any, dir: str | os.PathLike[str], name: str = "default") -> None:
    """Write an attached prefix so that PEFT and :func:`load` both read it.

    Args:
        model: a model with the prefix attached.
        dir: made if missing; each file is replaced whole or not at all.
        name: of the prefix.

    Raises:
        ValueError: no prefix of this name is attached.
    """
    state = installation(model)
    prefix = state.named(name)
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        pairs = [(k.detach().cpu().contiguous(), v.detach().cpu().contiguous()) for k, v in prefix.key_values()]
    keys, values = [k for k, _ in pairs], [v for _, v in pairs]
    own = {"format_version": FORMAT_VERSION, **prefix.config.to_json(), "projected": prefix.encoder is not None}
    if _is_peft(prefix, len(state.layers.modules)):
        tensors = {EMBEDDINGS: pack(keys, values)}
        config = _peft_config(state.model, prefix)
    else:
        tensors = {
            f"layers.{i}.{n}": x
            for i, kv in zip(prefix.layer_indices, pairs, strict=True)
            for n, x in zip("kv", kv, strict=True)
        }
        config = {"peft_type": "FASTPREFIX", "num_virtual_tokens": prefix.num_virtual_tokens}
    encoder = prefix.encoder
    if encoder is not None:
        state_dict = {n: x.detach().cpu().contiguous() for n, x in encoder.state_dict().items()}
        replace(folder / ENCODER, lambda path: save_file(state_dict, path))
    else:
        (folder / ENCODER).unlink(missing_ok=True)
    replace(folder / WEIGHTS, lambda path: save_file(tensors, path))
    replace(folder / OWN_CONFIG, lambda path: Path(path).write_text(json.dumps(own, indent=2) + "\n"))
    replace(folder / CONFIG, lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"))


def _peft_config(model: Any, prefix: Prefix) -> dict[str, Any]:
    heads, dim, _ = prefix.shapes[0]
    name = type(model).__name__
    task = next((t for suffix, t in _TASKS.items() if name.endswith(suffix)), "FEATURE_EXTRACTION")
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": task,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", "") or None,
        "inference_mode": True,
        "num_virtual_tokens": prefix.num_virtual_tokens,
        "token_dim": heads * dim,
        "num_attention_heads": heads,
        "num_layers": len(prefix.shapes),
        "num_transformer_submodules": 1,
    }
    if prefix.config.num_frozen_tokens:
        return {**config, "peft_type": "CARTRIDGE", "num_frozen_tokens": prefix.config.num_frozen_tokens}
    return {**config, "prefix_projection": False, "encoder_hidden_size": None}


def load(model: Any, dir: str | os.PathLike[str], name: str = "default") -> Prefix:
    """Attach a saved prefix: ours, or PEFT's of type PREFIX_TUNING or CARTRIDGE.

    What was trained through its MLP comes back with it, so that training resumes; :func:`fastprefix.bake` drops it.

    Args:
        model: a transformers model, with other prefixes attached or none.
        dir: as written by :func:`save` or by PEFT's ``save_pretrained``.
        name: to attach it under.

    Returns:
        The trainable :class:`Prefix`.

    Raises:
        ValueError: a file is missing or malformed, or does not fit the model; path and field are named.
    """
    folder = Path(dir)
    peft = read_json(folder / CONFIG)
    own = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).exists() else None
    kind = field(peft, "peft_type", str, folder / CONFIG)
    if own is not None:
        if own.get("format_version") != FORMAT_VERSION:
            raise fail(f"{folder / OWN_CONFIG}: format_version", own.get("format_version"), str(FORMAT_VERSION))
        config = _own_config(own, folder / OWN_CONFIG)
    elif kind in ("PREFIX_TUNING", "CARTRIDGE"):
        if peft.get("num_transformer_submodules", 1) not in (1, None):
            raise fail(f"{folder / CONFIG}: num_transformer_submodules", peft["num_transformer_submodules"], "1")
        frozen = peft.get("num_frozen_tokens", 0) if kind == "CARTRIDGE" else 0
        config = PrefixConfig(field(peft, "num_virtual_tokens", int, folder / CONFIG), num_frozen_tokens=frozen)
    else:
        raise fail(f"{folder / CONFIG}: peft_type", repr(kind), "PREFIX_TUNING, CARTRIDGE or FASTPREFIX")
    tensors = read_tensors(folder / WEIGHTS)
    encoder = read_tensors(folder / ENCODER) if own is not None and own.get("projected") else None

    def weights(prefix: Prefix) -> None:
        keys, values = stored_key_values(tensors, prefix, folder / WEIGHTS)
        if encoder is None:
            prefix.set_direct(
                *([x.float().to(d) for x, d in zip(part, prefix.devices(), strict=True)] for part in (keys, values))
            )
        elif prefix.encoder is not None:
            load_encoder(prefix, encoder, folder / ENCODER)

    return attach(model, config, name, weights=weights)


def _own_config(own: dict[str, Any], path: Path) -> PrefixConfig:
    fields: dict[str, Any] = {
        n: own[n] for n in ("num_virtual_tokens", "layers", "position_offset", "num_frozen_tokens") if n in own
    }
    if own.get("projected"):
        fields.update(prefix_projection=True, encoder_hidden_size=own.get("encoder_hidden_size"))
    try:
        return PrefixConfig(**fields, init=init.normal())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def stored_key_values(tensors: dict[str, Tensor], prefix: Prefix, path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of a prefix's layers from adapter weights, in PEFT's form or one tensor a layer."""
    if EMBEDDINGS in tensors:
        embeddings, shapes = tensors[EMBEDDINGS], prefix.shapes
        want = [prefix.num_virtual_tokens, sum(s.numel for s in shapes)]
        if list(embeddings.shape) != want:
            raise fail(
                f"{path}: {EMBEDDINGS}", f"shape {list(embeddings.shape)}", f"[P, 2*L*H_kv*D] = {want} of this model"
            )
        if len(set(shapes)) != 1 or shapes[0].head_dim != shapes[0].value_dim:
            raise fail(
                f"{path}: {EMBEDDINGS}", "one tensor", "one tensor per layer: this model's layers differ in shape"
            )
        return unpack(embeddings, shapes)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, shape in zip(prefix.layer_indices, prefix.shapes, strict=True):
        for out, n, dim in zip(found, "kv", (shape.head_dim, shape.value_dim), strict=True):
            key, want = f"layers.{i}.{n}", [shape.num_kv_heads, prefix.num_virtual_tokens, dim]
            if key not in tensors:
                raise fail(f"{path}: {key}", "no such tensor", f"{EMBEDDINGS}, or keys and values of every layer")
            if list(tensors[key].shape) != want:
                raise fail(
                    f"{path}: {key}", f"shape {list(tensors[key].shape)}", f"[H_kv, P, D] = {want} of this model"
                )
            out.append(tensors[key])
    return found


def load_encoder(prefix: Prefix, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy an MLP's weights into the prefix's; ValueError naming the tensor that does not fit."""
    assert prefix.encoder is not None
    for key, x in prefix.encoder.state_dict().items():
        if key not in tensors or tensors[key].shape != x.shape:
            got = f"shape {list(tensors[key].shape)}" if key in tensors else "no such tensor"
            raise fail(f"{path}: {key}", got, f"shape {list(x.shape)}")
    prefix.encoder.load_state_dict(tensors)
