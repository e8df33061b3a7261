"""``kernels benchmark``: the operator against concatenation of the prefix to every sample's keys and values."""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

H, H_KV, D = 16, 4, 64


class PrefixAttentionBenchmark(Benchmark):
    seed: int = 42

    def _inputs(self, B: int, S: int, T: int, P: int) -> None:
        dtype = torch.float32 if str(self.device) == "cpu" else torch.float16
        # On a GPU the kernels run only where they are asked for by name.
        self.backend = "auto" if str(self.device) == "cpu" else "triton"

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=dtype)

        self.q, self.k, self.v = random(B, H, S, D), random(B, H_KV, T, D), random(B, H_KV, T, D)
        self.prefix_k, self.prefix_v = random(H_KV, P, D), random(H_KV, P, D)
        self.out = torch.empty_like(self.q)

    def _run(self) -> None:
        with torch.no_grad():
            self.out = self.kernel.prefix_attention(
                self.q, self.k, self.v, self.prefix_k, self.prefix_v, backend=self.backend
            )

    def _concatenated(self) -> Tensor:
        batch, _, rows, _ = self.q.shape
        keys, tokens = self.k.shape[2], self.prefix_k.shape[1]
        k, v = (
            torch.cat([shared.expand(batch, -1, -1, -1), own], 2)
            for shared, own in ((self.prefix_k, self.k), (self.prefix_v, self.v))
        )
        position = torch.arange(rows, device=self.q.device)[:, None] + keys - rows
        content = torch.arange(keys, device=self.q.device) <= position  # [S, T]
        mask = torch.nn.functional.pad(content, (tokens, 0), value=True)  # [S, P + T]
        return scaled_dot_product_attention(self.q, k, v, attn_mask=mask, enable_gqa=True)

    def setup_train(self) -> None:
        self._inputs(B=4, S=512, T=512, P=64)

    def benchmark_train(self) -> None:
        self._run()

    def verify_train(self) -> Tensor:
        return self._concatenated()

    def setup_decode(self) -> None:
        self._inputs(B=16, S=1, T=256, P=2048)

    def benchmark_decode(self) -> None:
        self._run()

    def verify_decode(self) -> Tensor:
        return self._concatenated()
