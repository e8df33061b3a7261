"""``FastprefixConnector``: tells vLLM's scheduler that a prefix is computed already, and workers which one to write.

vLLM makes one of these in the scheduler and one in each worker. Nothing here may raise because of a request: the front
end has checked every one, and an exception would stop the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from fastprefix.serving.vllm.limits import check_cache
from fastprefix.serving.vllm.naming import MARKER
from fastprefix.serving.vllm.worker import Load, Worker, attention_layers, leave_placeholders_out_of_penalties

MOST_RESIDENT = 32  # prefixes in a worker's memory, unless the configuration says otherwise


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler's connector tells the workers' in one step."""

    loads: list[Load] = field(default_factory=list)


class FastprefixConnector(KVConnectorBase_V1):
    """The connector's two halves, of which the role says which one is alive."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        check_cache(vllm_config, kv_cache_config)
        self._loads: list[Load] = []
        self._wanted: dict[str, int] = {}
        self._layers: dict[int, Any] | None = None
        if role == KVConnectorRole.WORKER:
            from vllm.distributed import get_tensor_model_parallel_rank

            if not vllm_config.use_v2_model_runner:
                leave_placeholders_out_of_penalties()
            self._worker = Worker(
                get_tensor_model_parallel_rank(),
                vllm_config.parallel_config.tensor_parallel_size,
                vllm_config.model_config.get_total_num_kv_heads(),
                kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
                self._kv_transfer_config.get_from_extra_config("max_resident", MOST_RESIDENT),
            )

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """The prefix's tokens that are not in the prefix cache; they are there in the same step."""
        marker = (request.kv_transfer_params or {}).get(MARKER)
        if marker is None:
            return 0, False
        missing = max(0, marker["tokens"] - num_computed_tokens)
        self._wanted[request.request_id] = missing
        return missing, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember to write what is missing into the blocks that the request was given."""
        marker = (request.kv_transfer_params or {}).get(MARKER)
        missing = self._wanted.pop(request.request_id, 0)
        if marker is None or not missing:
            return
        tokens, (ids, *_) = marker["tokens"], blocks.get_block_ids()
        if num_external_tokens != missing:  # no request can bring this about, only a vLLM that this was not written for
            got = f"{num_external_tokens} of {missing} tokens of a prefix"
            raise RuntimeError(f"fastprefix: vLLM would compute placeholder tokens: got {got}, expected all")
        self._loads.append(Load(marker["path"], tokens - missing, tokens, tuple(ids)))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """This step's loads."""
        found, self._loads = self._loads, []
        return Loads(found)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Nothing is sent anywhere: the blocks are free."""
        self._wanted.pop(request.request_id, None)
        return False, None

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Look at the layers when the server starts, so that one which cannot hold a prefix is told then."""
        self._layers = attention_layers(self._vllm_config.compilation_config.static_forward_context)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write this step's prefixes before the model runs."""
        found = self._get_connector_metadata()
        assert isinstance(found, Loads)
        if not found.loads:
            return
        if self._layers is None:
            self._layers = attention_layers(forward_context.no_compile_layers)
        self._worker.load(found.loads, self._layers)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of requests that fail because their prefix could not be read."""
        return self._worker.take_failed()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Prefixes are written before the model runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
