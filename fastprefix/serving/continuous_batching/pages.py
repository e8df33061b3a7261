"""``PrefixPages``: gives requests the pages of their prefixes, where the engine looks for shared pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.continuous_batching.utils import stream_context

from fastprefix.serving.continuous_batching.paged_prefix import PagedPrefix, count_placeholders

Find = Callable[[tuple[int, ...]], PagedPrefix | None]


class PrefixPages:
    """Stands in front of two methods of one paged cache of full attention.

    The engine calls ``search_prefix_match`` once for a request that has no pages: a new one, or one that starts anew.
    It gets as answer how many of the request's tokens need not be computed. Where that fails for want of pages, the
    request's tokens begin with placeholders still, and ``can_store_request_tokens`` says that it does not fit. The
    engine then makes room as it does for any request.
    """

    def __init__(self, cache: Any, find: Find, stream: Any) -> None:
        self.cache, self.find, self.stream = cache, find, stream
        (self.allocator,) = cache.cache_allocators.values()
        self.search, self.can_store = cache.search_prefix_match, cache.can_store_request_tokens
        self.written = 0  # tokens of prefixes that were written into pages, for tests and measurements
        cache.search_prefix_match = self.search_prefix_match
        cache.can_store_request_tokens = self.can_store_request_tokens

    @property
    def capacity(self) -> int:
        """Tokens that all pages together hold."""
        return int(self.allocator.num_blocks * self.allocator.tokens_per_page)

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """How many of a request's first tokens are in pages, which are the request's from now on."""
        tokens = count_placeholders(prompt_ids)
        if not tokens:
            return int(self.search(request_id, prompt_ids))
        prefix = self.find(tuple(prompt_ids[:tokens]))
        if prefix is None:  # of a request that nobody waits for: it was cancelled, and is dropped in a moment
            return 0
        matched = int(self.search(request_id, prompt_ids))
        if matched >= tokens:
            return matched
        if not self._extend(request_id, matched, tokens):
            self.cache.free_blocks(request_id)  # those that were matched
            return 0
        self._write(request_id, prefix, matched)
        page = self.allocator.tokens_per_page
        self.allocator.mark_complete_blocks(request_id, prompt_ids[:tokens], tokens // page - matched // page)
        return tokens

    def can_store_request_tokens(self, state: Any, request_len: int, dry_run: bool = False) -> bool:
        """Whether a request's next tokens fit, as in the cache itself."""
        if state.remaining_prefill_tokens and state.remaining_prefill_tokens[0] < 0:
            return False
        return bool(self.can_store(state, request_len, dry_run))

    def _extend(self, request_id: str, matched: int, tokens: int) -> bool:
        """Give a request pages for tokens after those that were matched; without room False, and nothing changes."""
        sectors = self.allocator.needs_new_sectors(request_id, matched, tokens - matched)
        if sectors > self.cache.pool.num_free_sectors:
            return False
        for _ in range(sectors):
            self.cache.pool.allocate_sector(self.allocator.index)
        self.allocator.allocate_cache_to_request(request_id, matched, tokens - matched)
        return True

    @torch.no_grad()
    def _write(self, request_id: str, prefix: PagedPrefix, first: int) -> None:
        """Write a prefix's tokens from ``first`` on into the request's pages."""
        places = self.allocator.get_write_indices(request_id, first, len(prefix) - first)
        self.written += len(places)
        with stream_context(self.stream):
            where = torch.tensor(places, device=self.cache.device)
            nothing = where[:0]  # to be read back
            for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                self.allocator.update(k[first:], v[first:], layer, nothing, where)
