"""The Kernel Hub's build of the operator: relocatable, unique in a process, and loadable by transformers, offline."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix
from hub import assemble

ROOT = Path(fastprefix.__file__).parent.parent


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble.assemble(tmp_path_factory.mktemp("hub") / "fastprefix")


def loaded(folder: Path) -> ModuleType:
    """A build as the package ``kernels`` loads it: by its path, under its id."""
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(project: Path) -> ModuleType:
    return loaded(project / "build" / "torch-cpu")


def call(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    sizes = {"q": (2, 4, 5, 16), "k": (2, 2, 7, 16), "v": (2, 2, 7, 16), "prefix_k": (2, 3, 16), "prefix_v": (2, 3, 16)}
    return {name: torch.randn(*size, requires_grad=True) for name, size in sizes.items()}


def test_a_build_imports_itself_torch_and_triton_alone(project: Path) -> None:
    for folder in (project / "torch-ext" / "fastprefix", project / "build" / "torch-cpu"):
        files = sorted(folder.rglob("*.py"))
        assert len(files) > 40
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                roots = {name.split(".")[0] for name in names}
                # torch itself requires filelock.
                assert roots <= {"torch", "triton", "filelock", *sys.stdlib_module_names}, path


def test_a_project_is_what_the_builder_expects(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((project / "build.toml").read_text())
    assert settings["general"]["edition"] == 5 and set(settings["torch-noarch"]["pyext"]) == {"json", "py"}
    assert set(settings["general"]["backends"]) == set(assemble.BACKENDS)
    package = project / "torch-ext" / settings["general"]["name"]
    assert (package / "__init__.py").exists() and not (package / "_ops.py").exists(), "the builder writes _ops.py"
    assert {p.name for p in (package / "backends" / "launch" / "tiles").glob("*")} >= {"sm_80.json", "sm_90.json"}
    assert "not run on a GPU" in (project / "CARD.md").read_text()


@pytest.mark.parametrize("backend", assemble.BACKENDS)
def test_metadata_says_what_lies_there(project: Path, backend: str) -> None:
    folder = project / "build" / f"torch-{backend}"
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["id"].isidentifier() and metadata["backend"] == {"type": backend}
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    del files["metadata.json"]
    assert metadata["digest"]["files"] == {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for name, path in files.items()
    }


def test_two_builds_and_the_package_in_one_process(kernel: ModuleType, project: Path, tmp_path: Path) -> None:
    files = assemble.sources()
    other_errors = tmp_path / "errors.py"
    other_errors.write_text(files["errors.py"].read_text() + "\n# Another build.\n")
    assert assemble.unique_id({**files, "errors.py": other_errors}) != assemble.unique_id(files)
    other = project.parent / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "sources", lambda: {**files, "errors.py": other_errors})
        assemble.assemble(other)
    second = loaded(other / "build" / "torch-cpu")
    names = {kernel.__name__, second.__name__, "fastprefix"}
    assert len(names) == 3 and all(hasattr(getattr(torch.ops, name), "prefix_attn_fwd") for name in names)
    wanted, grads = None, None
    for function in (fastprefix.prefix_attention, kernel.prefix_attention, second.prefix_attention):
        leaves = call()
        o = function(**leaves, backend="aten")  # a build has no compiled extension
        o.sum().backward()
        found = [x.grad for x in leaves.values()]
        wanted, grads = (o, found) if wanted is None else (wanted, grads)
        assert torch.equal(o, wanted) and all(torch.equal(x, y) for x, y in zip(found, grads, strict=True))


def test_a_build_compiles_and_maps(kernel: ModuleType) -> None:
    leaves = {name: x.detach() for name, x in call().items()}
    want = kernel.prefix_attention(**leaves)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kernel.prefix_attention(**x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(leaves), want)
    mapped = torch.vmap(lambda q: kernel.prefix_attention(**{**leaves, "q": q}))(leaves["q"].expand(2, -1, -1, -1, -1))
    torch.testing.assert_close(mapped, want.expand(2, -1, -1, -1, -1))
    assert "chosen by auto" in kernel.explain(**leaves)


def test_the_interpreter_runs_a_builds_kernels(project: Path) -> None:
    """In a process of its own, as Triton decides when it is imported."""
    pytest.importorskip("triton")
    folder = project / "build" / "torch-cpu"
    code = (
        "from tests.project.test_hub import call, loaded; from pathlib import Path; import sys, torch\n"
        f"kernel = loaded(Path({str(folder)!r})); x = call()\n"
        "o, want = (kernel.prefix_attention(**x, backend=name) for name in ('triton', 'reference'))\n"
        "torch.testing.assert_close(o, want)\n"
        "found = [m for m in sys.modules if m.endswith('_triton.primitives')]\n"
        "print(found == [f'{kernel.__name__}._triton.primitives'])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


class Layer(nn.Module):
    is_causal = True


def attended(kernel: ModuleType, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    o, weights = kernel.attention_forward(Layer(), q, k, v, mask, **kwargs)
    assert weights is None
    return o.transpose(1, 2)


def test_attention_of_a_layer(kernel: ModuleType) -> None:
    """Each thing that transformers hands over, against torch's own attention with a mask of all of it."""
    x = call()
    q, k, v = (x[name].detach()[:, :, -5:] for name in ("q", "k", "v"))
    row, key = torch.arange(5)[:, None], torch.arange(5)
    padding = torch.tensor([[False, True, True, True, True], [True] * 5])
    documents = torch.tensor([[0, 1, 2, 0, 1]])
    same = torch.tensor([0, 0, 0, 1, 1])
    causal = key <= row
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (causal, {}),
        (torch.ones(5, 5, dtype=torch.bool), {"is_causal": False}),
        (causal & (key > row - 2), {"sliding_window": 2}),
        (causal & padding[:, None, None, :], {"mask": padding.long()}),
        (causal, {"mask": causal.expand(2, 1, 5, 5), "is_causal": False}),
    ]
    for visible, given in cases:
        want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        seen = visible.expand(2, 1, 5, 5).any(-1, keepdim=True)  # torch's own is nan where nothing is
        got = attended(kernel, q, k, v, **given)
        torch.testing.assert_close(got.masked_fill(~seen, 0.0), want.nan_to_num().masked_fill(~seen, 0.0))
    one = nn.functional.scaled_dot_product_attention(
        q[:1], k[:1], v[:1], attn_mask=causal & (same == same[:, None]), enable_gqa=True
    )
    torch.testing.assert_close(attended(kernel, q[:1], k[:1], v[:1], position_ids=documents), one)


