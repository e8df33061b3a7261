"""Checks of whole models: an attached prefix, with each backend in turn, against explicit concatenation.

Three randomly initialised architectures: grouped heads with rotary positions, learned positions, and one that is not
causal. The error against concatenation in fp64 may be twice that of concatenation in the model's own dtype, plus four
roundings of the largest entry. transformers is imported by the first row, not by the plan.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benches.device_suite.operator_correctness import Case
from fastprefix.measure import DTYPES, Problem
from fastprefix.types import BackendName

if TYPE_CHECKING:
    from benches.device_suite.concat_oracle import ConcatenatingModel
    from fastprefix.prefixes.prefix import Prefix

ROUNDINGS = 4
VOCAB = 4096


@dataclass(frozen=True)
class Shape:
    """Sizes: batch, tokens, prefix and new tokens of a row; layers, width and heads of its model."""

    batch: int = 4
    tokens: int = 130
    prefix: int = 33
    new: int = 8
    layers: int = 4
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 4


SMOKE = Shape(batch=2, tokens=9, prefix=5, new=2, layers=1, hidden=64, heads=4, kv_heads=2)
# Head dim 64, which every backend supports in fp32.
MODELS = {
    "Llama": Shape(),
    "GPT-2": Shape(hidden=768, heads=12, kv_heads=12),
    "BERT": Shape(hidden=768, heads=12, kv_heads=12),
}


def shape(name: str, smoke: bool) -> Shape:
    """The sizes of a model."""
    return SMOKE if smoke else MODELS[name]


def problems(name: str, dtype: str, device: str, smoke: bool) -> Iterator[Problem]:
    """The operator calls in a row, without their masks."""
    x = shape(name, smoke)
    sizes = (x.batch, x.heads, x.heads if name != "Llama" else x.kv_heads, x.tokens, x.prefix, x.hidden // x.heads)
    yield Problem.train(*sizes, dtype=DTYPES[dtype], device=device, causal=name != "BERT")
    if name != "BERT":
        yield Problem.decode(*sizes, dtype=DTYPES[dtype], device=device)


def cases(name: str, backend: BackendName, dtype: str, device: str, smoke: bool) -> Iterator[Case]:
    """The checks of a row: a batch without padding, a padded batch, and greedily generated tokens."""
    yield "logits and gradients", lambda: _model_under_test(name, dtype, device, smoke).broken(backend, padded=False)
    yield "padded", lambda: _model_under_test(name, dtype, device, smoke).broken(backend, padded=True)
    if name != "BERT" and dtype == "fp32":
        yield "greedy tokens", lambda: _model_under_test(name, dtype, device, smoke).wrong_tokens(backend)


def release() -> None:
    """Free the memory of the models."""
    _model_under_test.cache_clear()


@functools.lru_cache(maxsize=1)
def _model_under_test(name: str, dtype: str, device: str, smoke: bool) -> ModelUnderTest:
    return ModelUnderTest(name, dtype, device, smoke)


class ModelUnderTest:
    """A model with a prefix, and two copies that concatenate the prefix: in fp64 and in the model's dtype."""

    def __init__(self, name: str, dtype: str, device: str, smoke: bool) -> None:
        import fastprefix
        from benches.device_suite.concat_oracle import ConcatenatingModel
        from fastprefix.hf.attention.function import SLOT

        self.shape, self.dtype, self.causal, self.device = shape(name, smoke), DTYPES[dtype], name != "BERT", device
        torch.manual_seed(0)
        self.model = _build(name, self.shape).to(device, self.dtype).eval()
        exact, rounded = copy.deepcopy(self.model).double(), copy.deepcopy(self.model)
        config = fastprefix.PrefixConfig(self.shape.prefix, init=fastprefix.init.normal(0.7))
        self.prefix: Prefix = fastprefix.attach(self.model, config)
        names = [name for name, module in self.model.named_modules() if SLOT in module._modules]
        self.exact, self.rounded = ConcatenatingModel(exact, names), ConcatenatingModel(rounded, names)

    def broken(self, backend: BackendName, padded: bool) -> str | None:
        """The first of logits and gradients that breaks the bound, in words; None when none does."""
        from fastprefix.measure.training.training_step import force_backend

        inputs = self._inputs(padded)
        with force_backend(backend):
            got = self._results(self.model(**inputs), list(self.prefix.parameters()), inputs)
        inputs["position_ids"] = self._positions(inputs)
        want = self._concatenated(self.exact, torch.float64, inputs)
        peer = self._concatenated(self.rounded, torch.float32, inputs)
        for i, (x, exact, rounded) in enumerate(zip(got, want, peer, strict=True)):
            mine, theirs = ((y.double() - exact).abs().max().item() for y in (x, rounded))
            floor = ROUNDINGS * torch.finfo(self.dtype).eps * exact.abs().max().item()
            if not mine <= 2 * theirs + floor:  # so written that nan fails
                what = f"gradient of layer {(i - 1) // 2}'s {'vk'[i % 2]}" if i else "logits"
                return f"{what}: error {mine:.2e}, concatenation's {theirs:.2e}"
        return None

    def wrong_tokens(self, backend: BackendName) -> str | None:
        """What is wrong with greedy tokens, in words; by concatenation, each must have a logit close to the highest."""
        from fastprefix.measure.training.training_step import force_backend

        inputs, new = self._inputs(padded=False), self.shape.new
        with force_backend(backend), torch.no_grad():
            found = self.model.generate(
                **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=new, do_sample=False
            )
        inputs["input_ids"] = found[:, :-1]
        inputs["position_ids"] = self._positions(inputs)
        with torch.no_grad():
            logits = self._logits(self.exact(self._pairs(torch.float64), **inputs))[:, -new:]
        chosen = logits.gather(2, found[:, -new:, None])[..., 0]
        short = (logits.amax(-1) - chosen).max().item()
        if found.shape[1] != self.shape.tokens + new or not short <= 1e-4 * logits.abs().max().item():
            return f"{found.shape[1] - self.shape.tokens} of {new} tokens, at most {short:.2e} below the best logit"
        return None

    def _inputs(self, padded: bool) -> dict[str, Tensor]:
        """Token ids and a mask that hides a third of the first sample: on the left in causal models."""
        x, generator = self.shape, torch.Generator(self.device).manual_seed(1)
        ids = torch.randint(3, VOCAB, (x.batch, x.tokens), generator=generator, device=self.device)
        if not padded:
            return {"input_ids": ids}
        mask = torch.ones_like(ids)
        third = x.tokens // 3
        mask[0, :third] = 0
        mask[1, :1] = 0
        return {"input_ids": ids, "attention_mask": mask if self.causal else mask.flip(1)}

    def _positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """Position ids: P plus the index among the tokens that are not padding; in encoders, P plus the column."""
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        mask = mask if self.causal else torch.ones_like(mask)
        return (mask.cumsum(1) - 1).clamp(min=0) + self.shape.prefix

    def _pairs(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        return [(k.detach().to(dtype), v.detach().to(dtype)) for k, v in self.prefix.key_values()]

    def _concatenated(self, twin: ConcatenatingModel, dtype: torch.dtype, inputs: dict[str, Tensor]) -> list[Tensor]:
        pairs = self._pairs(dtype)
        leaves = [x.requires_grad_() for pair in pairs for x in pair]
        return self._results(twin(pairs, **inputs), leaves, inputs)

    def _results(self, output: Any, leaves: Sequence[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
        """The logits of all tokens but padding, then the gradient of every leaf for a fixed gradient of the logits."""
        x = self._logits(output)
        if "attention_mask" in inputs:
            x = x[inputs["attention_mask"].bool()]
        weight = torch.sin(torch.arange(x.numel(), device=x.device, dtype=torch.float64)).view(x.shape)
        return [x.detach(), *torch.autograd.grad(x, leaves, weight.to(x.dtype))]

    def _logits(self, output: Any) -> Tensor:
        x: Tensor = output.logits if self.causal else output.last_hidden_state
        return x


def _build(name: str, x: Shape) -> Any:
    """Build a random model whose weights are twice as large as usual, so that attention is not near uniform."""
    import transformers

    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    room = x.prefix + x.tokens + x.new
    match name:
        case "GPT-2":
            sizes = {"n_embd": x.hidden, "n_layer": x.layers, "n_head": x.heads, "n_positions": room}
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes, initializer_range=0.04))
        case "Llama":
            family, more = "Llama", {"num_key_value_heads": x.kv_heads}
        case _:
            family, more = "Bert", {}
    sizes = {"hidden_size": x.hidden, "num_hidden_layers": x.layers, "num_attention_heads": x.heads}
    sizes.update(more, intermediate_size=2 * x.hidden, max_position_embeddings=room)
    config = getattr(transformers, f"{family}Config")(**common, **sizes, initializer_range=0.04)
    return getattr(transformers, f"{family}ForCausalLM" if name == "Llama" else f"{family}Model")(config)
