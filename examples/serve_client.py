"""Ask a running ``fastprefix serve`` for completions with each of its prefixes, and with the bare model.

fastprefix serve --model smollm2 --adapters adapters
python examples/serve_client.py
"""

import os

import openai

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
PROMPT = "The capital of France is"

client = openai.OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0)
try:
    models = client.models.list().data
except openai.APIConnectionError:
    models = []
    print(f"no server answers at {URL}: start one with fastprefix serve")

# The base model has no parent; each prefix is listed as a model whose parent it is.
for model in models:
    done = client.completions.create(model=model.id, prompt=PROMPT, max_tokens=16, temperature=0)
    print(f"{model.id}: {done.choices[0].text!r} ({done.usage.prompt_tokens} tokens of prompt)")

# The same, with the prefix as an argument of a chat with the base model.
bases = [model.id for model in models if getattr(model, "parent", None) is None]
prefixes = [model.id for model in models if getattr(model, "parent", None) is not None]
if bases and prefixes:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    extra = {"vllm_xargs": {"prefix": prefixes[0]}}
    chat = client.chat.completions.create(model=bases[0], messages=messages, max_tokens=16, extra_body=extra)
    print(f"{prefixes[0]}, in a chat: {chat.choices[0].message.content!r}")
