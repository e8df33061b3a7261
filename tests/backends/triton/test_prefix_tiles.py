"""Whole tiles of a prefix need no mask: results with and without a last tile that is not whole."""

from __future__ import annotations

import pytest
import torch

from fastprefix.backends.launch.tile_config import Tile
from tests.backends.triton.test_launch import impose
from tests.support.operator_calls import Call, make_call
from tests.support.operator_calls import run as run_call
from tests.support.operator_oracle import assert_close, truth

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.slow]

PER_ROW = torch.tensor([[0, 0, 1, -1, 2, 2, 2], [3, 3, 3, 0, 0, 1, -1]])
ARGUMENTS = {
    "plain": {},
    "scale_negative": {"scale": -0.5},
    "scale_zero": {"scale": 0.0},
    "softcap": {"softcap": 2.0},
    "a_bank": {"N": 4, "prefix_ids": torch.tensor([2, -1])},
    "a_ragged_bank": {"N": 4, "prefix_ids": torch.tensor([2, 3]), "prefix_lens": torch.tensor([40, 7, 32, 33])},
    "a_prefix_for_each_row": {"N": 4, "prefix_ids": PER_ROW, "prefix_lens": torch.tensor([40, 16, 32, 33])},
}


def prefix_call(P: int, arguments: str) -> Call:
    return make_call(B=2, H=4, H_kv=2, S=7, P=P, D=16, **ARGUMENTS[arguments])


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("P", [40, 48])
def test_whole_tiles_and_the_rest(P: int, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    impose(monkeypatch, Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_P=16))
    call = prefix_call(P, arguments)
    assert_close(run_call(call, "triton"), truth(call), 1e-5)


def test_tokens_after_the_last_weigh_nothing_next_to_low_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of zeros would outweigh them all, and exp of its distance to them overflows."""
    impose(monkeypatch, Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_P=16))
    call = prefix_call(40, "plain")
    for name, sign in (("q", 1.0), ("k", -1.0), ("prefix_k", -1.0)):
        call.leaves[name] = (sign * (8.0 + call.leaves[name].detach())).requires_grad_()
    assert_close(run_call(call, "triton"), truth(call), 1e-4)
