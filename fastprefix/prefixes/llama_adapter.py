"""``LlamaAdapterConfig`` and ``AdapterKV``: prompts that each layer's own projections make keys and values of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.prefixes.config import Part, PositionOffset, check_tokens, checked_modules
from fastprefix.prefixes.gate import Gate, GateKind, check_gate
from fastprefix.prefixes.init import Init, normal
from fastprefix.prefixes.kv import PrefixLayer
from fastprefix.validation import is_int

Projection = Callable[[Tensor], tuple[Tensor, Tensor]]  # [P, d] to [H_kv, P, D] and [H_kv, P, D_v]


@dataclass
class LlamaAdapterConfig:
    """LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): trained prompts in the top layers, behind gates at zero.

    Each of the top layers has a prompt ``[P, d]`` in place of keys and values. The layer's own frozen projections make
    keys and values of it, as they do of a token's hidden state, but without rotary positions. Every token of the
    content sees all of them in a softmax of their own: ``o = o_content + gate * o_prompt``. Training starts from the
    model's own outputs; at 0 only the gates get gradients, and those of the prompts are zero in the first step.

    Args:
        num_virtual_tokens: prompt tokens P of each layer, at least 1; the paper's 10 by default.
        num_layers: how many of the attention layers have a prompt, from the top; the paper takes 30 of 32. Default all.
        gate: ``"tanh"``: ``tanh(g)`` of each head, as in the authors' code; ``"linear"``: ``g`` of each head, as in the
            paper; ``"scalar"``: one ``g`` for all heads of a layer, which alone PEFT's ADAPTION_PROMPT can hold.
        init: where prompts start: ``fastprefix.init.normal(std)``, by default with the authors' standard deviation 1.
        modules_to_save: modules of the model that are trained and saved with the prompts, as in :class:`PrefixConfig`.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    num_virtual_tokens: int = 10
    num_layers: int | None = None
    gate: GateKind = "tanh"
    init: Init = field(default_factory=lambda: normal(1.0))
    modules_to_save: Sequence[str] | None = None

    position_offset: ClassVar[PositionOffset] = "none"
    num_frozen_tokens: ClassVar[int] = 0
    prefix_projection: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_tokens(self.num_virtual_tokens)
        if self.num_layers is not None and not (is_int(self.num_layers) and self.num_layers > 0):
            raise fail("num_layers", repr(self.num_layers), "an int of at least 1, or None for all")
        check_gate(self.gate)
        if not isinstance(self.init, Init) or self.init.name != "normal":
            got = repr(self.init.name if isinstance(self.init, Init) else self.init)
            raise fail("init", got, "what fastprefix.init.normal returns")
        self.modules_to_save = checked_modules(self.modules_to_save)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data; of ``init`` only the name, as the initial values are not needed again."""
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_layers": self.num_layers,
            "gate": self.gate,
            "init": self.init.name,
            "modules_to_save": None if self.modules_to_save is None else list(self.modules_to_save),
        }

    def active_layers(self, parts: Sequence[Part | None]) -> list[int]:
        """Indices of the layers that get a prompt, in a model whose attention layers belong to ``parts``.

        Raises:
            ValueError: the model has fewer layers, or is an encoder-decoder.
        """
        if any(part is not None for part in parts):
            raise fail("model", "an encoder-decoder", "a model of one stack of layers, whose top ones get a prompt")
        number = len(parts) if self.num_layers is None else self.num_layers
        if number > len(parts):
            raise fail("num_layers", number, f"at most {len(parts)}, the model's attention layers")
        return list(range(len(parts) - number, len(parts)))


class AdapterKV(PrefixLayer):
    """One layer's prompt ``[P, d]`` and gate; ``key_values`` are what the layer's projections make of the prompt."""

    def __init__(self, prompt: Tensor, project: Projection, gate: Gate) -> None:
        super().__init__(gate)
        self.prompt = nn.Parameter(prompt.detach().clone())
        self._project = (project,)  # in a tuple: it refers to the attention module, which holds this one

    def key_values(self) -> tuple[Tensor, Tensor]:
        """``[H_kv, P, D]`` and ``[H_kv, P, D_v]``."""
        prompt: Any = self.prompt
        # In a tensor-parallel model the projections take a whole prompt and make keys and values of their own heads.
        return self._project[0](prompt if self.placement is None else prompt.to_local())

    def extras(self) -> dict[str, Tensor]:
        """The prompt and the gate."""
        return {"prompt": self.prompt, **super().extras()}
