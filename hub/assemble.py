"""Put a Kernel Hub project together from the package's own files: ``python -m hub.assemble OUT``.

``OUT`` then holds what ``kernel-builder`` builds from (``build.toml``, ``flake.nix``, ``torch-ext/fastprefix``) and
``build/torch-cpu`` and ``build/torch-cuda``, builds for this machine that ``kernels.get_local_kernel(OUT)`` loads, and
so does ``kernels.get_kernel`` and transformers with ``LOCAL_KERNELS="org/fastprefix=OUT"`` in the environment.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HUB = ROOT / "hub"
NAME = "fastprefix"
# The operator, of the package's modules. ``_ops.py`` is written for each build, the kernels get their own folder.
MODULES = (
    "_extension",
    "errors",
    "types",
    "masks",
    "validation",
    "reference",
    "dispatch",
    "ops",
    "functional",
)
FOLDERS = ("backends", "calls", "cuda_library", "machine", "verification")
BACKENDS = ("cpu", "cuda")

OPS = '''"""The namespace of torch in which this build's operators are registered."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's name with its namespace, as ``torch.library`` takes it."""
    return f"{namespace}::{{op_name}}"
'''


def sources() -> dict[str, Path]:
    """The files of a build, by path in it: the operator, its backends and kernels, and the Hub's own ``__init__``."""
    found = {f"{name}.py": ROOT / NAME / f"{name}.py" for name in MODULES}
    trees = [(HUB / "package", ""), (ROOT / "kernels" / "triton", "_triton/")]
    trees += [(ROOT / NAME / folder, f"{folder}/") for folder in FOLDERS]
    for folder, prefix in trees:
        for path in sorted(p for ext in ("py", "json") for p in folder.rglob(f"*.{ext}")):
            found[prefix + path.relative_to(folder).as_posix()] = path
    return found


def unique_id(files: dict[str, Path]) -> str:
    """Names the contents: two builds share their operators' namespace only if every file is the same."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _copy(files: dict[str, Path], folder: Path) -> None:
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _build_setting(name: str) -> str:
    """A setting of ``build.toml`` (which Python 3.10 has no parser for): a number or a string of one line."""
    match = re.search(rf'^{name} = "?([^"\n]+)"?$', (HUB / "build.toml").read_text(), re.M)
    assert match, f"build.toml: no {name}"
    return match[1]


def _metadata(folder: Path, namespace: str, backend: str) -> dict[str, object]:
    """The content of ``metadata.json``: the build's id, version and backend, and the digest of each file."""
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {
        "name": NAME,
        "id": namespace,
        "version": int(_build_setting("version")),
        "license": _build_setting("license"),
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def assemble(out: Path) -> Path:
    """Write the project and its local builds to ``out``, which must not exist or be empty."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: got a folder that holds something, expected a new or an empty one")
    files = sources()
    _copy(files, out / "torch-ext" / NAME)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copyfile(HUB / name, out / name)
    _copy({p.name: p for p in (HUB / "benchmarks").glob("benchmark*.py")}, out / "benchmarks")
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        _copy(files, folder)
        namespace = f"_{NAME}_{backend}_{unique_id(files)}"
        (folder / "_ops.py").write_text(OPS.format(namespace=namespace))
        text = json.dumps(_metadata(folder, namespace, backend), indent=2)
        (folder / "metadata.json").write_text(text + "\n")
    return out


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hub.assemble", description="Put a Kernel Hub project together.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    try:
        print(assemble(parser.parse_args(words).out))
    except ValueError as error:
        print(f"hub.assemble: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
