"""``fastprefix.init``: initial values of a prefix. See :mod:`fastprefix.prefixes.init`."""

from fastprefix.prefixes.init import Init, kv, normal, text, token_ids, vocabulary

__all__ = ["Init", "kv", "normal", "text", "token_ids", "vocabulary"]
