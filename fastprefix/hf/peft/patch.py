"""``patch`` and ``unpatch``: make a PEFT model read its prefixes and prompts through fastprefix, and undo it."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from fastprefix.errors import fail
from fastprefix.hf.adapters import build
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import find_installation, install, uninstall
from fastprefix.hf.adapters.verify_calls import attention_calls, verify_calls
from fastprefix.hf.model import dtensor, probing, wrappers
from fastprefix.hf.model.prompt_support import check_prompts, check_rows_behind
from fastprefix.hf.peft import checks, classes
from fastprefix.hf.peft.adapters import PATCHED_PROMPT_TYPES, Adapters, kind
from fastprefix.hf.storage.peft_format import PREFIX_TYPES

ADAPTION = "ADAPTION_PROMPT"


def patch(peft_model: Any) -> Any:
    """Accelerate a PEFT model in place, for training and inference, and correct it where PEFT computes wrong results.

    For PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING and ADAPTION_PROMPT. Parameters,
    optimizer state, ``save_pretrained``, adapters and their switching stay PEFT's own. A prefix is read inside the
    attention of every row, and a soft prompt runs through the model once per forward; neither is in the cache. The
    base model reads the active adapter even if it is called directly, as by trainers that unwrap the model.

    In an encoder-decoder a new prefix is read by the decoder's cross-attention too, where PEFT drops half of its slots;
    ``num_transformer_submodules`` of its configuration becomes 3, until :func:`unpatch`. Adapters that PEFT has trained
    stay what they are, but for T5's relative biases, which are the content's alone.

    Features beyond PEFT's: gradient checkpointing, left padding without position ids, packed rows, the caller's own
    choice of cache (``use_cache=False``, static, continued from an earlier call), ``adapter_names`` for each row in
    forward and generate, sliding windows that never hide the prefix, and training that resumes through an encoder
    (``load_adapter(dir, name, is_trainable=True)``, as ``Trainer`` does).

    Args:
        peft_model: a ``PeftModel`` around a decoder, encoder or encoder-decoder; a patched one is left as it is.

    Returns:
        The same object.

    Raises:
        ValueError: the model cannot be patched; the message says what it is.
    """
    from peft import PeftModel

    inner = wrappers.unwrapped(peft_model, but=wrappers.ADDING)
    if inner is not peft_model:
        patch(inner)
        return peft_model
    if not isinstance(peft_model, PeftModel):
        raise fail("peft_model", type(peft_model).__name__, "a peft.PeftModel (fastprefix.attach takes bare models)")
    if is_patched(peft_model):
        return peft_model
    kinds = {kind(config) for config in peft_model.peft_config.values()}
    known = (*PREFIX_TYPES, *PATCHED_PROMPT_TYPES, ADAPTION)
    if not kinds or not kinds <= set(known):
        raise fail("peft_model", f"adapters of type {', '.join(sorted(kinds)) or 'none'}", f"one of {', '.join(known)}")
    base = peft_model.get_base_model()
    probing.check_model(base)
    if find_installation(base) is not None:
        raise fail(
            "peft_model", f"a {type(base).__name__} that something is attached to", "one without; detach it first"
        )
    dtensor.refuse_tensor_parallel(base)
    installation = install(base)
    try:
        facts = installation.facts
        check_prompts(facts)  # PEFT's behaviour is known for token models alone
        if kinds & set(PREFIX_TYPES) and facts.layers.prompted is facts.layers.main:
            check_rows_behind(facts)
        if ADAPTION in kinds:
            _patch_adaption(installation, peft_model)
        else:
            installation.selection.provider = Adapters(installation, peft_model)
            with suppress(AttributeError, RuntimeError, TypeError, ValueError):  # there PEFT's soft prompts fail too
                installation.facts.reads_token_ids = build.reads_token_ids(installation)
            if kinds & set(PATCHED_PROMPT_TYPES) and not installation.selection.provider.two_stacks:
                checks.check_output(installation)
                arguments = inspect.signature(base.forward).parameters
                if installation.head and {"labels", "attention_mask"} <= set(arguments):
                    installation.facts.loss_fits_mask = installation.head.loss_fits_mask()
            for name in peft_model.peft_config:
                checks.check(installation.selection.provider, name)
            for name in peft_model.peft_config:
                checks.break_symmetry(peft_model, name)
            peft_model.__class__ = classes.patched(peft_model.__class__, classes.SHARING)
    except BaseException:
        if isinstance(installation.selection.provider, Adapters):
            installation.selection.provider.restore()
        uninstall(installation)
        raise
    # PEFT's disable_adapter leaves bound methods on the instance, which would hide the class's methods.
    for method in ("forward", "prepare_inputs_for_generation"):
        peft_model.__dict__.pop(method, None)
    installation.configs.switch(on=True)
    with suppress(ValueError):  # a forward that needs more than tokens is verified when the user makes it
        verify_calls(attention_calls(installation))
    return peft_model


def _patch_adaption(installation: Installation, peft_model: Any) -> None:
    from fastprefix.hf.peft import adaption

    installation.selection.provider = adaption.Gated(installation, peft_model)
    for module, slot in zip(installation.facts.layers.modules, installation.slots, strict=True):
        slot.fallback_attention = installation.configs.before(module)
    adaption.fuse(peft_model)
    peft_model.__class__ = classes.patched(peft_model.__class__, classes.ADAPTION)


def is_patched(peft_model: Any) -> bool:
    """Whether :func:`patch` was called on a model."""
    return isinstance(peft_model, tuple(classes.MIXINS.values()))


def unpatch(peft_model: Any) -> Any:
    """Undo :func:`patch`: the model is PEFT's again, with the parameters as they are now.

    Returns:
        The same object.

    Raises:
        ValueError: the model is not patched.
    """
    inner = wrappers.unwrapped(peft_model)
    if inner is not peft_model:
        unpatch(inner)
        return peft_model
    if not is_patched(peft_model):
        raise fail("peft_model", type(peft_model).__name__, "a model that fastprefix.patch was called on")
    installation = find_installation(peft_model.get_base_model())
    if isinstance(peft_model, classes.PatchedAdaption):
        from fastprefix.hf.peft import adaption

        adaption.unfuse(peft_model)
    peft_model.__class__ = classes.peft_class(peft_model)
    if installation is not None:
        if isinstance(installation.selection.provider, Adapters):
            installation.selection.provider.restore()
        uninstall(installation)
    return peft_model
