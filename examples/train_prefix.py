"""Train a prefix on a frozen model, save it, and load it into a fresh copy of the model.

    python examples/train_prefix.py

The model is a tiny random Llama, so that the script runs in seconds and downloads nothing. For real work replace it by
``AutoModelForCausalLM.from_pretrained(...)`` and the random tokens by your data; nothing else changes.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fastprefix

torch.manual_seed(0)
llama = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(llama).eval()
base_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
batch = torch.randint(0, 64, (8, 12))  # [B, S] token ids

# The model is frozen; only the prefix, keys and values of 8 virtual tokens in each layer, has gradients.
prefix = fastprefix.attach(model, fastprefix.PrefixConfig(num_virtual_tokens=8))
optimizer = torch.optim.AdamW(prefix.parameters(), lr=3e-2)
losses = []
for _ in range(30):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

with tempfile.TemporaryDirectory() as folder:
    fastprefix.save(model, folder)  # PEFT can load this folder, too
    fresh = AutoModelForCausalLM.from_config(llama).eval()
    fresh.load_state_dict(base_weights)
    fastprefix.load(fresh, folder)
with torch.no_grad():
    same = torch.equal(fresh(input_ids=batch).logits, model(input_ids=batch).logits)
print(f"the loaded prefix gives the same logits: {same}")
