"""The layers of the package and the rooms of its folders, read from the AST; and what ``import fastprefix`` needs.

An import under ``TYPE_CHECKING`` counts as an import: it hides a circle from Python, but not from a reader.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastprefix

ROOT = Path(fastprefix.__file__).parent
# Each line may import itself and the lines above it.
LAYERS = (
    ("_ops", "_triton", "errors", "machine"),
    ("_extension", "cuda_library"),
    ("types",),
    ("masks", "validation"),
    ("reference", "backends"),
    ("verification",),
    ("dispatch",),
    ("ops",),
    ("calls",),
    ("functional",),
    ("prefixes",),
    ("init", "hf"),
    ("explain",),
    ("assets", "data"),
    ("models",),
    ("analysis",),
    ("measure",),
    ("inspection",),
    ("train", "demo"),
    ("cartridges",),
    ("serving",),
    ("cli",),
)
# The same inside folders whose modules stand in rooms; rooms in one line know nothing of each other.
ROOMS = {
    "hf": (
        ("attention",),
        ("model",),
        ("runtime",),
        ("adapters",),
        ("sharing", "storage"),
        ("peft",),
        ("api", "trainer"),
        ("explain",),
    ),
    "machine": (
        ("device", "files", "html_page", "process_wide", "processor", "text_table", "timing"),
        ("device_errors",),
    ),
    "verification": (
        ("cells",),
        ("routes", "identity", "child"),
        ("table",),
        ("store", "supervisor", "checks"),
        ("plan", "lookup", "report"),
        ("run",),
        ("first_use",),
        ("ranking",),
    ),
    "measure": (("report_tables",), ("operator",), ("training", "kernels")),
    "inspection": (("costs", "drawings", "texts"), ("gather",), ("page",)),
    "analysis": (
        ("result", "projection"),
        ("forward",),
        ("attention", "bias", "mass", "priors", "slots", "tokens", "trajectories"),
    ),
    "cli": (
        ("options", "quiet_imports"),
        ("bench_kernels", "bench_predict"),
        ("bench", "cartridge", "demo", "explain", "generate", "inspect", "memory", "serve", "train", "verify"),
        ("__main__",),
    ),
}
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
REPOSITORY = ROOT.parent
FOLDERS = ("fastprefix", "kernels", "benches", "tests", "examples", "hub")
MOST_MODULES = 15  # in a folder, beside its __init__


def modules() -> dict[str, Path]:
    """Every module of the package by its name, ``fastprefix`` removed."""
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


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


def test_every_file_has_a_layer_and_a_room() -> None:
    assert {part(p) for p in FILES} == set(LAYER)
    for folder, lines in ROOMS.items():
        found = {p.relative_to(ROOT / folder).parts[0].removesuffix(".py") for p in (ROOT / folder).rglob("*.py")}
        assert found - {"__init__"} == {name for line in lines for name in line}, folder


def test_imports_go_down() -> None:
    def offends(path: Path, name: str) -> bool:
        mine, other = part(path), name.split(".")[0]
        if other == "_triton":  # kernels, which import nothing of ours
            return mine != "backends"
        if other in LAYER:
            return other != mine and LAYER[other] >= LAYER[mine]
        return LAYER[mine] < LAYER["assets"]  # a public name of the package itself, which only top layers may use

    assert not [f"{p.relative_to(ROOT)}: {name}" for p in FILES for name in imports(p) if offends(p, name)]


@pytest.mark.parametrize("folder", ROOMS)
def test_rooms_import_lower_rooms(folder: str) -> None:
    level = {name: i for i, names in enumerate(ROOMS[folder]) for name in names}

    def offends(mine: str, name: str) -> bool:
        parts = name.split(".")
        if parts[0] != folder or len(parts) == 1 or parts[1] not in level:
            return False  # elsewhere, or a name of the folder's own __init__
        return parts[1] != mine and level[parts[1]] >= level[mine]

    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        mine = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        if mine != "__init__":
            found += [f"{path.relative_to(ROOT)}: {name}" for name in imports(path) if offends(mine, name)]
    assert not found


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    edges = {name: {x for x in imports(path) if x in known and x != name} for name, path in known.items()}
    edges = {name: {x for x in found if not name.startswith(f"{x}.")} for name, found in edges.items()}
    finished: set[str] = set()

    def circle(name: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if name in path:
            return (*path[path.index(name) :], name)
        if name in finished:
            return ()
        found = next((x for other in sorted(edges[name]) if (x := circle(other, (*path, name)))), ())
        finished.add(name)
        return found

    assert not [x for name in sorted(edges) if (x := circle(name, ()))]


def test_only_the_assembly_is_seen_from_above() -> None:
    """Rooms below ``adapters`` are handed the records they need, and never the whole installation."""
    for room in ("attention", "model", "runtime"):
        for path in (ROOT / "hf" / room).glob("*.py"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert "Installation" not in names, path


def test_backends_know_neither_each_other_nor_the_reference() -> None:
    backends = {"backends.aten", "backends.cuda", "backends.native", "backends.triton"}
    for path in sorted((ROOT / "backends").rglob("*.py")):
        mine = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        others = backends - {mine}
        assert not [name for name in imports(path) if name == "reference" or name in others], path
        if path.parent.name == "launch":
            assert not [x for x in imports(path) if x.startswith("backends") and not x.startswith("backends.launch")]


def test_kernels_are_free_of_torch_and_of_the_package() -> None:
    kernels = sorted((ROOT.parent / "kernels").rglob("*.py"))
    assert kernels and not (ROOT.parent / "kernels" / "__init__.py").exists()
    for path in kernels:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(name.split(".")[0] in ("triton", "typing") for name in names), path


def folders() -> Iterator[tuple[str, list[Path]]]:
    """Every folder of ours with Python files, and those files."""
    for name in FOLDERS:
        for folder in sorted({path.parent for path in (REPOSITORY / name).rglob("*.py")}):
            files = sorted(folder.glob("*.py"))
            if not any(p.is_symlink() for p in (folder, *folder.parents)):
                yield str(folder.relative_to(REPOSITORY)), files


def test_small_folders_of_small_files() -> None:
    limits = {"fastprefix": 260, "kernels": 400}
    crowded, long = [], []
    for folder, files in folders():
        if len([p for p in files if p.name != "__init__.py"]) > MOST_MODULES:
            crowded.append(folder)
        most = limits.get(folder.split("/")[0], 300)
        long += [str(p.relative_to(REPOSITORY)) for p in files if len(p.read_text().splitlines()) > most]
    assert not crowded and not long


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys, fastprefix; fastprefix.prefix_attention; fastprefix.PrefixConfig; fastprefix.init.normal();"
        "print([m for m in ('triton', 'transformers', 'peft', 'safetensors', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and not done.stderr


def test_public_names() -> None:
    for name in fastprefix.__all__:
        assert getattr(fastprefix, name) is not None
        assert name == "__version__" or getattr(fastprefix, name).__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastprefix.nonsense
