"""Builds a new prefix for a model: its layers' shapes, devices and initial values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from fastprefix.errors import fail
from fastprefix.hf.adapters.added import llama_adapter, memory
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.model import encoder_decoder, offload, probing
from fastprefix.hf.model import layers as model_layers
from fastprefix.hf.model.prompt_support import check_images, check_place, check_prompts
from fastprefix.hf.runtime.pooled_head import reads_each_token
from fastprefix.prefixes.config import LayerShape, PrefixConfig
from fastprefix.prefixes.head_shards import HeadShards
from fastprefix.prefixes.kv import PartEncoders, PrefixEncoder
from fastprefix.prefixes.llama_adapter import LlamaAdapterConfig
from fastprefix.prefixes.memory import PrefixMemoryConfig
from fastprefix.prefixes.prefix import LayerConfig, Prefix
from fastprefix.prefixes.prompt import PromptConfig, SoftPrompt, start

_INEXACT = 1e-2  # relative error of an MLP's fit that is worth a warning; rounding alone leaves far less


def build(installation: Installation, config: LayerConfig | PromptConfig) -> Prefix | SoftPrompt:
    """A new prefix (or soft prompt) for an installation's model, with its initial values."""
    prefix = _build(installation, config)
    if config.modules_to_save is not None:
        prefix.modules_to_save.put(installation.modules.copies(config.modules_to_save))
    return prefix


def _build(installation: Installation, config: LayerConfig | PromptConfig) -> Prefix | SoftPrompt:
    if isinstance(config, PromptConfig):
        dim = prompt_dim(installation)
        check_place(installation.facts, config.place)
        vocabulary = installation.model.config.get_text_config().vocab_size
        embeddings = installation.facts.layers.prompted.word_embeddings
        device = offload.device(embeddings)
        if config.encoder is not None:
            encoder = config.new_encoder(dim).to(device)
            if not config.init.is_random:
                _warn_of_fit(config, dim, encoder.fit(start(config, embeddings, vocabulary, dim, device)))
            return SoftPrompt(config, encoder)
        return SoftPrompt(config, start(config, embeddings, vocabulary, dim, device))
    if isinstance(config, LlamaAdapterConfig):
        return llama_adapter.fill(installation, empty_prefix(installation, config))
    if isinstance(config, PrefixMemoryConfig):
        return memory.fill(installation, empty_prefix(installation, config))
    return build_prefix(installation, config)


def distribute(installation: Installation, prefix: Prefix | SoftPrompt) -> None:
    """In a tensor-parallel model, give each process its part of a whole prefix; every process has to call this."""
    shards = installation.facts.layers.shards
    if shards is not None:
        shards.distribute(prefix)


def _warn_of_fit(config: PrefixConfig | PromptConfig, hidden_size: int, error: float) -> None:
    """Warn where a network could not be fitted to the start of a config; ``error``: how much of it is left."""
    if error <= _INEXACT:
        return
    tokens, hidden = config.num_virtual_tokens, config.encoder_hidden_size or hidden_size
    if isinstance(config, PrefixConfig):
        network, what, enough = "MLP", "keys and values", f"{tokens} or more can"
    else:  # half of a ReLU's units are zero
        network, what, enough = str(config.encoder).upper(), "embeddings", f"{2 * tokens} or more usually can"
    warnings.warn(
        f"fastprefix: init: an {network} of {hidden} hidden units cannot give the {what} of {tokens} tokens: training "
        f"starts {error:.0%} away from them (encoder_hidden_size={enough})",
        stacklevel=3,
    )


def prompt_dim(installation: Installation) -> int:
    """Size d of a soft prompt's token; raises ValueError for a model that cannot read soft prompts."""
    check_prompts(installation.facts)
    hidden = installation.model.config.get_text_config().hidden_size
    prompted = installation.facts.layers.prompted
    dim, owner = int(getattr(prompted.word_embeddings, "embedding_dim", hidden)), prompted.owner
    dtype = next(p.dtype for p in owner.parameters() if p.is_floating_point())
    embeds = torch.zeros(1, 2, dim, dtype=dtype, device=offload.device(owner))
    try:
        with installation.forward.bypass():
            probing.run(owner, {"inputs_embeds": embeds})
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        got = f"{type(installation.model).__name__}, which does not run on inputs_embeds alone ({error})"
        raise fail("model", got, "one that does: a soft prompt is embeddings") from error
    check_head(installation)
    installation.facts.reads_token_ids = reads_token_ids(installation)
    return dim


def check_head(installation: Installation) -> None:
    """Raise ValueError where a bidirectional model's head reads one position for all others (Splinter's question)."""
    main = installation.facts.layers.main
    if main.causal or main.owner is installation.model or installation.pooled or installation.head:
        return
    try:
        with installation.forward.bypass():
            each = reads_each_token(installation.model, main)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # the head needs token ids, for example
        each = False
    if not each:
        got = f"{type(installation.model).__name__}, whose head reads one place of its text for all tokens"
        raise fail("model", got, "one that reads each token's own: a prompt stands in front of the text")


