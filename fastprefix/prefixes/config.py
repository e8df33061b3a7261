"""``PrefixConfig``: the size, parameterisation and initialisation of a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fastprefix.errors import fail
from fastprefix.prefixes.gate import GateKind, check_gate
from fastprefix.prefixes.init import Init, normal, take_length
from fastprefix.validation import is_int

PositionOffset = Literal["after_prefix", "none"]
Part = Literal["encoder", "decoder", "cross"]
PARTS: tuple[Part, ...] = ("encoder", "decoder", "cross")


class LayerShape(NamedTuple):
    """Key and value dimensions of one attention layer."""

    num_kv_heads: int  # H_kv
    head_dim: int  # D
    value_dim: int  # D_v

    @property
    def numel(self) -> int:
        """How many numbers one prefix token has in this layer."""
        return self.num_kv_heads * (self.head_dim + self.value_dim)


def check_tokens(tokens: object) -> None:
    """Raise ValueError unless ``tokens`` is a possible number of prefix tokens."""
    if not is_int(tokens) or tokens < 1:
        raise fail("num_virtual_tokens", repr(tokens), "an int of at least 1")


def _members(given: Any, name: str, expected: str) -> tuple[Any, ...]:
    """The elements of an iterable as a tuple; ValueError unless they are distinct and at least one."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise fail(name, repr(given), expected)
    members = tuple(given)
    try:
        distinct = len(set(members)) == len(members)
    except TypeError:  # elements that cannot be hashed, such as lists
        distinct = False
    if not members or not distinct:
        raise fail(name, list(members), expected)
    return members


def checked_modules(names: Any) -> tuple[str, ...] | None:
    """The names in a ``modules_to_save`` field as a tuple; ValueError where they are not names of modules."""
    if names is None:
        return None
    expected = "distinct ends of modules' names, at least one, or None"
    given = _members(names, "modules_to_save", expected)
    if not all(isinstance(name, str) and name for name in given):
        raise fail("modules_to_save", list(given), expected)
    return given


