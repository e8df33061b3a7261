"""``PromptConfig`` and ``SoftPrompt``: trained input embeddings, from which the frozen model computes a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.prefixes.config import check_tokens, checked_modules
from fastprefix.prefixes.init import Init, take_length, vocabulary
from fastprefix.prefixes.modules import Modules


@dataclass
class PromptConfig:
    """A soft prompt: P trained input embeddings in front of every row (prompt tuning, Lester et al. 2021).

    In a causal model the states of the prompt's tokens do not depend on the tokens after them. The prompt therefore
    runs through the frozen model once per forward, whatever the batch size, and its keys and values become every row's
    prefix. This takes ``P + B*S`` tokens of work instead of ``B * (P + S)``, with the same loss and gradient as
    embeddings concatenated to every row. With ``labels``, the loss counts a row's first token too, which the prompt's
    last token predicts; logits are those of the row's own tokens, ``[B, S, V]``. Auxiliary losses of expert models
    count the rows' tokens only.

    Where sharing would not be exact (bidirectional models, dropout active in the frozen model, rows that outgrow a
    sliding window) the embeddings are concatenated to every row, with a warning. With a cache this raises and asks for
    ``use_cache=False``.

    Args:
        num_virtual_tokens: prompt tokens P, at least 1; default as many as the text of ``init`` has.
        init: where training starts: ``fastprefix.init.vocabulary()`` (default), ``.text(text, tokenizer)``,
            ``.token_ids(ids)`` (the model's embeddings of these tokens), ``.embeddings(x)`` or ``.normal(std)``.
        modules_to_save: modules of the model that are trained and saved with the prompt, as in :class:`PrefixConfig`.

    Raises:
        ValueError: a field is out of range; the message names the field.
    """

    num_virtual_tokens: int = None  # type: ignore[assignment]  # an int from __post_init__ on
    init: Init = field(default_factory=vocabulary)
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.init, Init):
            self.num_virtual_tokens = take_length(self.num_virtual_tokens, self.init)
        check_tokens(self.num_virtual_tokens)
        if not isinstance(self.init, Init) or self.init.keys is not None:
            expected = "what fastprefix.init.vocabulary, text, token_ids or normal return"
            raise fail("init", repr(self.init.name if isinstance(self.init, Init) else self.init), expected)
        self.modules_to_save = checked_modules(self.modules_to_save)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data; of ``init`` only the name."""
        names = None if self.modules_to_save is None else list(self.modules_to_save)
        return {"num_virtual_tokens": self.num_virtual_tokens, "init": self.init.name, "modules_to_save": names}


class Table(nn.Module):
    """The prompt's trained embeddings, fp32: a child module of the model."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding.detach().float().clone())


class SoftPrompt(nn.Module):
    """Trained embeddings ``[P, d]``. They are also in the model, so that optimisers and checkpoints find them.

    Attributes:
        config: the :class:`PromptConfig` that the prompt was made from.
        embedding: the trained parameter, fp32.
        modules_to_save: the prompt's copies of the modules that ``config.modules_to_save`` names.
    """

    def __init__(self, config: PromptConfig, embedding: Tensor) -> None:
        super().__init__()
        if embedding.dim() != 2 or embedding.shape[0] != config.num_virtual_tokens:
            raise fail("embedding", f"shape {list(embedding.shape)}", f"[P, d] with P = {config.num_virtual_tokens}")
        self.config = config
        self.table = Table(embedding)
        self.modules_to_save = Modules()

    @property
    def embedding(self) -> nn.Parameter:
        """``[P, d]``."""
        return self.table.embedding

    @property
    def num_virtual_tokens(self) -> int:
        """Prompt tokens P."""
        return self.config.num_virtual_tokens

    def forward(self) -> Tensor:
        """``[P, d]``."""
        return self.embedding


@torch.no_grad()
def start(config: PromptConfig, word_embeddings: nn.Module, vocab_size: int, dim: int, device: torch.device) -> Tensor:
    """Initial embeddings ``[P, d]`` on a device: the model's input embeddings of tokens, or random numbers."""
    given = config.init.embeddings
    if given is not None:
        if tuple(given.shape) != (config.num_virtual_tokens, dim):
            raise fail("init", f"embeddings {list(given.shape)}", f"[P, d] = {[config.num_virtual_tokens, dim]}")
        return given.to(device).float()
    if config.init.of_tokens:
        ids = config.init.tokens(config.num_virtual_tokens, vocab_size)
        return word_embeddings(ids.to(device)).float()
    return torch.randn(config.num_virtual_tokens, dim, device=device) * config.init.std
