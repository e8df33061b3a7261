"""``fastprefix.init``: initial values of a prefix, given, or made of other prefixes (see ``prefixes.arithmetic``)."""

from fastprefix.prefixes.arithmetic import average, concat, drop, slice
from fastprefix.prefixes.init import Init, embeddings, kv, labels, normal, text, token_ids, vocabulary, zero
from fastprefix.prefixes.priors import exclusion, fitted, interpolation, xavier

__all__ = [
    "Init",
    "average",
    "concat",
    "drop",
    "embeddings",
    "exclusion",
    "fitted",
    "interpolation",
    "kv",
    "labels",
    "normal",
    "slice",
    "text",
    "token_ids",
    "vocabulary",
    "xavier",
    "zero",
]
