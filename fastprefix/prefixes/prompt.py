"""``PromptConfig`` and ``SoftPrompt``: trained input embeddings, from which the frozen model computes a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.prefixes import priors
from fastprefix.prefixes.config import check_tokens, checked_modules
from fastprefix.prefixes.encoders.prompt_encoder import ENCODER_KINDS, EncoderKind, PromptEncoder
from fastprefix.prefixes.init import Init, normal, take_length, vocabulary
from fastprefix.prefixes.modules import Modules
from fastprefix.validation import is_int

Place = Literal["before", "after"] | int  # of a soft prompt in a row's text; an int is the id of a marker token


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
    ``use_cache=False``. In an encoder-decoder the prompt is in front of the encoder's rows and runs with each of them.
    The decoder attends to its states too, as in the paper, which used T5; the decoder's cache holds no prompt.

    With another ``place`` than ``"before"``, what the prompt's tokens compute depends on the row in front of them. The
    prompt then runs with every row, which takes ``B * (P + S)`` tokens of work, and stays in the row's cache. Logits
    and hidden states are those of the row's own tokens, ``[B, S, ...]``, but for one place: the prompt's last token
    predicts the text after the prompt, and its state stands at the marker, or at the last token before the prompt.

    Args:
        num_virtual_tokens: prompt tokens P, at least 1; default as many as ``init`` has (tokens of a text,
            labels, or embeddings).
        init: where training starts: ``fastprefix.init.vocabulary()`` (default), ``.text(text, tokenizer)``,
            ``.token_ids(ids)`` (the model's embeddings of these tokens), ``.labels(labels, tokenizer)`` (those of a
            task's classes), ``.embeddings(x)``, ``.normal(std)``, or one of the priors ``.xavier()``, ``.fitted()``,
            ``.exclusion(ratio)`` and ``.interpolation()``. With an ``encoder`` the default is ``.normal()``: a
            random encoder, whatever its ``std``, as in PEFT. With any other ``init``, least squares fits the encoder's
            last layer, so that its output starts at these embeddings.
        modules_to_save: modules of the model that are trained and saved with the prompt, as in :class:`PrefixConfig`.
        encoder: ``"mlp"`` or ``"lstm"`` trains a network whose output is the prompt, in place of the prompt itself
            (P-tuning, Liu et al. 2021): embeddings ``[P, d]`` through three linear layers with ReLU between them, or
            through a bidirectional LSTM and two linear layers. It runs once per forward.
            :func:`fastprefix.bake` replaces it by its output. ``torch.vmap`` has no rule for an LSTM, and raises.
        encoder_hidden_size: width of the encoder's hidden layers; default the model's hidden size.
        encoder_num_layers: layers of the LSTM. The MLP's number is fixed.
        encoder_dropout: dropout between the LSTM's layers in training, drawn once per forward for all rows (PEFT draws
            it for each row). Saved and baked embeddings are those without dropout.
        place: where the prompt stands, for models that read text from left to right. ``"before"``: in front of the
            row. ``"after"``: between the given text and the new tokens, which is in front of a row's first labelled
            token (label not -100) where there are labels, and after its last token that is not padding elsewhere, so
            that ``generate`` goes on from the prompt. An int is the id of a marker token, which every row has exactly
            once and which the prompt replaces; its label does not count, and its id needs no place in the embedding
            table.

    Raises:
        ValueError: a field is out of range or two contradict each other; the message names the field.
    """

    num_virtual_tokens: int = None  # type: ignore[assignment]  # an int from __post_init__ on
    init: Init = None  # type: ignore[assignment]  # an Init from __post_init__ on
    modules_to_save: Sequence[str] | None = None
    encoder: EncoderKind | None = None
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    place: Place = "before"

    def __post_init__(self) -> None:
        given: Init | None = self.init
        if given is None:
            self.init = vocabulary() if self.encoder is None else normal()
        if isinstance(self.init, Init):
            self.num_virtual_tokens = take_length(self.num_virtual_tokens, self.init)
        check_tokens(self.num_virtual_tokens)
        if not isinstance(self.init, Init) or self.init.keys is not None or self.init.zero_values:
            expected = "what fastprefix.init.vocabulary, text, token_ids, labels, normal or a prior's function return"
            raise fail("init", repr(self.init.name if isinstance(self.init, Init) else self.init), expected)
        self.modules_to_save = checked_modules(self.modules_to_save)
        if self.place not in ("before", "after") and not (is_int(self.place) and int(self.place) >= 0):
            raise fail("place", repr(self.place), "'before', 'after' or the id of a marker token")
        self._check_encoder()

    def _check_encoder(self) -> None:
        if self.encoder is not None and self.encoder not in ENCODER_KINDS:
            raise fail("encoder", repr(self.encoder), "'mlp', 'lstm' or None")
        hidden, layers, dropout = self.encoder_hidden_size, self.encoder_num_layers, self.encoder_dropout
        if hidden is not None and self.encoder is None:
            raise fail("encoder_hidden_size", hidden, "None, or an encoder beside it")
        if hidden is not None and not (is_int(hidden) and hidden > 0):
            raise fail("encoder_hidden_size", repr(hidden), "an int of at least 1")
        if not is_int(layers) or layers < 1:
            raise fail("encoder_num_layers", repr(layers), "an int of at least 1")
        if layers != 2 and self.encoder != "lstm":
            raise fail("encoder_num_layers", layers, "2, or encoder='lstm' beside it")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise fail("encoder_dropout", repr(dropout), "a number from 0 to below 1")
        if dropout and (self.encoder != "lstm" or layers == 1):
            raise fail("encoder_dropout", dropout, "0.0, or an LSTM of several layers, between which it is applied")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data; of ``init`` only the name; those of the encoder and the place where given."""
        names = None if self.modules_to_save is None else list(self.modules_to_save)
        fields = {"num_virtual_tokens": self.num_virtual_tokens, "init": self.init.name, "modules_to_save": names}
        if self.place != "before":
            fields["place"] = self.place
        if self.encoder is None:
            return fields
        return {
            **fields,
            "encoder": self.encoder,
            "encoder_hidden_size": self.encoder_hidden_size,
            "encoder_num_layers": self.encoder_num_layers,
            "encoder_dropout": self.encoder_dropout,
        }

    def new_encoder(self, token_dim: int) -> PromptEncoder:
        """A new random encoder for prompts of a model whose embeddings have ``token_dim`` numbers."""
        assert self.encoder is not None
        hidden = self.encoder_hidden_size or token_dim
        sizes = self.num_virtual_tokens, token_dim, hidden, self.encoder_num_layers
        return PromptEncoder(self.encoder, *sizes, float(self.encoder_dropout))


class Table(nn.Module):
    """A prompt's embeddings where they are trained themselves: a child module of the model."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding.detach().clone())


