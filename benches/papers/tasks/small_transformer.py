"""Small GPT-2 models that are trained from nothing, and what trains them, their prefixes and their LoRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

import fastprefix
from benches.papers.tasks.sequence_tasks import Sequences
from fastprefix import PrefixConfig, init

Batches = Iterable[tuple[Tensor, Tensor]]
WARM_UP = 100
ROWS = 64  # of a batch


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    layers: int
    heads: int
    width: int = 64
    normed: bool = True  # a LayerNorm in front of attention
    dropout: float = 0.0


@dataclass(frozen=True)
class Setting:
    """The size of an experiment."""

    sequences: Sequences
    shape: Shape
    steps: dict[str, int]  # how long each of its parts is trained
    tests: int  # inputs


def gpt2(seed: int, vocabulary: int, positions: int, dropout: float, **sizes: int) -> GPT2LMHeadModel:
    """A new GPT-2 with learned positions and an output map of its own."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        # The same function as "gelu_new", in one kernel.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    return GPT2LMHeadModel(config)


def build(shape: Shape, sequences: Sequences, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 with weights N(0, 0.02), those into the residual divided by sqrt(2L), as the paper's models have them."""
    sizes = {"n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads}
    model = gpt2(seed, sequences.vocabulary, 2 * sequences.length, shape.dropout, **sizes)
    if not shape.normed:
        for block in model.transformer.h:
            block.ln_1 = nn.Identity()
    return model


def logits(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """``[B, n, V]`` for each token of the output, which is read behind the input but for its last token."""
    return model(input_ids=ids_of((x, y)), use_cache=False, logits_to_keep=y.shape[1]).logits


def output_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of a token of the output."""
    return cross_entropy(logits(model, x, y).flatten(0, 1), y.flatten())


def fit(
    model: Any,
    batches: Batches,
    steps: int,
    lr: float,
    decay: float = 0.0,
    loss: Callable[[Any, Tensor, Tensor], Tensor] = output_loss,
) -> None:
    """AdamW (0.9, 0.95) on what is trainable, with a warm-up, a cosine to zero and gradients clipped at norm 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)
    warm = min(WARM_UP, steps // 4 + 1)
    model.train()
    for step, batch in enumerate(batches):
        done = max(0, step - warm) / max(1, steps - warm)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * done))
        loss(model, *batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def exact_match(model: Any, tests: tuple[Tensor, Tensor]) -> float:
    """The percentage of inputs for which all tokens of the output are the likeliest.

    The model reads the right output. Greedy decoding writes the right output for the same inputs: up to its first
    mistake it has read the same.
    """
    model.eval()
    found = [(logits(model, x, y).argmax(-1) == y).all(-1) for x, y in zip(*(t.split(512) for t in tests), strict=True)]
    return 100.0 * torch.cat(found).double().mean().item()


@contextmanager
def prefixed(model: Any, tokens: int, seed: int, gate: Any = None, std: float = 1.0) -> Iterator[Any]:
    """The frozen model with a new prefix of ``N(0, std^2)``; positions of the content do not move."""
    torch.manual_seed(seed)
    config = PrefixConfig(tokens, init=init.normal(std), position_offset="none", gate=gate)
    prefix = fastprefix.attach(model, config)
    try:
        yield prefix
    finally:
        fastprefix.detach(model)


def with_lora(model: Any, rank: int, seed: int, targets: tuple[str, ...] = ("c_attn",)) -> Any:
    """A copy of the model with LoRA of ``rank`` on these linear maps, all of its other weights frozen."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), fan_in_fan_out=True)
    return get_peft_model(copy.deepcopy(model), config)


def trainable(module: Any) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def ids_of(tests: tuple[Tensor, Tensor]) -> Tensor:
    """What a model reads: the input, and the output but for its last token."""
    return torch.cat([tests[0], tests[1][:, :-1]], 1)


def unfrozen(model: Any) -> Any:
    """A copy of the model, all of whose weights are trained."""
    return copy.deepcopy(model).requires_grad_(True)


@torch.no_grad()
def attention_map(model: Any, ids: Tensor, prefix_keys: Tensor | None = None) -> Tensor:
    """``[B, H, S, P + S]`` of the lowest layer; columns of the prefix come first."""
    seen: list[Tensor] = []
    attention = model.transformer.h[0].attn
    hook = attention.c_attn.register_forward_hook(lambda module, given, made: seen.append(made))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    q, k, _ = (part.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2) for part in seen[0].chunk(3, -1))
    hidden = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    scores = (q @ k.mT).masked_fill(hidden, -math.inf)
    if prefix_keys is not None:
        scores = torch.cat([q @ prefix_keys.mT, scores], -1)
    return (scores * q.shape[-1] ** -0.5).softmax(-1)
