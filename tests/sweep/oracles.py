"""The truths: transformers alone on a longer text, on embeddings put in front, or with keys concatenated by hand."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.sweep.models.inputs import Case, ids, takes
from tests.sweep.outcome import tensors

P = 4
# Fields that configs of layers with a state have; text in front would be in that state, a prefix is not.
_STATES = re.compile(r"^(mamba|ssm|lru_|linear_num|linear_conv|conv_L_cache|time_mix|short_conv|attn_layer_period)")
_BY_TOKEN = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids", "inputs_embeds")


def has_states(model: Any) -> bool:
    """Whether some layers keep a state."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return (
        any(_STATES.match(name) for name in vars(config))
        or any("attention" not in str(k) for k in kinds)
        or any("linear" in str(k) for k in kinds)
    )


def has_narrow_window(model: Any) -> bool:
    """Whether a window hides text in front, which a prefix is not hidden by."""
    fields = vars(model.config.get_text_config())
    sizes = [fields.get(name) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return any(isinstance(size, int) and 0 < size < 16 for size in sizes)


def depends_on_length(model: Any) -> bool:
    """Whether rotary frequencies do: then the keys of a text alone are not those that it has in front of another."""
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    named = [kind for each in kinds for kind in (each.values() if isinstance(each, dict) else [each])]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in named)


def is_causal(model: Any, case: Case) -> bool:
    """Whether another last token leaves every result before it alone."""
    text = case.inputs["input_ids"]
    inputs = {k: v for k, v in case.inputs.items() if k != "labels"}
    found = []
    for token in ids(model.config, 1, 2, seed=7)[0]:
        inputs["input_ids"] = torch.cat([text[:, :-1], token.expand(len(text), 1)], 1)
        with torch.no_grad():
            output = tensors(model(**inputs))
        found.append([x[:, :-1].clamp(-1e30, 1e30) for x in output.values() if x.shape[:2] == text.shape])
    if not found[0]:
        return False
    return all(((x - y).abs() <= 1e-8 * x.abs().clamp(min=1)).all() for x, y in zip(*found))


def in_front(inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """The same inputs behind ``tokens`` ``[P]``: what counts by token is longer, labels there are ignored."""
    found = dict(inputs)
    count = len(tokens)
    for name in _BY_TOKEN:
        x = inputs.get(name)
        if not isinstance(x, Tensor) or x.dim() != 2:
            continue
        if name == "input_ids":
            front = tokens.expand(len(x), -1)
        else:
            front = x.new_full((len(x), count), {"attention_mask": 1, "labels": -100}.get(name, 0))
        found[name] = torch.cat([front, x], 1)
    return found


def behind(output: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Results of ``length`` tokens, and of one that some models add at the end, behind the first P of a longer text."""
    places = (length + P, length + P + 1)
    return {k: x[:, P:] if x.dim() >= 2 and x.shape[1] in places else x for k, x in output.items()}


def embedded(model: Any, inputs: dict[str, Any], prompt: Tensor) -> Any:
    """The bare model with a soft prompt ``[P, d]`` in front: on embeddings, or in the place of P tokens' embeddings.

    Embeddings alone do not tell where images go and what their positions are; there the ids stay, of ordinary
    tokens in the prompt's place.
    """
    placeholder = ids(model.config, 1, P, seed=5)[0]
    whole = in_front(inputs, placeholder)
    table = model.get_input_embeddings()
    mask = inputs.get("attention_mask")
    # A classifier of sequences may look for its last token among the ids.
    forwards = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    looks = mask is not None and not mask.all()
    looks = looks and any("pad_token_id" in inspect.getsource(forward) for forward in forwards)
    plain = set(inputs) <= {"input_ids", "attention_mask", "labels"} and takes(model, "inputs_embeds")
    if plain and not looks:
        given = {k: v for k, v in whole.items() if k != "input_ids"}
        own = table(inputs["input_ids"])
        row = prompt.to(own.dtype).expand(len(own), -1, -1)
        return model(inputs_embeds=torch.cat([row, own], 1), **given)
    seen: list[int] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(1)
        return torch.cat([prompt.to(output.dtype).expand(len(output), -1, -1), output[:, P:]], 1)

    handle = table.register_forward_hook(replace)
    try:
        result = model(**whole)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"its input embeddings ran {len(seen)} times")
    return result


@contextmanager
def moved(model: Any, by: int) -> Iterator[Any]:
    """A copy of an encoder-decoder whose decoder's table of positions is moved by hand; None where it has none."""
    from tests.model_zoo.encoder_decoders import move_positions

    twin = copy.deepcopy(model)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    move_positions(twin, by)
    table = getattr(twin.get_decoder(), "embed_positions", None)
    changed = table is not None or any(not torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    yield twin if changed else None
