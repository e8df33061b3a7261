"""Prefixes in transformers' continuous batching: ``generate_batch`` and ``transformers serve --continuous-batching``.

The engine keeps the keys and values of all requests in pages of one cache. A prefix is keys and values at positions
0..P-1, so a request with a prefix is one whose first P tokens are in the cache already. Three things follow.

* **Identity.** The engine finds shared pages by the tokens that they hold. P placeholder ids stand for a prefix's
  tokens and spell a digest of its numbers (``paged_prefix.py``). They are negative, so no text has them, and two
  prefixes have the same ones only if their numbers are the same; a prefix that is trained further gets others.
* **Pages.** The first request of a prefix writes its whole pages into the cache, and later ones find them there. What
  is left of P tokens shares its page with the request's own text, so each request has its own copy of that. Pages that
  no request reads are evicted like any others, and written again when they are needed (``pages.py``).
* **Restarts.** The engine starts a request anew when the cache is full, and for sequences of ``num_return_sequences``
  that find no room. Such a request begins with its placeholders, and is given its prefix again in the same place.

The engine's parts that this relies on are its own and change: versions of transformers that it was not tested with are
refused.
"""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail

TESTED = ("5.23.0",)  # of transformers


def enable_continuous_batching(model: Any, *, max_resident: int = 32) -> None:
    """Let a model with prefixes run in transformers' continuous batching.

    Afterwards ``model.generate_batch``, ``model.continuous_batching_context_manager``, ``init_continuous_batching`` and
    ``transformers serve --continuous-batching`` work with prefixes. A request reads the prefix that was active when the
    engine was made (:func:`fastprefix.set_prefix`), unless it names another: the manager's ``add_request`` has an
    argument ``prefix``, and its ``generate`` one name for each prompt.

    Names are those of attached and registered prefixes and soft prompts, or tuples of them for several behind each
    other. A registered prefix is read when a request first names it. Until the engine stops, the model itself runs
    bare, and if a prefix was active, a forward outside the engine raises.

    Args:
        model: a causal language model, with prefixes attached (:func:`fastprefix.attach`, :func:`fastprefix.load`) or
            registered (:func:`fastprefix.register`), whose every layer attends to all of the text.
        max_resident: how many prefixes to keep ready in memory besides those of requests that run.

    Raises:
        ValueError: the version of transformers is none that this was tested with, nothing is attached, or the model has
            windows, states or positions that a page cannot hold; it is named.
    """
    import transformers

    if transformers.__version__ not in TESTED:
        expected = f"{' or '.join(TESTED)}: its engine has no interface for this, and changes from version to version"
        raise fail("transformers", f"version {transformers.__version__}", expected)
    from fastprefix.serving.continuous_batching.entry import install

    install(model, max_resident)
