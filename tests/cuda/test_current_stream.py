"""The stream comes from torch's CUDA library, which Python has loaded where no linker would look for its names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastprefix.cuda_library import build
from tests.cuda.libraries import OPERATORS, TORCH

ASK = """
#include "current_stream.h"
extern "C" __attribute__((visibility("default"))) long stream_of(int device, char* told) {
  try {
    return reinterpret_cast<long>(fastprefix::current_stream(device));
  } catch (const std::exception& error) {
    for (const char* x = error.what(); (*told = *x); x++) told++;
    return -1;
  }
}
"""
TORCHS = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(1000L + device);
  return device == 7;
}
"""
RUN = """
import ctypes, sys
asked, torchs = sys.argv[1:]
if torchs:
    ctypes.CDLL(torchs)  # for itself alone, as Python loads every library
told = ctypes.create_string_buffer(200)
ask = ctypes.CDLL(asked).stream_of
print(*(ask(device, told) for device in (0, 3, 7)), told.value.decode(), sep="|")
"""


def compiled(folder: Path, name: str, text: str, *options: str) -> Path:
    (folder / f"{name}.cpp").write_text(text)
    out = folder / f"{name}.so"
    command = [*build._compiler(), *build.HOST, f"-I{OPERATORS}", f"-isystem{TORCH / 'include'}"]
    given = ["-fvisibility=default", "-shared", str(folder / f"{name}.cpp"), "-o", str(out), "-ldl", *options]
    subprocess.run([*command, *given], check=True)
    return out


@pytest.mark.parametrize("with_cuda", [True, False])
def test_it_is_found_or_missed(with_cuda: bool, tmp_path: Path) -> None:
    asked = compiled(tmp_path, "asked", ASK)
    torchs = compiled(tmp_path, "torchs", TORCHS, "-Wl,-soname,libtorch_cuda.so") if with_cuda else ""
    done = subprocess.run([sys.executable, "-c", RUN, str(asked), str(torchs)], capture_output=True, text=True)
    wrong = (
        "its current CUDA stream cannot be had" if with_cuda else "got one without CUDA, expected one that has streams"
    )
    *streams, told = done.stdout.strip().split("|")
    assert streams == (["1000", "1003", "-1"] if with_cuda else ["-1"] * 3), done.stderr
    assert told.startswith(f"torch: {wrong}")
