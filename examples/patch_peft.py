"""A PEFT prefix-tuning script with one added line, ``fastprefix.patch(model)``, compared with PEFT alone.

    python examples/patch_peft.py

The same model is trained twice, by PEFT as it is and patched. The losses agree; the patched model saves fewer bytes for
the backward pass, because PEFT copies the prefix into every row of the batch.
"""

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import fastprefix

llama = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip


def train(patched: bool) -> tuple[list[float], int]:
    """The losses of five steps, and the bytes that the last step saves for its backward pass."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama)
    batch = torch.randint(0, 64, (16, 12))  # [B, S] token ids
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=128))
    if patched:
        fastprefix.patch(model)  # the one added line
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        saved = {}  # each storage that autograd keeps, once

        def keep(x: torch.Tensor) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()  # noqa: B023 - called within this step only
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, sum(storage.nbytes() for storage in saved.values())


(with_peft, peft_bytes), (with_patch, patched_bytes) = train(patched=False), train(patched=True)
print(f"losses with PEFT: {[round(x, 4) for x in with_peft]}")
print(f"losses patched:   {[round(x, 4) for x in with_patch]}")
print(f"saved for backward: {peft_bytes / 2**20:.1f} MiB with PEFT, {patched_bytes / 2**20:.1f} MiB patched")
