"""Any bytes in any of an adapter's files: a prefix or a ValueError, and after an error the model is what it was."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastprefix
from fastprefix.hf.storage.atomic_folder import COMMIT, STAGING
from tests.support.saved_adapters import CONFIG, ENCODER, KINDS, OWN, WEIGHTS, saved, state
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")

QUICK = settings(
    max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
FULL = settings(QUICK, max_examples=1100, derandomize=False)

# What is read as another type, another number or far too much memory.
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    5,
    10**12,
    2**63,
    10**30,
    1e400,
    float("nan"),
    0.5,
    "",
    "x",
    [],
    {},
]
odd = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("kind", "parts", "layers", "projected", "weights", "encoder_weights", "num_frozen_tokens", "peft_type")


@st.composite
def bent(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with some bytes flipped, cut off, put in or repeated."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        match draw(st.sampled_from(("flip", "cut", "insert", "repeat", "drop"))):
            case "flip" if changed:
                changed[at] = draw(st.integers(0, 255))
            case "cut":
                del changed[at:]
            case "insert":
                changed[at:at] = draw(st.binary(max_size=9))
            case "repeat":
                changed[at:at] = changed[at : at + draw(st.integers(0, 40))]
            case "drop":
                del changed[at : at + draw(st.integers(0, 40))]
    return bytes(changed)


@st.composite
def bent_json(draw: st.DrawFn, data: dict[str, Any]) -> bytes:
    """A JSON object with fields of other values, without some, or something else."""
    changed: Any = dict(data)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted({*data, *FIELDS})) | st.text(max_size=6))
        if draw(st.booleans()):
            changed.pop(name, None)
        else:
            changed[name] = draw(odd)
    if draw(st.integers(0, 19)) == 0:
        changed = draw(odd)
    return json.dumps(changed).encode()


@st.composite
def bent_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header speaks of other dtypes, shapes, places and names."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(header)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        entry = dict(header.get(name, {}))
        match draw(st.sampled_from(("dtype", "shape", "data_offsets", "name", "odd"))):
            case "dtype":
                kinds = (
                    "F64",
                    "F32",
                    "F16",
                    "BF16",
                    "I64",
                    "I8",
                    "U8",
                    "BOOL",
                    "F8_E4M3",
                    "F8_E8M0",
                    "F4",
                    "C64",
                    "Z9",
                )
                entry["dtype"] = draw(st.sampled_from(kinds))
            case "shape":
                entry["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 64, 2**40, 2**63 - 1, -1]), max_size=5))
            case "data_offsets":
                entry["data_offsets"] = draw(st.lists(st.integers(-9, len(body) + 9), max_size=3))
            case "name":
                header[draw(st.sampled_from(["layers.0.k", "prompt_embeddings", "", "__metadata__"]))] = entry
            case "odd":
                entry = draw(odd)
        header[name] = entry
    if draw(st.booleans()):
        body = draw(bent(body)) if body else body
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


class Folders:
    """A valid adapter of every kind, and a copy to spoil."""

    def __init__(self, root: Path) -> None:
        self.valid: dict[str, dict[str, bytes]] = {}
        for kind in KINDS:
            saved(root / kind, kind)
            self.valid[kind] = {path.name: path.read_bytes() for path in (root / kind).iterdir()}
        self.spoilt = root / "spoilt"
        self.model = tiny_model()
        self.before = state(self.model)

    def try_load(self, files: dict[str, bytes]) -> bool:
        """Whether a folder with these files loads; it raises ValueError or gives a prefix of finite numbers."""
        shutil.rmtree(self.spoilt, ignore_errors=True)
        for name, data in files.items():
            path = self.spoilt / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            prefix = fastprefix.load(self.model, self.spoilt)
        except ValueError as error:
            assert str(self.spoilt) in str(error) and len(str(error)) < 2000
            assert state(self.model) == self.before
            return False
        assert all(bool(p.isfinite().all()) and p.requires_grad for p in prefix.parameters())
        assert prefix.num_virtual_tokens == 3
        with torch.no_grad():
            assert self.model(torch.arange(3, 9)[None]).logits.isfinite().all()
        fastprefix.detach(self.model)
        assert state(self.model) == self.before
        return True


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("fuzz"))


def test_what_is_spoilt_here_loads_unspoilt(folders: Folders) -> None:
    assert all(folders.try_load(files) for files in folders.valid.values())


@st.composite
def spoilt(draw: st.DrawFn, valid: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    """An adapter's files, one or two of them spoilt, ours perhaps missing."""
    files = dict(valid[draw(st.sampled_from(sorted(valid)))])
    if draw(st.integers(0, 3)) == 0:
        files.pop(OWN)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(files)))
        how = draw(st.sampled_from(("bytes", "structure", "structure", "noise")))
        if how == "noise":
            files[name] = draw(st.binary(max_size=200))
        elif how == "bytes":
            files[name] = draw(bent(files[name]))
        elif name.endswith(".json"):
            try:
                data = json.loads(files[name])
            except ValueError:
                continue
            files[name] = draw(bent_json(data if isinstance(data, dict) else {}))
        else:
            try:
                files[name] = draw(bent_header(files[name]))
            except (ValueError, struct.error, AttributeError, TypeError):  # spoilt beyond a header already
                files[name] = draw(bent(files[name]))
    return files


def sweep(folders: Folders, profile: settings) -> None:
    @profile
    @given(files=spoilt(folders.valid))
    def run(files: dict[str, bytes]) -> None:
        folders.try_load(files)

    run()


def noise(folders: Folders, profile: settings) -> None:
    names = st.sampled_from([CONFIG, WEIGHTS, OWN, ENCODER, f"{STAGING}/{COMMIT}", f"{STAGING}/{CONFIG}"])

    @profile
    @given(files=st.dictionaries(names, st.binary(max_size=300), min_size=1))
    def run(files: dict[str, bytes]) -> None:
        assert not folders.try_load(files)

    run()


def half_committed(folders: Folders, profile: settings) -> None:
    """A commit of any content beside a valid adapter: that one, or what the commit has in a valid form."""
    commit = st.builds(
        lambda files, without: json.dumps({"files": files, "without": without}).encode(),
        *[st.lists(st.sampled_from([CONFIG, WEIGHTS, OWN, ENCODER, "..", "/etc/passwd", "a/b"]) | odd, max_size=4)] * 2,
    )

    @profile
    @given(kind=st.sampled_from(sorted(KINDS)), commit=commit | st.binary(max_size=60), staged=spoilt(folders.valid))
    def run(kind: str, commit: bytes, staged: dict[str, bytes]) -> None:
        inside = {f"{STAGING}/{name}": data for name, data in staged.items()}
        folders.try_load({**folders.valid[kind], **inside, f"{STAGING}/{COMMIT}": commit})

    run()


@pytest.mark.parametrize("sweeping", [sweep, noise, half_committed])
def test_any_bytes(sweeping: Any, folders: Folders) -> None:
    sweeping(folders, QUICK)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("sweeping", "times"), [(sweep, 4), (noise, 1), (half_committed, 1)])
def test_any_bytes_in_thousands(sweeping: Any, times: int, folders: Folders) -> None:
    sweeping(folders, settings(FULL, max_examples=FULL.max_examples * times))
