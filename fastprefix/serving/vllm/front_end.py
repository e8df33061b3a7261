"""``FrontEnd``: gives requests their prefix before they reach the engine, and takes the placeholders out of what comes
back.

It stands between the parts of vLLM's front end. Its input processor and output processor know a request's text alone;
the engine gets a copy with the placeholder tokens in front.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastprefix.errors import fail
from fastprefix.serving.vllm import limits
from fastprefix.serving.vllm.adapters import AdapterFolder, Entry
from fastprefix.serving.vllm.naming import MARKER, named_in
from fastprefix.serving.vllm.placeholders import Salt, alphabet, spell
from fastprefix.serving.vllm.spool import Spool

CONNECTOR = "FastprefixConnector"


class FrontEnd:
    """One front end's adapters, and the requests with a prefix that are under way."""

    def __init__(self, vllm_config: Any) -> None:
        limits.check(vllm_config)
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        folder = extra("adapters", None)
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise fail(
                "kv_connector_extra_config: adapters", repr(folder), "a folder that holds a folder for each adapter"
            )
        most = extra("max_resident", 1)
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise fail("kv_connector_extra_config: max_resident", repr(most), "an int of at least 1")
        spool = extra("spool", None)
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.second_runner = bool(vllm_config.use_v2_model_runner)
        self.spool = Spool(None if spool is None else Path(spool))
        self.adapters = AdapterFolder(Path(folder).absolute(), limits.geometry(vllm_config), self.spool)
        self.vocab_size: int = vllm_config.model_config.get_vocab_size()
        self.letters = alphabet(self.vocab_size)
        self.salt = Salt()
        self.lengths: dict[str, int] = {}  # prefix tokens P of requests under way

    def avoid(self, special: Sequence[int]) -> None:
        """Spell placeholders without the tokenizer's special tokens; called before the first request."""
        self.letters = alphabet(self.vocab_size, special)

    # Before the engine.

    def mark(
        self, process: Callable[..., Any], client_error: Callable[[ValueError], Exception] = lambda error: error
    ) -> Callable[..., Any]:
        """vLLM's ``InputProcessor.process_inputs``, for requests that may name a prefix.

        Args:
            process: the original.
            client_error: what to raise for a request that names a prefix and cannot have it.
        """

        def process_inputs(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            extra = getattr(params, "extra_args", None)
            try:
                name = named_in(extra)
                entry = None if name is None else self.adapters.get(name)
                if entry is not None:
                    self.check_params(entry, params, resumable=bool(kwargs.get("resumable")))
            except ValueError as error:
                raise client_error(error) from error
            request = process(request_id, prompt, params, *args, **kwargs)
            if entry is not None:
                try:
                    self._check_request(entry, request)
                except ValueError as error:
                    raise client_error(error) from error
            if entry is not None or MARKER in ((extra or {}).get("kv_transfer_params") or {}):
                request.sampling_params = self._marked(request, entry)
            return request

        return process_inputs

    def check_params(self, entry: Entry, params: Any, resumable: bool = False) -> None:
        """Raise ValueError for parameters that would count placeholder tokens as text."""
        if not hasattr(params, "max_tokens"):
            raise fail("prefix", f"{entry.name!r} in a request that generates nothing", "one that generates")
        if resumable:
            raise fail("prefix", f"{entry.name!r} for a prompt that arrives in parts", "a whole prompt")
        refused = {
            "prompt_logprobs": params.prompt_logprobs is not None,
            "repetition_penalty": params.repetition_penalty != 1.0,
        }
        for name, given in refused.items():
            if given and self.second_runner:
                raise fail(
                    name, repr(getattr(params, name)), "none with a prefix: vLLM's second model runner would count it"
                )
        for name in ("trace_decode_token_ids", "prompt_logprob_token_ids", "prompt_logprob_start"):
            if getattr(params, name, None):
                raise fail(name, "some", "none with a prefix: its rows are counted from a prompt's first token")

    def _check_request(self, entry: Entry, request: Any) -> None:
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise fail("prompt", "embeddings", f"text or token ids with the prefix {entry.name!r}")
        if request.mm_features:
            raise fail("prompt", "images or sounds", f"text alone with the prefix {entry.name!r}")
        text, room = len(request.prompt_token_ids), self.max_model_len - entry.tokens
        if text >= room:
            got = f"{text} tokens after the {entry.tokens} of the prefix {entry.name!r}"
            raise fail("prompt", got, f"at most {max(room - 1, 0)}, as max_model_len is {self.max_model_len}")
        params = request.sampling_params
        if text + params.max_tokens > room:
            # vLLM fills up to its maximum where a request gives none.
            if text + params.max_tokens != self.max_model_len:
                got = f"{params.max_tokens} after {text} tokens and the {entry.tokens} of the prefix {entry.name!r}"
                raise fail("max_tokens", got, f"at most {room - text}, as max_model_len is {self.max_model_len}")
            if params.min_tokens > room - text:
                raise fail("min_tokens", params.min_tokens, f"at most {room - text} with the prefix {entry.name!r}")

    def _marked(self, request: Any, entry: Entry | None) -> Any:
        """A copy of its parameters that tells the connector which prefix to write; None removes what a client put
        there."""
        params = request.sampling_params
        found = copy.copy(params)
        transfer = dict((params.extra_args or {}).get("kv_transfer_params") or {})
        transfer.pop(MARKER, None)
        if entry is not None:
            transfer[MARKER] = {"digest": entry.digest, "tokens": entry.tokens, "path": entry.path}
            found.max_tokens = min(found.max_tokens, self.max_model_len - entry.tokens - len(request.prompt_token_ids))
        found.extra_args = {**(params.extra_args or {}), "kv_transfer_params": transfer}
        return found

    def with_placeholders(self, request: Any) -> Any:
        """The request as the engine gets it."""
        params = request.sampling_params
        marker = ((getattr(params, "extra_args", None) or {}).get("kv_transfer_params") or {}).get(MARKER)
        if marker is None:
            return request
        digest, tokens = marker["digest"], marker["tokens"]
        found = copy.copy(request)
        found.prompt_token_ids = [*spell(digest, tokens, self.letters), *request.prompt_token_ids]
        found.cache_salt = self.salt.of(digest, request.cache_salt)
        if params.skip_reading_prefix_cache:
            # As with prompt_logprobs. vLLM would pass over the connector too; a salt of its own does what is meant.
            found.sampling_params = copy.copy(params)
            found.sampling_params.skip_reading_prefix_cache = False
            found.cache_salt = self.salt.once(digest)
        self.lengths[request.request_id] = tokens
        return found

    # After the engine.

    def forget_aborted(self, alive: Any) -> None:
        """Drop requests that ended without an output; ``alive``: those that have not ended, by id."""
        if len(self.lengths) > len(alive) + 1024:
            self.lengths = {name: tokens for name, tokens in self.lengths.items() if name in alive}

    def without_placeholders(self, outputs: Sequence[Any]) -> None:
        """Take placeholder tokens out of the engine's outputs."""
        for output in outputs:
            tokens = self.lengths.get(output.request_id)
            if tokens is None:
                continue
            if output.finish_reason is not None:
                del self.lengths[output.request_id]
            if (found := output.new_prompt_logprobs_tensors) is not None:
                rows = ("logprob_token_ids", "logprobs", "selected_token_ranks")
                output.new_prompt_logprobs_tensors = found._replace(**{n: getattr(found, n)[tokens:] for n in rows})
            if (stats := output.prefill_stats) is not None:
                stats.num_prompt_tokens -= tokens
                external = min(tokens, stats.num_external_cached_tokens)
                stats.num_external_cached_tokens -= external
                stats.num_local_cached_tokens = max(0, stats.num_local_cached_tokens - (tokens - external))
                stats.num_cached_tokens = max(0, stats.num_cached_tokens - tokens)
