"""Requests that hold their prefix, and results without placeholders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import RequestState

from fastprefix.serving.continuous_batching.paged_prefix import PagedPrefix, count_placeholders


@dataclass
class PrefixRequest(RequestState):
    """A request whose ``initial_tokens`` begin with the placeholders of ``prefix``, if it has one."""

    prefix: PagedPrefix | None = None

    def create_equivalent_initial_request(self) -> PrefixRequest:
        """The request that starts anew, with what was generated as part of its tokens."""
        made = super().create_equivalent_initial_request()
        fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(RequestState) if field.init}
        return PrefixRequest(**fields, prefix=self.prefix)


class RealTokens(OutputRouter):
    """Delivers results whose ``prompt_ids`` are those that were asked for."""

    def deliver(self, output: Any) -> None:
        """Deliver one result."""
        super().deliver(_without_placeholders(output))

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Deliver several results."""
        super().deliver_batch([_without_placeholders(output) for output in outputs])


def _without_placeholders(output: Any) -> Any:
    output.prompt_ids = output.prompt_ids[count_placeholders(output.prompt_ids) :]
    return output
