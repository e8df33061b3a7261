"""Small models with heads that are trained beside a prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix import PrefixConfig, PromptConfig, init

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

P, VOCAB = 3, 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}


def model(name: str = "LlamaForSequenceClassification", seed: int = 0, labels: int = 3) -> Any:
    """With the frozen numbers of every other one of its class, and a head that ``seed`` gives."""
    config_class = getattr(transformers, f"{name.partition('For')[0]}Config")
    options = {"num_labels": labels} if "Question" not in name and "Causal" not in name else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, name)(config_class(**SIZES, **options, pad_token_id=0)).double().eval()
        torch.manual_seed(seed)
        for path, module in made.named_modules():
            if path in ("score", "classifier", "qa_outputs"):
                for p in module.parameters():
                    torch.nn.init.normal_(p)
    return made


def ids(rows: int = 4) -> Tensor:
    return torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(1))


def out(of: Any, **inputs: Any) -> Tensor:
    """Everything that a model's head gives."""
    with torch.no_grad():
        found = of(input_ids=ids(), **inputs)
    return torch.cat([x.reshape(4, -1) for x in found.to_tuple()[: 2 if "start_logits" in found else 1]], 1)


def train(of: Any, steps: int = 4) -> None:
    optimizer = torch.optim.Adam([p for p in of.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        of(input_ids=ids(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()


CONFIGS = {
    "prefix": PrefixConfig(P, init=init.normal(0.5)),
    "mlp": PrefixConfig(P, prefix_projection=True),
    "layers": PrefixConfig(P, layers=[1]),
    "prompt": PromptConfig(P),
}
