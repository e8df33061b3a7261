"""Groups of completions that share a prompt, as in GRPO: each prompt runs through the model once.

    python examples/shared_prompt.py

All weights are trained here; LoRA, or nothing trained at all, works in the same way. The loss and the gradients are
those of the prompt repeated in front of every completion.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fastprefix

torch.manual_seed(0)
llama = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(llama)
prompts = torch.randint(0, 64, (2, 40))  # two prompts of 40 tokens
completions = torch.randint(0, 64, (8, 6))  # [B, S], four completions of each prompt
groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])  # [B], the prompt of each completion

with fastprefix.shared_prompt(model, prompts, groups=groups) as shared:
    # With labels, the first token of a completion counts in the loss, because the prompt predicts it.
    loss = model(input_ids=completions, labels=completions).loss
print(f"logits of each completion's first token: {list(shared.next_logits.shape)}")
loss.backward()
gradient = model.lm_head.weight.grad.clone()
model.zero_grad()

# The same with every prompt repeated.
rows = torch.cat([prompts[groups], completions], dim=1)
labels = torch.cat([torch.full_like(prompts[groups], -100), completions], dim=1)
repeated = model(input_ids=rows, labels=labels).loss
repeated.backward()
print(f"loss: {loss.item():.4f} shared, {repeated.item():.4f} repeated")
print(f"same gradient: {torch.allclose(gradient, model.lm_head.weight.grad, atol=1e-5)}")
print(f"tokens through the model: {prompts.numel() + completions.numel()} shared, {rows.numel()} repeated")
