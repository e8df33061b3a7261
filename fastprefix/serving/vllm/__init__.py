"""A plugin for vLLM: requests name a prefix, and stock vLLM serves it.

A prefix is P keys and values in front of a text in every layer, which is what a KV connector can put into vLLM's cache:

* The front end (:mod:`~fastprefix.serving.vllm.front_end`) looks up the named adapter, says what is wrong with it where
  something is, and hands the engine a prompt that begins with P placeholder tokens. They spell a digest of the prefix's
  numbers (:mod:`~fastprefix.serving.vllm.placeholders`), so that blocks of vLLM's prefix cache belong to one prefix.
* The scheduler asks the connector (:mod:`~fastprefix.serving.vllm.connector`), which says that the first P tokens of
  such a request are computed elsewhere. Each worker then writes its heads of the prefix into the request's blocks
  (:mod:`~fastprefix.serving.vllm.worker`). The placeholders themselves are never computed.
* What users see, ``usage``, logprobs and texts, is without the placeholders.

An exception in the scheduler or in a worker stops the whole engine. Everything that can be wrong with a request is
therefore found in the front end, and what can be wrong with a model (:mod:`~fastprefix.serving.vllm.limits`) when the
server starts.

Only ``connector`` imports vLLM at its top; other modules do so inside functions, or not at all.
"""

from __future__ import annotations

from fastprefix.serving.vllm.naming import use_prefix

__all__ = ["use_prefix"]
