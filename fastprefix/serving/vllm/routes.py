"""The OpenAI server's routes: a prefix's name as ``model``, 404 for a name that is not there, and the list of
models."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastprefix.errors import fail
from fastprefix.serving.vllm.front_end import FrontEnd
from fastprefix.serving.vllm.naming import ARGUMENT, UnknownPrefix, current

ATTRIBUTE = "fastprefix_front_end"

_patched = False


def patch_routes() -> None:
    """Patch the classes of vLLM's server, once in a process; servers whose engine has no front end stay as they are."""
    global _patched
    if _patched:
        return
    _patched = True
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    for serving, name in (
        (OpenAIServingCompletion, "create_completion"),
        (OpenAIServingChat, "create_chat_completion"),
    ):
        setattr(serving, name, _with_prefix(getattr(serving, name)))
    BaseServing._is_model_supported = _accept_named(BaseServing._is_model_supported)
    OpenAIServingModels.show_available_models = _list_prefixes(OpenAIServingModels.show_available_models)
    OpenAIServingModels.model_name = _report_named(OpenAIServingModels.model_name)


def name_of(request: Any, models: Any, front_end: FrontEnd) -> str | None:
    """The prefix that a request names, by its extra argument or as its model; None for the bare model or a LoRA.

    Raises:
        ValueError: the argument is no text, or argument and model name two prefixes.
    """
    name = (request.vllm_xargs or {}).get(ARGUMENT)
    if name is not None and not isinstance(name, str):
        raise fail(f"vllm_xargs: {ARGUMENT}", repr(name), "a text: the name of an adapter's folder")
    model = request.model
    if not model or models.is_base_model(model) or model in models.lora_requests or not front_end.adapters.has(model):
        return name
    if name not in (None, model):
        raise fail(f"vllm_xargs: {ARGUMENT}", repr(name), f"{model!r}, which the request has as its model, or none")
    return str(model)


def _with_prefix(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def create(self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        front_end: FrontEnd | None = getattr(self.engine_client, ATTRIBUTE, None)
        if front_end is None:
            return await original(self, request, raw_request, *args, **kwargs)
        try:
            name = name_of(request, self.models, front_end)
            if name is not None:
                # Files are read, and a soft prompt's model is run, while other requests go on.
                await asyncio.to_thread(front_end.adapters.get, name)
        except UnknownPrefix as error:
            return self.create_error_response(str(error), "NotFoundError", HTTPStatus.NOT_FOUND, param=ARGUMENT)
        except ValueError as error:
            return self.create_error_response(str(error), "BadRequestError", HTTPStatus.BAD_REQUEST, param=ARGUMENT)
        if name is not None:
            request.vllm_xargs = {**(request.vllm_xargs or {}), ARGUMENT: name}
        token = current.set(name)  # for the requests that beam search makes of this one
        try:
            return await original(self, request, raw_request, *args, **kwargs)
        finally:
            current.reset(token)

    return create


def _accept_named(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def is_model_supported(self: Any, model_name: Any) -> bool:
        name = current.get()
        return (name is not None and model_name == name) or original(self, model_name)

    return is_model_supported


def _report_named(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def model_name(self: Any, lora_request: Any = None) -> str:
        name = current.get()
        return name if name is not None and lora_request is None else original(self, lora_request)

    return model_name


def _list_prefixes(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def show_available_models(self: Any) -> Any:
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        found = await original(self)
        front_end: FrontEnd | None = getattr(self.engine_client, ATTRIBUTE, None)
        if front_end is not None:
            parent, taken = self.base_model_paths[0].name, {card.id for card in found.data}
            names = [name for name in await asyncio.to_thread(front_end.adapters.names) if name not in taken]
            found.data += [
                ModelCard(id=name, root=name, parent=parent, permission=[ModelPermission()]) for name in names
            ]
        return found

    return show_available_models
