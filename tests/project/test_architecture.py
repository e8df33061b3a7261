"""The floors of the house, read from the AST, and what ``import fastprefix`` needs, in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastprefix

ROOT = Path(fastprefix.__file__).parent
# A module imports from its own floor's package or from lower floors only.
FLOORS = (
    ("_ops", "_triton", "errors"),
    ("types",),
    ("masks", "validation"),
    ("reference", "backends"),
    ("dispatch",),
    ("ops",),
    ("transforms",),
    ("functional",),
    ("prefixes",),
    ("init", "hf"),
    ("explain",),
    ("assets", "data"),
    ("models",),
    ("measure",),
    ("train", "demo"),
    ("cli",),
)
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def part(path: Path) -> str:
    """The floor's name: the first folder or the file under the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """The module that a ``from ... import`` names, its leading dots resolved."""
    if node.level == 0:
        return node.module or ""
    package = ("fastprefix", *path.parent.relative_to(ROOT).parts)
    return ".".join([*package[: len(package) - node.level + 1], *((node.module,) if node.module else ())])


def imports(path: Path) -> list[str]:
    """Names of modules imported from within the package, ``fastprefix`` removed."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = absolute(path, node)
            package = ROOT.parent.joinpath(*module.split(".")).is_dir()
            names = [f"{module}.{alias.name}" for alias in node.names] if package else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [name.removeprefix("fastprefix.") for name in names if name.startswith("fastprefix.")]
    return found


def test_every_file_has_a_floor() -> None:
    assert {part(p) for p in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    mine = part(path)
    for name in imports(path):
        other = name.split(".")[0]
        if other == "_triton":  # kernels, which import nothing of ours
            assert mine == "backends"
        elif other in FLOOR:  # else a public name of the package itself, which only top floors may use
            assert other == mine or FLOOR[other] < FLOOR[mine], f"{mine} imports {other}"
        else:
            assert FLOOR[mine] >= FLOOR["assets"], f"{mine} imports fastprefix.{name}"


@pytest.mark.parametrize("path", sorted((ROOT / "backends").glob("*.py")), ids=lambda p: p.name)
def test_backends_know_neither_each_other_nor_the_reference(path: Path) -> None:
    primitives = (
        "aten_ops",
        "aten_ops_cuda",
        "merge_states",
        "bank_views",
        "fold_batch",
        "content_blocks",
        "concatenated_prefix",
    )
    shared = {f"backends.{name}" for name in (*primitives, "launch")}
    for name in imports(path):
        assert name != "reference"
        assert not name.startswith("backends") or name in {"backends", *shared} or name.startswith("backends.launch.")


def test_kernels_are_free_of_torch_and_of_the_package() -> None:
    kernels = sorted((ROOT.parent / "kernels").rglob("*.py"))
    assert kernels and not (ROOT.parent / "kernels" / "__init__.py").exists()
    for path in kernels:
        assert len(path.read_text().splitlines()) <= 400
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(name.split(".")[0] in ("triton", "typing") for name in names), path


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys, fastprefix; fastprefix.prefix_attention; fastprefix.PrefixConfig; fastprefix.init.normal();"
        "print([m for m in ('triton', 'transformers', 'peft', 'safetensors', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and not done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_small_files(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 260


def test_public_names() -> None:
    for name in fastprefix.__all__:
        assert getattr(fastprefix, name) is not None
        assert name == "__version__" or getattr(fastprefix, name).__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastprefix.nonsense
