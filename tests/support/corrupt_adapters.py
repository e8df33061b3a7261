"""Adapters that are not right: what is spoilt in which kind, and how the error names it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.saved_adapters import CONFIG, ENCODER, OWN, WEIGHTS, edit_json, edit_tensors

HUGE = 10**12
Change = Callable[[Path], Any]


def own(**fields: Any) -> Change:
    return lambda folder: edit_json(folder / OWN, **fields)


def peft(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / OWN).unlink()
        edit_json(folder / CONFIG, **fields)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], name: str = WEIGHTS) -> Change:
    return lambda folder: edit_tensors(folder / name, change)


def tensor(key: str, make: Callable[[torch.Tensor], torch.Tensor], name: str = WEIGHTS) -> Change:
    return tensors(lambda t: t.update({key: make(t[key])}), name)


def with_nan(x: torch.Tensor) -> torch.Tensor:
    return x.index_fill(0, torch.tensor([1]), float("nan"))


def instead(name: str, put: Callable[[Path], Any]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return change


def truncated(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


EMBEDDINGS = "prompt_embeddings"
WRONG: dict[str, tuple[str, Change, str]] = {
    # our configuration
    "version unknown": ("direct", own(format_version=2), f"{OWN}: format_version: got 2, expected 1"),
    "version of another type": ("direct", own(format_version="1"), f"{OWN}: format_version: got '1', expected int"),
    "version true": ("direct", own(format_version=True), f"{OWN}: format_version: got True, expected int"),
    "field unknown": ("direct", own(colour=1), f"{OWN}: 'colour': got a field of no known meaning"),
    "tokens true": ("direct", own(num_virtual_tokens=True), f"{OWN}: num_virtual_tokens: got True, expected int"),
    "tokens negative": ("direct", own(num_virtual_tokens=-1), f"{OWN}: num_virtual_tokens: got -1, expected an int of"),
    "tokens 0": ("prompt", own(num_virtual_tokens=0), f"{OWN}: num_virtual_tokens: got 0, expected an int of"),
    "tokens infinite": ("direct", own(num_virtual_tokens="json:1e400"), f"{OWN}: num_virtual_tokens: got inf"),
    "tokens nan": ("direct", own(num_virtual_tokens="json:NaN"), f"{OWN}: num_virtual_tokens: got nan"),
    "tokens text": ("direct", own(num_virtual_tokens="3"), f"{OWN}: num_virtual_tokens: got '3', expected int"),
    "tokens null": ("direct", own(num_virtual_tokens=None), f"{OWN}: num_virtual_tokens: got None, expected int"),
    "tokens huge": (
        "direct",
        own(num_virtual_tokens=HUGE),
        rf"{WEIGHTS}: {EMBEDDINGS}: got shape \[3, 64\], expected .*\[{HUGE}, 64\]",
    ),
    "tokens huge, of nothing": (
        "direct",
        lambda f: (own(num_virtual_tokens=HUGE)(f), save_file({EMBEDDINGS: torch.empty(HUGE, 0)}, f / WEIGHTS)),
        rf"{WEIGHTS}: {EMBEDDINGS}: got shape \[{HUGE}, 0\], expected .* = \[{HUGE}, 64\] of this model",
    ),
    "prompt huge": ("prompt", own(num_virtual_tokens=HUGE), rf"{WEIGHTS}: {EMBEDDINGS}: got shape \[3, 32\]"),
    "encoder unknown": ("encoded_prompt", own(encoder="gru"), f"{OWN}: encoder: got 'gru', expected 'mlp', 'lstm' or"),
    "encoder missing": ("encoded_prompt", own(encoder=None), f"{OWN}: encoder: got None, expected str"),
    "encoder of keys and values": ("direct", own(encoder="mlp"), f"{OWN}: 'encoder': got a field of no known meaning"),
    "encoder of another kind": (
        "encoded_prompt",
        own(encoder="mlp", encoder_num_layers=2),
        f"{ENCODER}: mlp_head.0.weight: got shape",
    ),
    "encoder's width huge": (
        "encoded_prompt",
        own(encoder_hidden_size=HUGE),
        rf"{ENCODER}: lstm_head.weight_hh_l0: got shape \[20, 5\], expected .* = \[{4 * HUGE}, {HUGE}\]",
    ),
    "encoder's layers huge": (
        "encoded_prompt",
        own(encoder_num_layers=HUGE),
        f"{ENCODER}: got an LSTM of 1 layers, expected encoder_num_layers = {HUGE}",
    ),
    "encoder's layers fewer": (
        "encoded_prompt",
        tensors(lambda t: t.update({"lstm_head.weight_ih_l1": torch.zeros(20, 10)}), ENCODER),
        f"{ENCODER}: 'lstm_head.weight_ih_l1': got a tensor that is no part of a prefix",
    ),
    "encoder's dropout nan": (
        "encoded_prompt",
        own(encoder_dropout="json:NaN"),
        f"{OWN}: encoder_dropout: got nan, expected a number from 0 to below 1",
    ),
    "encoder's other numbers": (
        "encoded_prompt",
        tensor("embedding.weight", torch.zeros_like, ENCODER),
        f"{ENCODER}: got weights that were replaced since",
    ),
    "layers twice": ("layers", own(layers=[0, 0]), rf"{OWN}: layers: got \[0, 0\], expected distinct layer indices"),
    "layers beyond": ("layers", own(layers=[7]), rf"{OWN}: layers: got 7, expected an index in 0\.\.1"),
    "layers others": ("layers", own(layers=[0]), f"{WEIGHTS}: layers.0.k: got no such tensor"),
    "layers none": ("layers", own(layers=[]), rf"{OWN}: layers: got \[\]"),
    "layers a number": ("layers", own(layers=1), f"{OWN}: layers: got 1"),
    "layers text": ("layers", own(layers="01"), f"{OWN}: layers: got '01'"),
    "layers of bools": ("layers", own(layers=[True]), rf"{OWN}: layers: got \[True\]"),
    "layers of lists": ("layers", own(layers=[[1]]), rf"{OWN}: layers: got \[\[1\]\]"),
    "layers of infinities": ("layers", own(layers="json:[1e400]"), rf"{OWN}: layers: got \[inf\]"),
    "offset": ("direct", own(position_offset=["none"]), f"{OWN}: position_offset: got"),
    "frozen beyond P": (
        "frozen",
        own(num_frozen_tokens=4),
        f"{OWN}: num_frozen_tokens: got 4, expected 0..num_virtual",
    ),
    "frozen true": ("frozen", own(num_frozen_tokens=True), f"{OWN}: num_frozen_tokens: got True"),
    "frozen null": ("frozen", own(num_frozen_tokens=None), f"{OWN}: num_frozen_tokens: got None"),
    "frozen half": ("frozen", own(num_frozen_tokens=0.5), f"{OWN}: num_frozen_tokens: got 0.5"),
    "parts a number": ("direct", own(parts=7), f"{OWN}: parts: got 7, expected distinct ones of"),
    "parts unknown": ("direct", own(parts=["left"]), rf"{OWN}: parts: got \['left'\]"),
    "parts of lists": ("direct", own(parts=[[]]), rf"{OWN}: parts: got \[\[\]\]"),
    "parts of a decoder": ("direct", own(parts=["decoder"]), f"{OWN}: parts: got .*, expected None: the model is no"),
    "projected text": ("projected", own(projected="yes"), f"{OWN}: projected: got 'yes', expected bool"),
    "hidden text": ("projected", own(encoder_hidden_size="x"), f"{OWN}: encoder_hidden_size: got 'x', expected an int"),
    "hidden true": ("projected", own(encoder_hidden_size=True), f"{OWN}: encoder_hidden_size: got True"),
    "hidden huge": (
        "projected",
        own(encoder_hidden_size=HUGE),
        rf"{ENCODER}: down.bias: got shape \[5\], expected \[encoder_hidden_size\] = \[{HUGE}\]",
    ),
    "kind": ("prompt", own(kind="sonnet"), f"{OWN}: kind: got 'sonnet', expected 'prompt'"),
    "kind of another": ("direct", own(kind="prompt"), rf"{EMBEDDINGS}: got shape \[3, 64\], expected \[P, d\]"),
    "weights a number": ("direct", own(weights=3), f"{OWN}: weights: got 3, expected str"),
    "weights of another save": ("direct", own(weights="0"), f"{WEIGHTS}: got weights that were replaced since"),
    "MLP of another save": ("projected", own(encoder_weights="0"), f"{ENCODER}: got weights that were replaced since"),
    "init": ("direct", own(init=3), f"{OWN}: init: got 3, expected str"),
    # PEFT's
    "peft_type unknown": ("direct", peft(peft_type="LORA"), f"{CONFIG}: peft_type: got 'LORA', expected PREFIX_TUNING"),
    "peft_type a list": ("direct", peft(peft_type=[]), rf"{CONFIG}: peft_type: got \[\], expected str"),
    "peft_type beside ours": (
        "direct",
        lambda f: edit_json(f / CONFIG, peft_type="LORA"),
        f"{CONFIG}: peft_type: got 'LORA', expected what fastprefix.save wrote beside",
    ),
    "PEFT's tokens beside ours": (
        "direct",
        lambda f: edit_json(f / CONFIG, num_virtual_tokens=4),
        f"{CONFIG}: num_virtual_tokens: got 4, expected 3 as in {OWN}",
    ),
    "ours without its file": ("layers", lambda f: (f / OWN).unlink(), f"dir: got no file .*{OWN}"),
    "PEFT's tokens true": ("direct", peft(num_virtual_tokens=True), f"{CONFIG}: num_virtual_tokens: got True"),
    "PEFT's tokens huge": ("prompt", peft(num_virtual_tokens=HUGE), rf"{EMBEDDINGS}: got shape \[3, 32\]"),
    "PEFT's tokens -1": ("direct", peft(num_virtual_tokens=-1), f"{CONFIG}: num_virtual_tokens: got -1, expected"),
    "PEFT's frozen": ("frozen", peft(num_frozen_tokens="1"), f"{CONFIG}: num_frozen_tokens: got '1', expected 0"),
    "submodules": ("direct", peft(num_transformer_submodules=4), f"{CONFIG}: num_transformer_submodules: got 4"),
    "submodules a list": ("direct", peft(num_transformer_submodules=[]), f"{CONFIG}: num_transformer_submodules: got"),
    "submodules 2": ("direct", peft(num_transformer_submodules=2), f"{CONFIG}: parts: got .*, expected None"),
    "submodules 3": ("direct", peft(num_transformer_submodules=3), f"{CONFIG}: parts: got .*, expected None"),
    "another model's layers": ("direct", peft(num_layers=4), f"{CONFIG}: num_layers: got 4, expected 2 of this model"),
    "another model's heads": (
        "direct",
        peft(num_attention_heads=4),
        f"{CONFIG}: num_attention_heads: got 4, expected 2",
    ),
    "another model's head dim": ("direct", peft(token_dim=32), f"{CONFIG}: token_dim: got 32, expected 16"),
    "token_dim a list": ("direct", peft(token_dim=[16]), rf"{CONFIG}: token_dim: got \[16\], expected int or None"),
    # tensors
    "no tensor": ("direct", tensors(dict.clear), f"{WEIGHTS}: layers.0.k: got no such tensor"),
    "no embedding": ("prompt", tensors(dict.clear), f"{WEIGHTS}: {EMBEDDINGS}: got no such tensor"),
    "a tensor too many": (
        "direct",
        tensors(lambda t: t.update({"score.weight": torch.zeros(2)})),
        f"{WEIGHTS}: 'score.weight': got a tensor that is no part of a prefix, expected {EMBEDDINGS} and nothing else",
    ),
    "a layer too many": (
        "layers",
        tensors(lambda t: t.update({"layers.0.k": torch.zeros(2, 3, 8)})),
        f"{WEIGHTS}: 'layers.0.k': got a tensor that is no part",
    ),
    "a layer's shape": (
        "layers",
        tensor("layers.1.v", lambda x: x[:, :2].clone()),
        r"layers.1.v: got shape \[2, 2, 8\]",
    ),
    "one dimension": ("direct", tensor(EMBEDDINGS, torch.Tensor.flatten), rf"{EMBEDDINGS}: got shape \[192\]"),
    "no dimension": ("prompt", tensor(EMBEDDINGS, lambda x: x[0, 0].clone()), rf"{EMBEDDINGS}: got shape \[\]"),
    "integers": ("direct", tensor(EMBEDDINGS, torch.Tensor.int), f"{WEIGHTS}: {EMBEDDINGS}: got dtype torch.int32"),
    "bools": ("prompt", tensor(EMBEDDINGS, torch.Tensor.bool), f"{WEIGHTS}: {EMBEDDINGS}: got dtype torch.bool"),
    "8 bits": (
        "layers",
        tensor("layers.1.k", lambda x: x.to(torch.float8_e4m3fn)),
        "layers.1.k: got dtype torch.float8_e4m3fn",
    ),
    "nan": ("direct", tensor(EMBEDDINGS, with_nan), f"{WEIGHTS}: {EMBEDDINGS}: got nan or infinite numbers"),
    "nan in a prompt": ("prompt", tensor(EMBEDDINGS, with_nan), f"{EMBEDDINGS}: got nan or infinite numbers"),
    "infinity": ("layers", tensor("layers.1.k", lambda x: x / 0.0), "layers.1.k: got nan or infinite numbers"),
    "beyond fp32": ("layers", tensor("layers.1.k", lambda x: x.double() * 1e300), "layers.1.k: got nan or infinite"),
    "nan in the MLP": (
        "projected",
        tensor("up.weight", with_nan, ENCODER),
        f"{ENCODER}: up.weight: got nan or infinite",
    ),
    "MLP's shape": (
        "projected",
        tensor("up.weight", lambda x: x[1:].clone(), ENCODER),
        rf"{ENCODER}: up.weight: got shape \[63, 5\], expected shape = \[64, 5\]",
    ),
    "MLP's integers": ("projected", tensor("up.bias", torch.Tensor.int, ENCODER), f"{ENCODER}: up.bias: got dtype"),
    "MLP without a part": ("projected", tensors(lambda t: t.pop("up.bias"), ENCODER), "up.bias: got no such tensor"),
    "MLP without its width": ("projected", tensors(lambda t: t.pop("down.bias"), ENCODER), "down.bias: got no such"),
    "MLP with a part too many": (
        "projected",
        tensors(lambda t: t.update(more=torch.zeros(1)), ENCODER),
        f"{ENCODER}: 'more': got a tensor that is no part of a prefix",
    ),
    "other numbers": (
        "direct",
        tensor(EMBEDDINGS, lambda x: x + 1),
        f"{WEIGHTS}: got weights that were replaced since",
    ),
    "other numbers in the MLP": (
        "projected",
        tensor("up.bias", lambda x: x + 1, ENCODER),
        f"{ENCODER}: got weights that",
    ),
    # files
    "truncated weights": ("direct", truncated(WEIGHTS), f"{WEIGHTS}: got no safetensors"),
    "truncated MLP": ("projected", truncated(ENCODER), f"{ENCODER}: got no safetensors"),
    "truncated configuration": ("direct", truncated(OWN), f"{OWN}: got no JSON"),
    "empty weights": ("direct", instead(WEIGHTS, Path.touch), f"{WEIGHTS}: got no safetensors"),
    "no UTF-8": ("direct", lambda f: (f / CONFIG).write_bytes(b'{"\xff": 1}'), f"{CONFIG}: got no JSON"),
    "nested without end": ("direct", lambda f: (f / OWN).write_text("[" * 200_000), f"{OWN}: got no JSON"),
    "a number of 5000 digits": (
        "direct",
        lambda f: (f / OWN).write_text('{"format_version": ' + "9" * 5000 + "}"),
        f"{OWN}: got no JSON",
    ),
    "a long file": (
        "direct",
        lambda f: (f / OWN).write_text(" " * 2**21),
        f"{OWN}: got 2097152 bytes, expected a JSON",
    ),
    "no MLP": ("projected", lambda f: (f / ENCODER).unlink(), f"dir: got no file .*{ENCODER}"),
    "a pickle": ("direct", instead(WEIGHTS, lambda p: torch.save({}, p.with_suffix(".bin"))), "pickles are not loaded"),
    "a pickle under our name": ("direct", lambda f: torch.save({}, f / WEIGHTS), f"{WEIGHTS}: got no safetensors"),
    "a folder for weights": ("direct", instead(WEIGHTS, Path.mkdir), f"{WEIGHTS}: got a folder, expected a file"),
    "a folder for ours": ("direct", instead(OWN, Path.mkdir), f"{OWN}: got a folder, expected a file"),
    "a folder for PEFT's": ("direct", instead(CONFIG, Path.mkdir), f"{CONFIG}: got a folder, expected a file"),
    "links in a circle": ("direct", instead(OWN, lambda p: p.symlink_to(p)), f"{OWN}: got no access"),
    "weights in a circle": ("direct", instead(WEIGHTS, lambda p: p.symlink_to(p)), f"{WEIGHTS}: got no access"),
    "a link to nothing": ("direct", instead(OWN, lambda p: p.symlink_to("nowhere")), f"dir: got no file .*{OWN}"),
    "a pipe": ("direct", instead(OWN, os.mkfifo), f"{OWN}: got no regular file, expected a file"),
    "a pipe for weights": ("direct", instead(WEIGHTS, os.mkfifo), f"{WEIGHTS}: got no regular file, expected a file"),
}
