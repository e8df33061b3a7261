"""One table of operator calls that covers every argument; the stages share it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from tests.support.operator_calls import Call, make_call


def padding(B: int, T: int, side: str) -> torch.Tensor:
    """``[B, T]`` bool; sample 0 has one token left, the last sample is whole."""
    mask = torch.ones(B, T, dtype=torch.bool)
    for b in range(B - 1):
        n = max(0, T - 1 - b)
        mask[b, :n] = False
    return mask if side == "left" else mask.flip(1)


def prefix_bias(*shape: int, hidden: int = 0) -> torch.Tensor:
    """``[H_kv, P]`` or ``[N, H_kv, P]``, to be trained; its last ``hidden`` tokens are hidden, in three spellings."""
    bias = torch.randn(shape, dtype=torch.float64).float() * 2.0
    for i in range(hidden):
        bias[..., -1 - i] = (float("-inf"), -3.4e38, -2e37)[i % 3]
    return bias.requires_grad_()


def _segments(B: int, T: int) -> torch.Tensor:
    return (torch.arange(T) // 3).expand(B, T).contiguous()


CASES: dict[str, Callable[[], Call]] = {
    "plain": lambda: make_call(),
    "no_prefix": lambda: make_call(P=0),
    "one_prefix_token": lambda: make_call(P=1),
    "no_content": lambda: make_call(T=0, causal=False),
    "nothing_at_all": lambda: make_call(T=0, P=0, causal=False),
    "mha_one_row": lambda: make_call(H=3, H_kv=3, S=1, T=4),
    "mqa": lambda: make_call(H=8, H_kv=1, S=3),
    "batch_of_one": lambda: make_call(B=1, S=20),
    "bidirectional": lambda: make_call(causal=False, T=9),
    "with_a_cache": lambda: make_call(S=4, T=11),
    "more_rows_than_keys": lambda: make_call(S=6, T=3),
    "long_rows": lambda: make_call(B=3, S=33, P=5),
    "scale": lambda: make_call(scale=0.3),
    "scale_negative": lambda: make_call(scale=-0.5),
    "scale_zero": lambda: make_call(scale=0.0),
    "no_rows": lambda: make_call(S=0, T=4, q_start=0),
    "no_samples": lambda: make_call(B=0),
    "segments_without_content": lambda: make_call(T=0, segment_ids=torch.zeros(2, 0, dtype=torch.long)),
    "d_v_smaller": lambda: make_call(D=24, D_v=16),
    "d_v_larger": lambda: make_call(D=8, D_v=24),
    "left_padding": lambda: make_call(B=3, key_padding_mask=padding(3, 5, "left")),
    "right_padding": lambda: make_call(B=3, key_padding_mask=padding(3, 5, "right")),
    "padding_bidirectional": lambda: make_call(B=3, causal=False, key_padding_mask=padding(3, 5, "right")),
    "padding_with_a_cache": lambda: make_call(B=3, S=2, T=6, key_padding_mask=padding(3, 6, "left")),
    "padding_no_prefix": lambda: make_call(B=3, P=0, key_padding_mask=padding(3, 5, "left")),
    "a_sample_all_padding": lambda: make_call(P=0, key_padding_mask=torch.tensor([[False] * 5, [True] * 5])),
    "q_start_int": lambda: make_call(S=3, T=9, q_start=2),
    "q_start_scalar": lambda: make_call(S=1, T=9, q_start=torch.tensor(4)),
    "q_start_per_sample": lambda: make_call(S=3, T=9, q_start=torch.tensor([1, 5])),
    "q_start_before_the_keys": lambda: make_call(S=3, T=9, q_start=-2, P=0),
    "segments": lambda: make_call(S=9, segment_ids=_segments(2, 9)),
    "window": lambda: make_call(S=9, window=3),
    "window_with_a_cache": lambda: make_call(S=2, T=9, window=4),
    "softcap": lambda: make_call(softcap=2.0),
    "sinks": lambda: make_call(sinks=torch.randn(6, dtype=torch.float64).float().requires_grad_()),
    "sinks_off_in_an_empty_row": lambda: make_call(
        P=0,
        sinks=torch.full((6,), float("-inf")),
        key_padding_mask=torch.tensor([[False] * 5, [True] * 5]),
    ),
    "sinks_as_low_as_a_mask": lambda: make_call(
        P=0, sinks=torch.full((6,), -3.4e38), key_padding_mask=torch.tensor([[False] * 5, [True] * 5])
    ),
    "sinks_no_prefix": lambda: make_call(P=0, sinks=torch.randn(6, dtype=torch.float64).float()),
    "bias": lambda: make_call(bias=torch.randn(6, 5, 5)),
    "bias_bidirectional": lambda: make_call(causal=False, bias=torch.randn(2, 1, 5, 5)),
    "bias_trained": lambda: make_call(bias=torch.randn(1, 6, 5, 5).requires_grad_()),
    "bias_bool": lambda: make_call(causal=False, bias=torch.rand(2, 1, 5, 5) > 0.5),
    "bias_hides": lambda: make_call(
        bias=torch.zeros(2, 1, 1, 5).masked_fill(~padding(2, 5, "left")[:, None, None], -3e38)
    ),
    "gate": lambda: make_call(gate=torch.randn(6).requires_grad_()),
    "gate_and_padding": lambda: make_call(gate=torch.randn(6).requires_grad_(), key_padding_mask=padding(2, 5, "left")),
    "gate_of_each_row": lambda: make_call(gate=torch.randn(2, 6).requires_grad_()),
    "gate_and_softcap": lambda: make_call(gate=torch.randn(6).requires_grad_(), softcap=2.0),
    "bank": lambda: make_call(B=4, N=3, prefix_ids=torch.tensor([2, -1, 0, 2])),
    "bank_ragged": lambda: make_call(
        B=4, N=3, prefix_ids=torch.tensor([2, 1, 0, 2]), prefix_lens=torch.tensor([7, 0, 3])
    ),
    "bank_per_row": lambda: make_call(
        N=3,
        S=6,
        prefix_ids=torch.tensor([[0, 0, 1, 1, -1, 2], [2, 2, 2, -1, 0, 0]]),
        prefix_lens=torch.tensor([7, 2, 3]),
    ),
    "bank_and_padding": lambda: make_call(
        N=2,
        prefix_ids=torch.tensor([1, -1]),
        key_padding_mask=torch.tensor([[False] * 5, [False, True, True, True, True]]),
    ),
    "bank_and_gate": lambda: make_call(N=2, prefix_ids=torch.tensor([1, 0]), gate=torch.randn(6).requires_grad_()),
    "bank_packed": lambda: make_call(B=4, packed=(7, 0, 3), prefix_ids=torch.tensor([2, -1, 0, 2])),
    "bank_packed_side_by_side": lambda: make_call(
        B=7, packed=(2, 6, 6, 6, 1, 6), prefix_ids=torch.tensor([0, 1, 2, 3, -1, 4, 5])
    ),
    "bank_packed_two_samples_each": lambda: make_call(
        B=6, S=40, H_kv=3, packed=(4, 9, 4), prefix_ids=torch.tensor([0, 0, 2, 2, 1, 1], dtype=torch.int32)
    ),
    "bank_packed_per_row": lambda: make_call(
        S=6,
        packed=(7, 2, 0, 3),
        prefix_ids=torch.tensor([[0, 0, 1, 1, -1, 3], [3, 2, 3, -1, 0, 0]]),
    ),
    "bank_packed_documents": lambda: make_call(
        B=1,
        S=9,
        packed=(5, 2, 2),
        prefix_ids=torch.tensor([[1, 1, 1, 2, 2, 2, 0, 0, 0]]),
        segment_ids=_segments(1, 9),
    ),
    "bank_packed_unused": lambda: make_call(packed=(3, 4), prefix_ids=torch.tensor([-1, -1])),
    "bank_packed_empty": lambda: make_call(packed=(0, 0), prefix_ids=torch.tensor([1, 0])),
    "bank_packed_no_content": lambda: make_call(
        B=3, T=0, causal=False, packed=(3, 4), prefix_ids=torch.tensor([1, -1, 0])
    ),
    "bank_packed_decoding": lambda: make_call(B=4, S=1, T=6, packed=(5, 3, 5), prefix_ids=torch.tensor([0, 2, -1, 1])),
    "bank_packed_d_v_smaller": lambda: make_call(D=24, D_v=16, packed=(3, 3), prefix_ids=torch.tensor([0, 1])),
    "bank_packed_d_v_larger": lambda: make_call(D=8, D_v=24, packed=(3, 5), prefix_ids=torch.tensor([1, 0])),
    "bank_packed_and_padding": lambda: make_call(
        B=3, packed=(3, 2), prefix_ids=torch.tensor([1, -1, 0]), key_padding_mask=padding(3, 5, "left")
    ),
    "bank_packed_and_gate": lambda: make_call(
        packed=(3, 2), prefix_ids=torch.tensor([1, 0]), gate=torch.randn(6).requires_grad_()
    ),
    "bank_packed_and_each_row_its_gate": lambda: make_call(
        B=3, packed=(3, 2), prefix_ids=torch.tensor([1, -1, 0]), gate=torch.randn(3, 6).requires_grad_()
    ),
    "prefix_bias": lambda: make_call(prefix_bias=prefix_bias(2, 7)),
    "prefix_bias_not_trained": lambda: make_call(prefix_bias=prefix_bias(2, 7).detach()),
    "prefix_bias_long_rows": lambda: make_call(B=3, S=33, P=70, prefix_bias=prefix_bias(2, 70)),
    "prefix_bias_decoding": lambda: make_call(B=4, S=1, T=6, P=20, prefix_bias=prefix_bias(2, 20)),
    "prefix_bias_one_sample": lambda: make_call(B=1, H=2, H_kv=2, S=1, T=6, P=40, prefix_bias=prefix_bias(2, 40)),
    "prefix_bias_and_softcap": lambda: make_call(softcap=2.0, prefix_bias=prefix_bias(2, 7)),
    "prefix_bias_scale_zero": lambda: make_call(scale=0.0, prefix_bias=prefix_bias(2, 7)),
    "prefix_bias_scale_negative": lambda: make_call(scale=-0.5, prefix_bias=prefix_bias(2, 7)),
    "prefix_bias_hides": lambda: make_call(prefix_bias=prefix_bias(2, 7, hidden=3)),
    "no_key_but_what_a_prefix_bias_hides": lambda: make_call(
        T=0, causal=False, prefix_bias=prefix_bias(2, 7, hidden=7)
    ),
    "prefix_bias_and_gate": lambda: make_call(prefix_bias=prefix_bias(2, 7), gate=torch.randn(6).requires_grad_()),
    "bank_and_prefix_bias": lambda: make_call(
        B=4,
        N=3,
        prefix_ids=torch.tensor([2, -1, 0, 2]),
        prefix_lens=torch.tensor([7, 2, 3]),
        prefix_bias=prefix_bias(3, 2, 7, hidden=1),
    ),
    "bank_per_row_and_prefix_bias": lambda: make_call(
        N=3,
        S=6,
        prefix_ids=torch.tensor([[0, 0, 1, 1, -1, 2], [2, 2, 2, -1, 0, 0]]),
        prefix_bias=prefix_bias(3, 2, 7),
    ),
    "bank_packed_and_prefix_bias": lambda: make_call(
        B=4, S=40, packed=(7, 0, 3), prefix_ids=torch.tensor([2, -1, 0, 2]), prefix_bias=prefix_bias(2, 10, hidden=2)
    ),
    "bank_packed_decoding_and_prefix_bias": lambda: make_call(
        B=4, S=1, T=6, packed=(5, 3, 5), prefix_ids=torch.tensor([0, 2, -1, 1]), prefix_bias=prefix_bias(2, 13)
    ),
    "everything": lambda: make_call(
        B=3,
        S=6,
        T=10,
        scale=0.2,
        prefix_bias=prefix_bias(2, 7, hidden=2),
        key_padding_mask=padding(3, 10, "left"),
        segment_ids=_segments(3, 10),
        window=5,
        sinks=torch.randn(6).requires_grad_(),
        bias=torch.randn(6, 6, 10),
    ),
}
# What `operator_oracle.eager` writes down: one softmax, one prefix, and no row without a key.
EAGER = [
    name
    for name in CASES
    if not name.startswith(("bank", "gate", "no_", "nothing", "q_start_before", "a_sample", "padding_no", "sinks_"))
    and not name.endswith("gate")
    and name not in ("more_rows_than_keys", "bias_trained", "segments_without_content")
]
# And with a bank.
EAGER_BANKS = [
    name for name in CASES if name.startswith("bank") and not name.endswith(("gate", "empty", "no_content", "padding"))
]
# S, P, D, heads of a group, B. Each value of each axis of DESIGN section 7 appears; the product would be 5 * 5 * 5 * 3
# calls. The largest batch goes with the smallest group: a tile's rows are those of a whole group, and an interpreter
# takes its time for each tile.
ODD_SHAPES = list(zip(*(itertools.islice(itertools.cycle(x), 15) for x in (
    (1, 63, 128, 200), (0, 1, 7, 16, 129), (32, 64, 80, 128, 256), (1, 3, 8), (5, 2, 1))), strict=True))  # fmt: skip
