"""PEFT models for the tests of ``fastprefix.patch``: tiny, seeded, with PEFT alone or patched."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor

import fastprefix
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.support.concat_oracle import run_concat

P, B, S = 5, 3, 9
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PREFIX, PROMPT, P_TUNING = peft.PrefixTuningConfig, peft.PromptTuningConfig, peft.PromptEncoderConfig
MULTITASK, ADAPTION = peft.MultitaskPromptTuningConfig, peft.AdaptionPromptConfig
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prefix": (PREFIX, {}),
    "projection": (PREFIX, {"prefix_projection": True, "encoder_hidden_size": 8}),
    "cartridge": (peft.CartridgeConfig, {"num_frozen_tokens": 2}),
    "prompt": (PROMPT, {}),
    "mlp": (P_TUNING, {"encoder_hidden_size": 8}),
    "lstm": (P_TUNING, {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}),
    "multitask": (MULTITASK, {"num_tasks": 3}),
    "adaption": (ADAPTION, {"adapter_len": P, "adapter_layers": 2}),
}
# What PEFT needs beside the number of tokens to put an encoder in front of them.
ENCODERS: dict[Any, dict[str, Any]] = {
    PREFIX: {"prefix_projection": True, "encoder_hidden_size": 8},
    P_TUNING: {"encoder_hidden_size": 8},
}


def tuned(patched: bool, cls: Any = PREFIX, row: str = "llama_gqa", base: Any = None, **options: Any) -> Any:
    """A PEFT model in eval mode, the same numbers each time; gates are open."""
    tokens = {} if cls is ADAPTION else {"num_virtual_tokens": P}
    base = ROWS[row].build() if base is None else base
    torch.manual_seed(2)
    model = peft.get_peft_model(base, cls(**{"task_type": "CAUSAL_LM", **tokens, **options})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("adaption_gate"):
                p.fill_(0.7)
    return fastprefix.patch(model) if patched else model


def made(patched: bool, kind: str, row: str = "llama_gqa", base: Any = None, **options: Any) -> Any:
    """The same for a kind by name."""
    cls, own = KINDS[kind]
    return tuned(patched, cls, row, base, **own, **options)


def tasks(kind: str, rows: int = B) -> dict[str, Tensor]:
    """What a forward of this kind takes besides."""
    return {"task_ids": torch.arange(rows) % 3} if kind == "multitask" else {}


def add(model: Any, name: str = "other", **options: Any) -> None:
    """Another adapter, the same numbers each time."""
    torch.manual_seed(3)
    model.add_adapter(name, PREFIX(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **options}))


def ids(rows: int = B, columns: int = S, vocab: int = VOCAB) -> Tensor:
    """Token ids, the same each time."""
    return torch.randint(3, vocab, (rows, columns), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor:
    """``[B, S]``: row 0 has four tokens less, row 1 one."""
    mask = torch.ones(B, S, dtype=torch.long)
    for row, n in enumerate((4, 1)):
        mask[row, slice(0, n) if side == "left" else slice(S - n, S)] = 0
    return mask


def trained(model: Any) -> dict[str, Tensor]:
    """Parameters that training changes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradient(model: Any, **inputs: Any) -> Tensor:
    """Of everything that is trained in a step in train mode, as one vector."""
    model.train()(**inputs).loss.backward()
    return torch.cat([p.grad.flatten() for p in trained(model).values() if p.grad is not None])


def train(model: Any, steps: int, optimizer: Any = torch.optim.SGD, lr: float = 0.1, **inputs: Any) -> list[float]:
    """A few steps of training; their losses."""
    steers, losses = optimizer(trained(model).values(), lr=lr), []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids(), **inputs).loss
        loss.backward()
        steers.step()
        steers.zero_grad()
        losses.append(loss.item())
    return losses


def trainer(model: Any, folder: Any, steps: int, **options: Any) -> Any:
    """transformers' own, over a few random rows."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids(8, 6, 32)]
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "seed": 3}
    fixed = {"save_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **quiet, **options}
    arguments = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=2, **fixed)
    made = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    made.remove_callback(PrinterCallback)
    return made


def concatenated(model: Any, base: Any, **inputs: Any) -> Any:
    """What a bare model gives with a PEFT prefix concatenated in every layer."""
    config, weight = model.active_peft_config, model.prompt_encoder[model.active_adapter].embedding.weight.detach()
    names = [name for name, _ in base.named_modules() if name.endswith((".self_attn", ".attn", ".attention"))]
    pairs = weight.view(len(weight), len(names), 2, config.num_attention_heads, -1).permute(1, 2, 3, 0, 4)
    shape = inputs["input_ids"].shape
    inputs.setdefault("position_ids", torch.arange(shape[1]).expand(shape) + len(weight))
    return run_concat(base, {name: (k, v) for name, (k, v) in zip(names, pairs)}, **inputs)
