"""``Worker``: what a worker of vLLM does, which is to write its heads of a prefix into a request's blocks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastprefix.serving.vllm.geometry import heads_of
from fastprefix.serving.vllm.naming import MARKER
from fastprefix.serving.vllm.spool import Resident

logger = logging.getLogger("vllm.fastprefix")


@dataclass(frozen=True)
class Load:
    """Prefix tokens ``start..P-1`` of a file, for a request whose tokens lie in these blocks."""

    path: str
    start: int
    tokens: int  # P
    blocks: tuple[int, ...]

    def slots(self, block_size: int) -> list[int]:
        """Where vLLM's cache has these tokens."""
        numbers = range(self.start, self.tokens)
        return [self.blocks[i // block_size] * block_size + i % block_size for i in numbers]

    def written(self, block_size: int) -> tuple[int, ...]:
        """The blocks that these tokens lie in; those before hold the same prefix, for other requests too."""
        return self.blocks[self.start // block_size : -(-self.tokens // block_size)]


class Worker:
    """The attention layers of one worker, and the prefixes that it holds in memory."""

    def __init__(self, rank: int, size: int, num_kv_heads: int, block_size: int, most_resident: int) -> None:
        self.heads = heads_of(rank, size, num_kv_heads)
        self.block_size = block_size
        self.resident = Resident(most_resident)
        self.failed: set[int] = set()

    def load(self, loads: Sequence[Load], layers: Mapping[int, Any]) -> None:
        """Write prefixes into the cache; where one cannot be read its request fails, and the engine goes on.

        Args:
            loads: the prefixes, of requests whose first step this is.
            layers: vLLM's attention layers by number.
        """
        for each in loads:
            try:
                self._write(each, layers)
            except (OSError, ValueError, RuntimeError) as error:
                logger.error("fastprefix: a request fails: %s", error)
                self.failed.update(each.written(self.block_size))

    @torch.inference_mode()
    def _write(self, load: Load, layers: Mapping[int, Any]) -> None:
        found = self.resident.get(load.path, layers, self.heads)
        slots = torch.tensor(load.slots(self.block_size), dtype=torch.long)
        for i, layer in layers.items():
            cache = layer.kv_cache
            k, v = (x[load.start :].to(cache.device) for x in found[i])  # [tokens, heads, D]
            layer.impl.do_kv_cache_update(layer, k, v, cache, slots.to(cache.device))

    def take_failed(self) -> set[int]:
        """Blocks of requests that failed since the last call."""
        found, self.failed = self.failed, set()
        return found


def attention_layers(forward_context: Mapping[str, Any]) -> dict[int, Any]:
    """The layers with a cache by their number in the model, from vLLM's layers by name.

    Raises:
        ValueError: a layer that a prefix cannot be in.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    found: dict[int, Any] = {}
    for name, layer in forward_context.items():
        if getattr(layer, "kv_cache", None) is None:
            continue
        impl = getattr(layer, "impl", None)
        if not hasattr(impl, "do_kv_cache_update"):
            raise ValueError(f"{name}: {type(layer).__name__} takes no keys and values, expected ordinary attention")
        if getattr(impl, "alibi_slopes", None) is not None:
            raise ValueError(f"{name}: its ALiBi would count a prefix's tokens as text")
        found[extract_layer_index(name)] = layer
    return found


def leave_placeholders_out_of_penalties() -> None:
    """Let repetition penalties see a request's text and not its placeholder tokens, in vLLM's first model runner."""
    from vllm.v1.worker.gpu_input_batch import InputBatch

    original = InputBatch._make_prompt_token_ids_cpu_tensor
    add = InputBatch.add_request
    if getattr(InputBatch, MARKER, False):
        return

    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        lengths = self.__dict__.setdefault("_fastprefix_lengths", {})
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        marker = (extra.get("kv_transfer_params") or {}).get(MARKER)
        lengths.pop(request.req_id, None)
        if marker is not None:
            lengths[request.req_id] = marker["tokens"]
        return add(self, request, *args, **kwargs)

    def make(self: Any) -> Any:
        tokens = original(self)
        lengths = self.__dict__.get("_fastprefix_lengths", {})
        for i, name in enumerate(self.req_ids[: len(tokens)]):
            tokens[i, : lengths.get(name, 0)] = self.vocab_size  # as rows are padded
        for name in [x for x in lengths if x not in self.req_id_to_index]:
            del lengths[name]
        return tokens

    InputBatch.add_request, InputBatch._make_prompt_token_ids_cpu_tensor = add_request, make
    setattr(InputBatch, MARKER, True)
