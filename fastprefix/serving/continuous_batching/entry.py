"""The entry of continuous batching that a model with prefixes gets in place of its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from fastprefix.errors import fail
from fastprefix.hf.adapters.attached_prefixes import AttachedPrefixes
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation, require_not_patched
from fastprefix.serving.continuous_batching.manager import PrefixBatchingManager
from fastprefix.serving.continuous_batching.named_prefixes import NamedPrefixes, check_model
from fastprefix.validation import is_int


class _Entry:
    """Stands in place of a model's ``init_continuous_batching``, which all of transformers' entries call."""

    def __init__(self, installation: Installation, provider: AttachedPrefixes, max_resident: int) -> None:
        self.installation = installation
        self.prefixes = NamedPrefixes(installation, provider, max_resident)
        self.manager: PrefixBatchingManager | None = None

    @torch.no_grad()
    def __call__(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: WorkloadHints | None = None,
    ) -> PrefixBatchingManager:
        """A manager for the model."""
        model = self.installation.model
        selection = self.installation.selection
        if selection.chosen is not None or selection.shared is not None:
            raise fail("model", "one inside a block of prefix_batch or shared_prompt", "the block's end first")
        if self.manager is not None and not self.manager.released:
            raise fail("model", f"{type(model).__name__} with a manager", "one at a time: stop or destroy the other")
        config = model.generation_config if generation_config is None else generation_config
        if config.eos_token_id is None:
            config.eos_token_id = -1  # transformers' own entry does so
        batching = continuous_batching_config or ContinuousBatchingConfig()
        self.manager = PrefixBatchingManager(self.installation, self.prefixes, config, batching, workload_hints)
        return self.manager


def install(model: Any, max_resident: int) -> None:
    """See :func:`fastprefix.serving.continuous_batching.enable_continuous_batching`."""
    if not is_int(max_resident) or max_resident < 1:
        raise fail("max_resident", repr(max_resident), "an int of at least 1")
    installation = require_installation(model)
    provider = require_not_patched(installation)
    check_model(installation)
    entry = installation.model.__dict__.get("init_continuous_batching")
    if isinstance(entry, _Entry):
        entry.prefixes.max_resident = max_resident
    else:
        installation.model.__dict__["init_continuous_batching"] = _Entry(installation, provider, max_resident)