def test_attention_with_a_cache(kernel: ModuleType) -> None:
    x = call()
    q, k, v = (x[name].detach() for name in ("q", "k", "v"))
    want = attended(kernel, q, k, v)  # the last 5 of 7 tokens
    capacity = (torch.cat([y, torch.full_like(y[:, :, :3], 1e4)], 2) for y in (k, v))
    mask = torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(attended(kernel, q, *capacity, mask), want)
    positions = torch.arange(2, 7).expand(2, -1)
    torch.testing.assert_close(attended(kernel, q, k, v, position_ids=positions), want)
    with pytest.raises(ValueError, match="position_ids: got 6 as the last of 10 keys: a static cache"):
        attended(kernel, q, *(torch.cat([y, y[:, :, :3]], 2) for y in (k, v)), position_ids=positions)
    # Models that give their attention no positions: keys that are not written yet are zeros.
    torch.testing.assert_close(attended(kernel, q, k, v), want)
    with pytest.raises(ValueError, match="key: got zeros as the last of 10 keys: a static cache that is not full"):
        attended(kernel, q, *(nn.functional.pad(y, (0, 0, 0, 3)) for y in (k, v)))
    with pytest.raises(ValueError, match="cache: got a paged cache, expected none"):
        attended(kernel, q, k, v, cache=object())


def the_loader() -> None:
    """Skip where Hugging Face's package is not installed: plain ``kernels`` is then this repository's own folder."""
    pytest.importorskip("kernels.benchmark")


@pytest.mark.slow
def test_a_build_verifies_itself(project: Path, kernel: ModuleType) -> None:
    """Its child processes import the build, under the name of its folder, and not an installed package."""
    run, cells = (importlib.import_module(f"{kernel.__name__}.verification.{name}") for name in ("run", "cells"))
    cell = cells.Cell("decode", "fp32", 16, 16, 2, cells.ANY, ("causal",))
    found, left = run.examine(torch.device("cpu"), {cell: ["aten:folded"]}, [], 600.0)
    assert left == 0 and found.verdicts[cell]["aten:folded"].result == "right"
    line = run.Supervisor(torch.device("cpu"), False, 1.0, 0.0, 1).command()
    assert line[3:5] == [str(project / "build" / "torch-cpu"), "torch-cpu"]


def test_the_loader_takes_the_project(project: Path) -> None:
    the_loader()
    from kernels import get_local_kernel

    kernel = get_local_kernel(project)
    assert set(kernel.__all__) == {
        "UnsupportedError",
        "attention_forward",
        "explain",
        "flash_attn_forward",
        "prefix_attention",
    }


def test_transformers_takes_its_attention_from_a_build(project: Path) -> None:
    the_loader()
    environment = {
        **os.environ,
        "LOCAL_KERNELS": f"org/fastprefix={project}",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.project.hub_in_transformers"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_the_benchmark_verifies(kernel: ModuleType) -> None:
    the_loader()
    spec = importlib.util.spec_from_file_location("hub_benchmark", ROOT / "hub" / "benchmarks" / "benchmark.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    run = module.PrefixAttentionBenchmark()
    run.kernel = kernel
    for workload in ("train", "decode"):
        getattr(run, f"setup_{workload}")()
        getattr(run, f"benchmark_{workload}")()
        torch.testing.assert_close(run.out, getattr(run, f"verify_{workload}")())


def test_assembling_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    assert assemble.main([str(tmp_path)]) == 2
    assert "expected a new or an empty one" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
