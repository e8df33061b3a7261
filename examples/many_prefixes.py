"""Serve several prefixes in one batch: each row reads a prefix of its own, or none.

    python examples/many_prefixes.py

Two prefixes are saved to disk, registered by name, and read when a batch first names them. The mixed batch generates
what each row generates alone.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fastprefix
from fastprefix import PrefixConfig, init

torch.manual_seed(0)
llama = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(llama).eval()
generate = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

with tempfile.TemporaryDirectory() as folder:
    # Stands for two training runs; the prefixes may have different lengths.
    for name, length in (("legal", 4), ("medical", 9)):
        fastprefix.attach(model, PrefixConfig(length, init=init.normal(1.0)), name)
        fastprefix.save(model, Path(folder) / name, name)
    fastprefix.detach(model)

    # Thousands of folders may be registered; at most max_resident of them are kept in memory.
    fastprefix.register(model, {name: Path(folder) / name for name in ("legal", "medical")}, max_resident=32)
    names = ["legal", "medical", None]  # None: the bare model
    prompts = torch.randint(0, 64, (3, 5))  # [B, S], row i reads the prefix names[i]
    with fastprefix.prefix_batch(model, names):
        mixed = model.generate(input_ids=prompts, **generate)
    alone = []
    for row, name in zip(prompts, names, strict=True):
        fastprefix.set_prefix(model, name)
        alone.append(model.generate(input_ids=row[None], **generate))

for name, tokens in zip(names, mixed, strict=True):
    print(f"{name}: {tokens[5:].tolist()}")
print(f"the mixed batch equals each row alone: {torch.equal(mixed, torch.cat(alone))}")
