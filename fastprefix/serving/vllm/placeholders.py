"""Placeholder tokens and cache salts, by which vLLM tells a prefix's blocks from all others.

vLLM finds a block of its prefix cache by a hash of the tokens up to the block's end, and of a salt. Were all prefixes
represented by the same tokens, requests would get the blocks of another prefix. Both the tokens and the salt are
therefore made from a digest of the prefix's numbers: a prefix that is trained again under its old name is another
prefix.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_BYTES = 8  # of randomness for each token: the remainder by a vocabulary's size is then as good as uniform


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 over names, dtypes, shapes and bytes of a prefix's tensors, in hexadecimal digits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        found.update(f"{name} {x.dtype} {list(x.shape)};".encode())
        found.update(x.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def alphabet(vocab_size: int, special: Iterable[int] = ()) -> list[int]:
    """The token ids that placeholders are spelt with: all but the special ones, by which engines recognise the parts of
    a text (where reasoning begins, for example)."""
    without = set(special)
    return [i for i in range(vocab_size) if i not in without] or list(range(vocab_size))


def spell(digest: str, tokens: int, letters: Sequence[int]) -> list[int]:
    """The ``tokens`` placeholder ids of a digest: always the same, and others for any other digest."""
    stream = hashlib.shake_256(digest.encode()).digest(tokens * _BYTES)
    numbers = (int.from_bytes(stream[i : i + _BYTES], "little") for i in range(0, len(stream), _BYTES))
    return [letters[number % len(letters)] for number in numbers]


class Salt:
    """Salts of a server's prefixes.

    They begin with a secret that is drawn when the server starts. A client can name any tokens and any salt, and a
    request that used a prefix's without reading the prefix would fill the cache with keys and values of the tokens
    themselves.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_hex(16)

    def of(self, digest: str, given: str | None = None) -> str:
        """The salt of requests that read a prefix; ``given``: the client's own, which keeps caches of clients apart."""
        return f"fastprefix/{self._secret}/{digest}/{given or ''}"

    def once(self, digest: str) -> str:
        """A salt that no other request has: this one finds nothing in the cache."""
        return f"{self.of(digest)}/{secrets.token_hex(16)}"