def reads_token_ids(installation: Installation) -> bool:
    """Whether layers of a causal model read token ids in addition to embeddings (Gemma 3n's per-layer embeddings).

    There, rows after a shared soft prompt have ids and the prompt has none; concatenated embeddings have no ids at all.
    The two therefore differ.
    """
    main = installation.facts.layers.prompted
    if not main.causal or main.main_input != "input_ids":
        return False
    embed = main.word_embeddings
    ids = main.dummy_inputs(tokens=3)["input_ids"]
    with installation.forward.bypass(), probing.evaluating(installation.model):
        of_ids, of_embeddings = main.owner(input_ids=ids)[0], main.owner(inputs_embeds=embed(ids))[0]
    tiny = min(64 * torch.finfo(of_ids.dtype).eps, 0.03) * of_ids.abs().max().item()  # bf16 rounds to 0.4%
    return not torch.allclose(of_ids, of_embeddings, rtol=0.0, atol=tiny)


def empty_prefix(installation: Installation, config: LayerConfig) -> Prefix:
    """A :class:`Prefix` with its layers' shapes, and no parameters yet."""
    layers = installation.facts.layers
    indices = config.active_layers(layers.parts)
    shapes, parts = [layers.shapes[i] for i in indices], [layers.parts[i] for i in indices]
    sources, heads = [layers.kv_sources[i] for i in indices], [layers.num_heads[i] for i in indices]
    return Prefix(config, shapes, indices, parts, sources, heads)


def new_encoder(installation: Installation, prefix: Prefix) -> PrefixEncoder | PartEncoders:
    """A new MLP for a prefix's layers (in an encoder-decoder one MLP for each part)."""
    config = prefix.config
    assert isinstance(config, PrefixConfig)
    hidden_size = installation.model.config.get_text_config().hidden_size
    sizes = config.num_virtual_tokens, hidden_size, config.encoder_hidden_size or hidden_size
    named = [part for part in prefix.parts if part is not None]
    return PartEncoders(*sizes, prefix.shapes, named) if named else PrefixEncoder(*sizes, prefix.shapes)


def build_prefix(installation: Installation, config: PrefixConfig) -> Prefix:
    """A new prefix of keys and values for every layer of the config, direct or through an MLP."""
    if config.position_offset == "after_prefix":
        check_images(installation.facts)
    prefix = empty_prefix(installation, config)
    devices = [installation.facts.layers.devices[i] for i in prefix.layer_indices]
    given = _start(installation, config, list(prefix.layer_indices))
    biases = _of_layers(installation, config.init.biases, prefix.layer_indices)
    if config.prefix_projection:
        encoder = new_encoder(installation, prefix)
        encoder.to(devices[0])
        prefix.set_encoder(encoder, devices, biases)
        if given is not None:
            prefix.check(*given)
            error = encoder.fit(*([x.to(devices[0]) for x in part] for part in given))
            _warn_of_fit(config, installation.model.config.get_text_config().hidden_size, error)
        return prefix
    if given is None:
        given = _random(config, prefix.shapes)
    keys, values = ([x.float().to(d) for x, d in zip(part, devices, strict=True)] for part in given)
    prefix.set_direct(keys, values, biases)
    return prefix


def _random(config: PrefixConfig, shapes: Sequence[LayerShape]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    P, std = config.num_virtual_tokens, config.init.std
    keys = [torch.randn(s.num_kv_heads, P, s.head_dim) * std for s in shapes]
    std = 0.0 if config.init.zero_values else std
    return keys, [torch.randn(s.num_kv_heads, P, s.value_dim) * std for s in shapes]


def _of_layers(
    installation: Installation, given: Sequence[torch.Tensor] | None, indices: Sequence[int]
) -> list[torch.Tensor] | None:
    """Those of the prefix's layers, of tensors that were given for all layers or for these alone."""
    if given is None or len(given) != len(installation.facts.layers.modules):
        return None if given is None else list(given)
    return [given[i] for i in indices]


def _start(
    installation: Installation, config: PrefixConfig, indices: list[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """The keys and values to start from; None for a random start."""
    init = config.init
    if init.keys is not None and init.values is not None:
        keys, values = (_of_layers(installation, x, indices) for x in (init.keys, init.values))
        assert keys is not None and values is not None
        return keys, values
    if init.zero_values:
        return _random(config, [installation.facts.layers.shapes[i] for i in indices])
    if not init.of_tokens:
        return None
    if installation.model.main_input_name != "input_ids" and len(installation.facts.layers.stacks) == 1:
        got = f"{init.name} for {type(installation.model).__name__}, which reads {installation.model.main_input_name}"
        raise fail("init", got, "fastprefix.init.normal or kv")
    if installation.facts.layers.reuses_modules:
        got = f"{init.name} for {type(installation.model).__name__}, which runs one module as several layers"
        raise fail("init", got, "fastprefix.init.normal or kv: a text has keys of its own in each")
    active = installation.selection.active
    installation.activate(None)
    installation.configs.switch(on=True)
    try:
        with installation.forward.bypass():
            ids = init.tokens(config.num_virtual_tokens, installation.model.config.get_text_config().vocab_size)
            layers = installation.facts.layers
            if len(layers.stacks) > 1:
                return encoder_decoder.key_values(installation.model, layers, ids, indices)
            modules = [layers.modules[i] for i in indices]
            # Not the whole model, which would compute the logits of thousands of tokens for nothing.
            keys, values = model_layers.key_values(layers.main.owner, ids, modules)
            if layers.shards is None:
                return keys, values
            return _gathered(layers.shards, keys, indices), _gathered(layers.shards, values, indices)
    finally:
        installation.activate(active)


def _gathered(shards: HeadShards, tensors: Sequence[torch.Tensor], indices: Sequence[int]) -> list[torch.Tensor]:
    """Keys or values of layers with the heads of all processes."""
    return [shards.gathered(x, i) for x, i in zip(tensors, indices, strict=True)]
