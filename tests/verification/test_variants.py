"""The checks compile the kernels that real calls compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_no_real_call_compiles_a_kernel_that_is_not_checked() -> None:
    """But for the last stage of decoding, which adds up partial results: its rows depend on the device's size."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTPREFIX_TILES")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.verification.compiled_variants"],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not [line for line in done.stdout.splitlines() if not line.startswith("decode_combine ")]