@dataclass
class PrefixConfig:
    """A trained prefix of keys and values in every attention layer (prefix tuning, Li & Liang 2021).

    Args:
        num_virtual_tokens: prefix tokens P, at least 1; default as many as ``init`` has (tokens of a text, or keys).
        prefix_projection: train ``embedding -> Linear -> tanh -> Linear`` in place of the keys and values themselves.
        encoder_hidden_size: width of that MLP; default the model's hidden size.
        init: where training starts: ``fastprefix.init.normal(std)`` (default), ``.zero()``, ``.text(text, tokenizer)``,
            ``.token_ids(ids)`` (the model's own keys and values of these tokens) or ``.kv(keys, values)``. With
            ``prefix_projection``, least squares fits the MLP's output to these keys and values.
        layers: indices of the attention layers that get a prefix, in execution order; in an encoder-decoder, within
            each part. Default all.
        position_offset: ``"after_prefix"``: content starts at position P, as in PEFT; ``"none"``: content starts at 0.
            Both are the same for a model without position ids, whose positions are fixed (patches, sounds, biases).
            In an encoder-decoder this is the decoder's content; the encoder's always starts at 0, as in the paper. The
            default is ``"after_prefix"``; a gated prefix takes ``"none"`` alone, as it is not in front of the content.
        num_frozen_tokens: leading prefix tokens that are not trained (the attention sink of Cartridges,
            arXiv:2506.06266).
        parts: for an encoder-decoder, any of ``"encoder"`` (its self-attention), ``"decoder"`` (the decoder's
            self-attention) and ``"cross"`` (the decoder's attention over the encoder's states). Each part has its own
            prefix and, with ``prefix_projection``, its own MLP; default all three. None for other models.
        gate: adds the prefix through trained gates ``[H]`` of each layer, which start at 0, in place of one softmax:
            ``o = o_content + gate * o_prefix`` (LLaMA-Adapter's zero-initialised attention, Zhang et al. 2023).
            Training starts from the model's own outputs. At 0 only the gates get gradients, and those of the keys and
            values are zero in the first step. ``"tanh"``: ``tanh(g)`` of each head, as in the authors' code;
            ``"linear"``: ``g`` of each head, as in the paper; ``"scalar"``: one ``g`` for all heads, as in PEFT.
        dropout: probability of dropping a prefix token, its key and its value, in training mode. Each layer draws its
            own tokens, once for all rows of a forward. What is left is not scaled: the softmax divides by what it sees,
            and in eval mode all tokens are read. Frozen tokens always stay.
        prefix_bias: train a number for each token and key/value head, ``[H_kv, P]`` of each layer, which is added to
            the token's scores and so says how many tokens of a text it stands for (Attention Matching,
            arXiv:2602.16284). It starts at 0 or at the ``biases`` of ``init.kv``. Frozen tokens have one, too.
        modules_to_save: names of the model's modules that are trained and saved with this prefix, such as a
            classifier's head (``["classifier"]``, ``["score"]``); as in PEFT, a name means every module whose name
            ends with it. The prefix has its own copies, which are in the model while the prefix is active and are
            among the prefix's parameters; the model's original modules do not change. None trains the prefix alone.

    Raises:
        ValueError: a field is out of range or two contradict each other; the message names the field.
    """

    num_virtual_tokens: int = None  # type: ignore[assignment]  # an int from __post_init__ on
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init: Init = field(default_factory=normal)
    layers: Sequence[int] | None = None
    position_offset: PositionOffset = None  # type: ignore[assignment]  # one of the two from __post_init__ on
    num_frozen_tokens: int = 0
    parts: Sequence[Part] | None = None
    modules_to_save: Sequence[str] | None = None
    gate: GateKind | None = None
    dropout: float = 0.0
    prefix_bias: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.init, Init):
            self.num_virtual_tokens = take_length(self.num_virtual_tokens, self.init)
        check_tokens(self.num_virtual_tokens)
        if not isinstance(self.prefix_projection, bool):
            raise fail("prefix_projection", repr(self.prefix_projection), "True or False")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise fail("encoder_hidden_size", self.encoder_hidden_size, "None, or prefix_projection=True beside it")
        if self.encoder_hidden_size is not None and not (
            is_int(self.encoder_hidden_size) and self.encoder_hidden_size > 0
        ):
            raise fail("encoder_hidden_size", repr(self.encoder_hidden_size), "an int of at least 1")
        own = ("embeddings", "labels", "prior")
        of_prompt = isinstance(self.init, Init) and any(getattr(self.init, name) is not None for name in own)
        if not isinstance(self.init, Init) or of_prompt:
            got = f"init.{self.init.name} of a soft prompt" if isinstance(self.init, Init) else repr(self.init)
            raise fail("init", got, "what fastprefix.init.normal, text, token_ids or kv return")
        dropout = self.dropout
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise fail("dropout", repr(dropout), "a number from 0 to below 1")
        if not isinstance(self.prefix_bias, bool):
            raise fail("prefix_bias", repr(self.prefix_bias), "True or False")
        if self.init.biases is not None and not self.prefix_bias:
            raise fail("prefix_bias", False, "True for an init with biases")
        if self.gate is not None:
            check_gate(self.gate)
        position_offset: PositionOffset | None = self.position_offset
        if position_offset is None:
            self.position_offset = "after_prefix" if self.gate is None else "none"
        if self.position_offset not in ("after_prefix", "none"):
            raise fail("position_offset", repr(self.position_offset), "'after_prefix' or 'none'")
        if self.gate is not None and self.position_offset != "none":
            expected = "'none' with a gate: its prefix is added to the content's output, and not in front of it"
            raise fail("position_offset", repr(self.position_offset), expected)
        frozen = self.num_frozen_tokens
        if not is_int(frozen) or not 0 <= frozen <= self.num_virtual_tokens:
            raise fail("num_frozen_tokens", repr(frozen), f"0..num_virtual_tokens = {self.num_virtual_tokens}")
        if frozen and self.prefix_projection:
            raise fail("num_frozen_tokens", frozen, "0 with prefix_projection: an MLP has no frozen rows")
        if self.layers is not None:
            expected = "distinct layer indices, at least one, or None for all"
            self.layers = _members(self.layers, "layers", expected)
            if not all(is_int(i) for i in self.layers):
                raise fail("layers", list(self.layers), expected)
        if self.parts is not None:
            expected = f"distinct ones of {list(PARTS)}, at least one, or None for all"
            given = _members((self.parts,) if isinstance(self.parts, str) else self.parts, "parts", expected)
            if not all(part in PARTS for part in given):
                raise fail("parts", list(given), expected)
            self.parts = tuple(part for part in PARTS if part in given)
        self.modules_to_save = checked_modules(self.modules_to_save)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data; of ``init`` only the name, as the initial values are not needed again.

        Fields that later versions of the file's readers may not know are left out at their defaults.
        """
        fields = {
            "num_virtual_tokens": self.num_virtual_tokens,
            "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": self.encoder_hidden_size,
            "init": self.init.name,
            "layers": None if self.layers is None else list(self.layers),
            "position_offset": self.position_offset,
            "num_frozen_tokens": self.num_frozen_tokens,
            "parts": None if self.parts is None else list(self.parts),
            "modules_to_save": None if self.modules_to_save is None else list(self.modules_to_save),
        }
        later = {"gate": self.gate, "dropout": self.dropout, "prefix_bias": self.prefix_bias}
        return {**fields, **{name: x for name, x in later.items() if x}}

    def active_layers(self, parts: Sequence[Part | None]) -> list[int]:
        """Sorted indices of the layers that get a prefix, in a model whose attention layers belong to ``parts``.

        Raises:
            ValueError: the model has no such layer, or the config names parts and the model has none.
        """
        if self.parts is not None and None in parts:
            raise fail("parts", list(self.parts), "None: the model is no encoder-decoder")
        found: list[int] = []
        for part in dict.fromkeys(parts):
            members = [i for i, other in enumerate(parts) if other == part]
            if self.parts is not None and part not in self.parts:
                continue
            for i in self.layers or ():
                if not 0 <= i < len(members):
                    where = "the model's attention layers" if part is None else f"the attention layers of {part!r}"
                    raise fail("layers", i, f"an index in 0..{len(members) - 1}, {where}")
            found += members if self.layers is None else [members[i] for i in self.layers]
        return sorted(found)
