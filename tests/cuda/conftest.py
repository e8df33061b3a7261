"""The backend ``cuda`` on a processor, by a library of plain loops or by the emulator, and the compiled library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastprefix.backends import cuda
from tests.cuda.compiled.binaries import nvcc
from tests.cuda.compiled.real_library import build_real
from tests.cuda.emulated.operators import ROUTES, Emulated, emulated_param
from tests.cuda.emulated.operators import emulated as emulated_by
from tests.cuda.libraries import compile_host, once

NAMESPACE = "fastprefix_plain"
EMULATED = [emulated_param(route=route) for route in ROUTES]


@pytest.fixture(scope="session")
def plain_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("plain_decode.cpp")
    return once(tmp_path_factory, "plain.so", lambda out: compile_host(out, NAMESPACE, [source]))


@pytest.fixture
def plain(plain_library: Path) -> Iterator[Path]:
    """The library is in use."""
    with cuda.emulated(str(plain_library), NAMESPACE):
        yield plain_library


@pytest.fixture(params=EMULATED)
def emulated(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    """The kernels in the emulator are in use, each route in turn."""
    with emulated_by(request.param) as here:
        yield here


@pytest.fixture(params=["plain", *EMULATED])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The plain library, or the kernels in the emulator by a route: its name."""
    if request.param == "plain":
        request.getfixturevalue("plain")
        yield "plain"
    else:
        with emulated_by(request.param):
            yield str(request.param)


@pytest.fixture(scope="session")
def real_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's own kernels, as a default build has them, for bf16 alone: half a minute."""
    compiler = nvcc()
    return once(tmp_path_factory, "real.so", lambda out: build_real(out, compiler, fp16=False))
