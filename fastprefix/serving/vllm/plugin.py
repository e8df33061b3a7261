"""The entry point ``vllm.general_plugins``: registers the connector, and puts the front end into vLLM's.

vLLM calls :func:`register` in every one of its processes. An engine whose ``--kv-transfer-config`` does not name the
connector stays as it is.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

from fastprefix.errors import fail
from fastprefix.serving.vllm.front_end import CONNECTOR, FrontEnd
from fastprefix.serving.vllm.naming import UnknownPrefix

logger = logging.getLogger("vllm.fastprefix")

TESTED = ("0.32.0",)
OLDEST = (0, 32)
ATTRIBUTE = "fastprefix_front_end"  # of engines and engine clients

_registered = False


def register() -> None:
    """Make the connector known to vLLM, once in a process. Nothing else happens before an engine asks for it."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:  # an engine that asks for no prefix has to go on
        logger.warning("fastprefix cannot serve prefixes with this vLLM: %s", error)
        return
    KVConnectorFactory.register_connector(CONNECTOR, "fastprefix.serving.vllm.connector", "FastprefixConnector")
    _wrap_init(AsyncLLM, "add_request_async")
    _wrap_init(LLMEngine, "add_request")


def check_version(version: str) -> None:
    """Refuse a vLLM that is too old, and warn of one that was not tested.

    Raises:
        ValueError: the version is below the oldest one that has all that is used here.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and tuple(map(int, numbers.groups())) < OLDEST:
        raise fail("vllm", f"version {version}", f"{'.'.join(map(str, OLDEST))} or later: prefixes need parts of it")
    if version.split("+")[0] not in TESTED:
        logger.warning("fastprefix was tested with vLLM %s, and this is %s", ", ".join(TESTED), version)


def _wrap_init(engine: Any, add: str) -> None:
    """Let an engine's constructor give it a front end where its configuration names the connector."""
    original = engine.__init__

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:
            original(self, vllm_config, *args, **kwargs)
            return
        import vllm

        check_version(vllm.__version__)
        front_end = FrontEnd(vllm_config)  # raises before anything is loaded
        original(self, vllm_config, *args, **kwargs)
        tokenizer = self.input_processor.tokenizer
        front_end.avoid(getattr(tokenizer, "all_special_ids", ()))
        install(front_end, self, add)

    engine.__init__ = init


def _client_error(error: ValueError) -> Exception:
    """The error of vLLM's own that its server answers with a 4xx: it takes any other for a fault of the engine."""
    from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

    return (VLLMNotFoundError if isinstance(error, UnknownPrefix) else VLLMValidationError)(str(error))


def install(front_end: FrontEnd, engine: Any, add: str) -> None:
    """Put a front end between an engine's input processor, its core (whose method ``add`` takes requests) and its
    output."""
    from vllm.utils.async_utils import make_async

    from fastprefix.serving.vllm.routes import patch_routes

    setattr(engine, ATTRIBUTE, front_end)
    inputs, outputs, core = engine.input_processor, engine.output_processor, engine.engine_core
    inputs.process_inputs = front_end.mark(inputs.process_inputs, _client_error)
    inputs.process_inputs_async = make_async(inputs.process_inputs, executor=inputs.renderer._executor)

    send: Callable[..., Any] = getattr(core, add)

    def add_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        front_end.forget_aborted(outputs.request_states)
        return send(front_end.with_placeholders(request), *args, **kwargs)

    setattr(core, add, add_request)
    process = outputs.process_outputs

    def process_outputs(found: Any, *args: Any, **kwargs: Any) -> Any:
        front_end.without_placeholders(found)
        return process(found, *args, **kwargs)

    outputs.process_outputs = process_outputs
    patch_routes()