class SoftPrompt(nn.Module):
    """P input embeddings, trained themselves or through an encoder; calling the prompt returns them, ``[P, d]``.

    The parameters are also in the model, so that optimisers and checkpoints find them.

    Attributes:
        config: the :class:`PromptConfig` that the prompt was made from.
        embedding: the trained parameter ``[P, d]``, fp32: the prompt itself or, with an encoder, the encoder's input.
        encoder: the :class:`PromptEncoder`, or None where the embeddings are trained themselves.
        modules_to_save: the prompt's copies of the modules that ``config.modules_to_save`` names.
    """

    def __init__(self, config: PromptConfig, start: Tensor | PromptEncoder) -> None:
        super().__init__()
        self.config = config
        self.table: Table | PromptEncoder
        if isinstance(start, PromptEncoder):
            self.table = start
        else:
            self.set_direct(start.float())
        self.modules_to_save = Modules()

    def set_direct(self, embedding: Tensor) -> None:
        """Make these embeddings ``[P, d]`` the parameter, without an encoder."""
        tokens = self.config.num_virtual_tokens
        if embedding.dim() != 2 or embedding.shape[0] != tokens:
            raise fail("embedding", f"shape {list(embedding.shape)}", f"[P, d] with P = {tokens}")
        self.table = Table(embedding)

    @property
    def embedding(self) -> nn.Parameter:
        """``[P, d]``."""
        return self.table.embedding.weight if isinstance(self.table, PromptEncoder) else self.table.embedding

    @property
    def encoder(self) -> PromptEncoder | None:
        """The network whose output is the prompt, if there is one."""
        return self.table if isinstance(self.table, PromptEncoder) else None

    @property
    def num_virtual_tokens(self) -> int:
        """Prompt tokens P."""
        return self.config.num_virtual_tokens

    def forward(self) -> Tensor:
        """``[P, d]``."""
        return self.embedding if self.encoder is None else self.encoder()

    def without_dropout(self) -> Tensor:
        """The embeddings ``[P, d]`` as the prompt has them in eval mode, without a gradient."""
        return self.embedding.detach() if self.encoder is None else self.encoder.without_dropout()


@torch.no_grad()
def start(config: PromptConfig, word_embeddings: nn.Module, vocab_size: int, dim: int, device: torch.device) -> Tensor:
    """Initial embeddings ``[P, d]`` on a device: the model's input embeddings of tokens, or random numbers."""
    given = config.init.embeddings
    if given is not None:
        if tuple(given.shape) != (config.num_virtual_tokens, dim):
            raise fail("init", f"embeddings {list(given.shape)}", f"[P, d] = {[config.num_virtual_tokens, dim]}")
        return given.to(device).float()
    if config.init.labels is not None:
        groups = config.init.labels[: config.num_virtual_tokens]
        found = [word_embeddings(torch.tensor(ids, device=device)).float().mean(0) for ids in groups]
        rest = config.init.tokens(config.num_virtual_tokens - len(found), vocab_size)
        return torch.cat([torch.stack(found), word_embeddings(rest.to(device)).float()])
    if config.init.prior is not None:

        def embed(ids: Tensor) -> Tensor:
            return word_embeddings(ids)

        size = min(vocab_size, getattr(word_embeddings, "num_embeddings", vocab_size))
        return priors.draw(config.init, config.num_virtual_tokens, dim, embed, size, device)
    if config.init.of_tokens:
        ids = config.init.tokens(config.num_virtual_tokens, vocab_size)
        return word_embeddings(ids.to(device)).float()
    return torch.randn(config.num_virtual_tokens, dim, device=device) * config.init.std
