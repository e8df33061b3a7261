"""``PrefixBatchingManager``: transformers' manager of continuous batching, whose requests name prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import WorkloadHints

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.runtime.forward_context import Name
from fastprefix.serving.continuous_batching.named_prefixes import NamedPrefixes
from fastprefix.serving.continuous_batching.paged_prefix import PagedPrefix
from fastprefix.serving.continuous_batching.pages import PrefixPages
from fastprefix.serving.continuous_batching.requests import PrefixRequest, RealTokens

ACTIVE: Any = object()  # of an argument ``prefix``: the one that was active when the engine was made


class PrefixBatchingManager(ContinuousBatchingManager):
    """The manager of a model with prefixes, as ``model.continuous_batching_context_manager()`` gives it.

    The model has no active prefix while there is a manager; :meth:`stop` makes the former one active again.
    """

    batch_processor: Any

    def __init__(
        self,
        installation: Installation,
        prefixes: NamedPrefixes,
        generation_config: GenerationConfig,
        config: ContinuousBatchingConfig,
        hints: WorkloadHints | None,
    ) -> None:
        self.installation, self.prefixes = installation, prefixes
        if config.allow_block_sharing is False:
            raise fail("allow_block_sharing", False, "True or None: requests share the pages of their prefix")
        self.active: str | None = installation.selection.active
        self.released = False
        self.pages: PrefixPages | None = None
        default = None if self.active is None else prefixes.get(self.active)  # an error comes before any change
        if hints is not None and default is not None:
            hints = replace(hints, max_prompt_length=hints.max_prompt_length + len(default))
        with installation.lock.hold():
            installation.activate(None)
        self._guard = installation.model.register_forward_pre_hook(self._refuse_outside, with_kwargs=True)
        try:
            super().__init__(installation.model, generation_config, config, hints)
            self.output_router = RealTokens()
        except BaseException:
            self._release()
            raise

    def _refuse_outside(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise RuntimeError for a forward that is not the engine's and would read the active prefix without it."""
        if self.active is not None and kwargs.get("cache") is None:
            raise RuntimeError(
                f"fastprefix: {type(module).__name__} runs in continuous batching, and a forward outside of it would "
                f"be without the prefix {self.active!r}: stop the engine first, or set_prefix(model, None) before it"
            )

    def _release(self) -> None:
        """Make the former prefix active again."""
        self._guard.remove()
        self.released = True
        selection = self.installation.selection
        if self.active is not None and selection.active is None and self.active in selection.provider.names():
            with self.installation.lock.hold():
                self.installation.activate(self.active)
        self.active = None

    def start(self) -> None:
        """Start the engine's thread."""
        self._made()
        super().start()

    def _made(self) -> PrefixPages:
        """The pages, after the cache was made; in the caller's thread, as the engine's would only log an error."""
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        assert self.pages is not None
        return self.pages

    def _create_batch_processor(self) -> Any:
        try:
            processor = super()._create_batch_processor()
            cache = processor.cache
            if self.pages is None or self.pages.cache is not cache:
                if list(cache.cache_allocators) != [FULL_ATTENTION] or not cache.use_prefix_sharing:
                    kinds = " and ".join(cache.cache_allocators)
                    raise fail("model", f"{type(self.model).__name__} with pages of {kinds}", f"{FULL_ATTENTION} alone")
                self.pages = PrefixPages(cache, self.prefixes.find, processor.inputs_and_outputs.compute_stream)
        except BaseException:
            self._release()  # nobody stops a manager that was not started
            raise
        return processor

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Stop the engine, and make the former prefix active again.

        Raises:
            ValueError: the manager is to be kept for later (``persistent_manager``); it is stopped nevertheless.
        """
        super().stop(block=block, timeout=timeout, hard_stop=hard_stop)
        self._release()
        if keep_for_next_session:
            raise fail("persistent_manager", True, "False: while a manager is kept, the model would have no prefix")

    def destroy(self) -> None:
        """Stop the engine, if it runs, and release what it holds."""
        super().destroy()
        if not self.released:
            self._release()

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        prefix: Name | None = ACTIVE,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """Add a request to the engine's queue, as in transformers.

        Args:
            input_ids: the request's own tokens, at least one.
            prefix: name of the prefix to read, or a tuple of names; None for the bare model. Default: the one that was
                active when the engine was made, if any.

        Returns:
            The request's id; None if the engine has stopped.

        Raises:
            ValueError: there is no prefix of this name, or it is of a kind that pages cannot hold; a token is none of
                the vocabulary's; or the request cannot be in the cache even alone.
        """
        config, held = self.generation_config, self._held(prefix)
        tokens = self._checked(input_ids, held, max_new_tokens)
        if self.background_thread_status.can_accept_new_requests() is not None:
            return None
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        state = PrefixRequest(
            request_id=request_id,
            initial_tokens=tokens,
            num_children=self.num_return_sequences - 1,
            record_timestamps=record_timestamps,
            max_new_tokens=config.max_new_tokens if max_new_tokens is None else max_new_tokens,
            eos_token_id=config.eos_token_id if eos_token_id is None else eos_token_id,
            streaming=streaming,
            logit_processor_kwargs=logit_processor_kwargs,
            prefix=held,
        )
        self.input_queue.put(state, block=True, timeout=10)
        self._wake_up_loop.set()
        return request_id

    def _held(self, name: Name | None) -> PagedPrefix | None:
        """The prefix of a request's argument ``prefix``."""
        name = self.active if name is ACTIVE else name
        return None if name is None else self.prefixes.get(name)

    def _checked(self, input_ids: Sequence[int], prefix: PagedPrefix | None, limit: int | None) -> list[int]:
        """The tokens of a request with the placeholders of its prefix in front."""
        limit = self.generation_config.max_new_tokens if limit is None else limit
        own = [int(token) for token in input_ids]
        size = int(self.model.config.get_text_config().vocab_size)
        wrong = [token for token in own if not 0 <= token < size]
        if wrong or not own:
            got = f"{wrong[0]}" if wrong else "no tokens"
            raise fail("input_ids", got, f"at least one token, each from 0 to {size - 1}")
        tokens = [*(prefix.ids if prefix is not None else ()), *own]
        pages, new = self._made(), limit or 0
        if len(tokens) + new > pages.capacity:
            in_front = 0 if prefix is None else len(prefix)
            got = f"{in_front} tokens of a prefix, {len(own)} of a text and {new} new ones"
            raise fail("input_ids", got, f"at most {pages.capacity} together, the size of the cache (num_blocks)")
        return tokens

    def generate(
        self,
        inputs: Sequence[Sequence[int]],
        prefixes: Sequence[Name | None] | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Any]:
        """Generate for several prompts, each with its own prefix.

        Nothing else may take results from this manager meanwhile.

        Args:
            inputs: token ids of each prompt.
            prefixes: the name of each prompt's prefix, or a tuple of names; None for the bare model. Default: for all
                prompts the prefix that was active when the engine was made.
            max_new_tokens: of each prompt; default that of the generation config.

        Returns:
            transformers' ``GenerationOutput`` of each prompt, in order; with ``num_return_sequences`` n, n of each.

        Raises:
            ValueError: as :meth:`add_request`; no prompt is started then.
            RuntimeError: a request failed, or the engine's thread ended.
        """
        names: list[Any] = [ACTIVE] * len(inputs) if prefixes is None else list(prefixes)
        if len(names) != len(inputs):
            raise fail("prefixes", f"{len(names)} names", f"one for each of {len(inputs)} prompts")
        for ids, name in zip(inputs, names, strict=True):  # all of them, before any is started
            chosen = self.active if name is ACTIVE else name
            held = None if chosen is None else self.prefixes.get(chosen)
            self._checked(
                ids, held, self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
            )
        wanted: list[str] = []
        for ids, name in zip(inputs, names, strict=True):
            request = self.add_request(ids, max_new_tokens=max_new_tokens, prefix=name)
            if request is None:
                raise RuntimeError("fastprefix: the engine's thread has ended") from self._fatal_error()
            children = [f"{request}__child#{i}" for i in range(self.num_return_sequences - 1)]
            wanted += [request, *children]
        found: dict[str, Any] = {}
        while len(found) < len(wanted):
            result = self.get_result(timeout=0.5)
            if result is None and not self.is_running():
                raise RuntimeError("fastprefix: the engine's thread has ended") from self._fatal_error()
            if result is not None and result.error is not None:
                raise RuntimeError(f"fastprefix: request {result.request_id} failed: {result.error}")
            if result is not None and result.is_finished() and result.request_id in wanted:
                found[result.request_id] = result
        return [found[name] for name in wanted]

    def _fatal_error(self) -> BaseException | None:
        error: BaseException | None = self.background_thread_status.fatal_error
        return error
