"""The methods of the family that the library has: the source of ``docs/methods.md``.

``python -m tests.project.method_table`` writes that page. A method is one entry of ``METHODS``: its example runs with
the page's other examples, in their order, and the test that judges it has to exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"


class Method(NamedTuple):
    """One method of the family."""

    name: str
    paper: str  # who, when, and where it is to be read; empty where there is none
    example: str  # at most five lines; it leaves the model bare
    test: str  # file::function that holds it to concatenation or to the paper's formula
    docs: str  # page, with an anchor


METHODS = (
    Method("Prefix tuning", "[Li and Liang 2021](https://arxiv.org/abs/2101.00190)", """
prefix = fastprefix.attach(model, PrefixConfig(num_virtual_tokens=16))
model(**batch, labels=batch.input_ids).loss.backward()  # of the prefix alone: the model is frozen
fastprefix.detach(model)
""", "tests/models/test_conformance.py::test_equals_explicit_concatenation", "quickstart.md"),
    Method("Prefix tuning through an MLP", "[Li and Liang 2021](https://arxiv.org/abs/2101.00190), section 4.3", """
fastprefix.attach(model, PrefixConfig(16, prefix_projection=True, encoder_hidden_size=64))
model(**batch, labels=batch.input_ids).loss.backward()
fastprefix.bake(model)  # for use: the MLP's output takes its place
fastprefix.detach(model)
""", "tests/hf/adapters/test_attach.py::test_text_init_through_the_mlp", "saving.md"),
    Method("Prefix that starts from a text", "[Li and Liang 2021](https://arxiv.org/abs/2101.00190)", """
fastprefix.attach(model, PrefixConfig(init=init.text("Define the word.", tokenizer)))
logits = model(**batch).logits  # as with the text in front of each row
fastprefix.detach(model)
""", "tests/hf/adapters/test_attach.py::test_text_init_elsewhere", "reference.md#where-training-starts"),
    Method("Prompt tuning", "[Lester et al. 2021](https://arxiv.org/abs/2104.08691)", """
fastprefix.attach(model, PromptConfig(20, init=init.vocabulary()))
model(**batch, labels=batch.input_ids).loss.backward()  # the prompt runs once, not once for each row
fastprefix.detach(model)
""", "tests/hf/runtime/test_soft_prompts.py::test_equals_concatenated_embeddings",
           "prompts-and-batches.md#soft-prompts"),
    Method("Prompt tuning from class labels", "[Lester et al. 2021](https://arxiv.org/abs/2104.08691)", """
start = init.labels([" positive", " negative"], tokenizer)
fastprefix.attach(model, PromptConfig(20, init=start))
fastprefix.detach(model)
""", "tests/hf/adapters/test_soft_prompt_configs.py::test_starts_from_labels_then_from_the_vocabulary",
           "prompts-and-batches.md#soft-prompts"),
    Method("Ensemble of prompts", "[Lester et al. 2021](https://arxiv.org/abs/2104.08691)", """
for name in ("one", "two", "three"):
    fastprefix.attach(model, PromptConfig(8), name)
votes = fastprefix.ensemble(model, ["one", "two", "three"], **batch).votes
fastprefix.detach(model)
""", "tests/hf/adapters/test_ensemble.py::test_each_members_logits_are_those_of_its_prefix_alone",
           "prompts-and-batches.md#an-ensemble-of-prompts"),
    Method("Tokens that a prompt is near", "[Lester et al. 2021](https://arxiv.org/abs/2104.08691)", """
fastprefix.attach(model, PromptConfig(8))
print(fastprefix.nearest_tokens(model, k=3, tokenizer=tokenizer).tokens)
fastprefix.detach(model)
""", "tests/hf/adapters/test_nearest_tokens.py::test_equals_a_comparison_with_all",
           "prompts-and-batches.md#which-tokens-a-prompt-is-near"),
    Method("Place of a prompt in the text", "", """
fastprefix.attach(model, PromptConfig(8, place=len(tokenizer)))  # at a marker token, or place="after"
rows = torch.tensor([[5, 6, len(tokenizer), 7, 8]])
model(input_ids=rows, labels=rows).loss.backward()
fastprefix.detach(model)
""", "tests/hf/runtime/test_inserted_prompts.py::test_equals_embeddings_in_every_row",
           "prompts-and-batches.md#a-place-in-the-text"),
    Method("P-tuning", "[Liu et al. 2021](https://arxiv.org/abs/2103.10385)", """
fastprefix.attach(model, PromptConfig(20, encoder="lstm", encoder_hidden_size=64))
model(**batch, labels=batch.input_ids).loss.backward()
fastprefix.bake(model)
fastprefix.detach(model)
""", "tests/hf/adapters/test_prompt_encoders.py::test_equals_its_output_concatenated",
           "prompts-and-batches.md#prompts-through-an-encoder"),
    Method("Checkpoints of P-tuning v2", "[Liu et al. 2022](https://arxiv.org/abs/2110.07602)", """
numbers = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
torch.save({"prefix_encoder.embedding.weight": torch.randn(8, numbers)}, "pytorch_model.bin")
fastprefix.load(model, "pytorch_model.bin")
fastprefix.detach(model)
""", "tests/hf/storage/test_prefix_encoder.py::test_p_tuning_v2", "saving.md#checkpoints-of-p-tuning-v2-and-chatglm"),
    Method("Search for a hard prompt", "AutoPrompt, [Shin et al. 2020](https://arxiv.org/abs/2010.15980)", """
labels = batch.input_ids.clone()
labels[:, :-1] = -100
found = fastprefix.search_hard_prompt(model, batch.input_ids, labels, num_tokens=2, steps=1, candidates=4)
fastprefix.detach(model)
""", "tests/hf/sharing/test_hard_prompt_search.py::test_a_planted_prompt_is_found",
           "sharing.md#a-search-for-a-prompt-of-tokens"),
    Method("A prefix for each row", "", """
for name in ("legal", "medical"):
    fastprefix.attach(model, PrefixConfig(8), name)
with fastprefix.prefix_batch(model, ["legal", "medical"]):
    model.generate(**batch, max_new_tokens=2, pad_token_id=0)
fastprefix.detach(model)
""", "tests/hf/runtime/test_prefix_batch.py::test_equals_separate_runs",
           "prompts-and-batches.md#a-prefix-for-each-row"),
    Method("Prefixes made of prefixes", "", """
law, medicine = (fastprefix.attach(model, PrefixConfig(8), name) for name in ("law", "medicine"))
fastprefix.attach(model, PrefixConfig(init=init.concat(law, medicine)), "both")
fastprefix.attach(model, PrefixConfig(init=init.average(law, medicine)), "mean")
fastprefix.detach(model)
""", "tests/hf/adapters/test_arithmetic.py::test_concat_average_slice_and_drop_are_what_they_say",
           "prompts-and-batches.md#prefixes-made-of-prefixes"),
    Method("Prompts of tokens that rows share", "", """
with fastprefix.shared_prompt(model, tokenizer("Define the word.").input_ids):
    logits = model(**batch).logits
fastprefix.detach(model)
""", "tests/hf/sharing/test_shared_prompt.py::test_equals_repeating_the_prompt_with_gradients_into_the_model",
           "sharing.md"),
    Method("Prefix behind trained gates", "[Zhang et al. 2023](https://arxiv.org/abs/2303.16199)", """
fastprefix.attach(model, PrefixConfig(16, gate="tanh"))  # it starts at the model's own outputs
model(**batch, labels=batch.input_ids).loss.backward()
fastprefix.detach(model)
""", "tests/hf/adapters/test_gates.py::test_equals_the_formula",
           "prompts-and-batches.md#a-prefix-behind-a-gate"),
    Method("LLaMA-Adapter", "[Zhang et al. 2023](https://arxiv.org/abs/2303.16199)", """
fastprefix.attach(model, fastprefix.LlamaAdapterConfig(num_virtual_tokens=10, num_layers=1))
model(**batch, labels=batch.input_ids).loss.backward()
fastprefix.detach(model)
""", "tests/hf/adapters/added/test_llama_adapter.py::test_equals_the_formula",
           "prompts-and-batches.md#llama-adapter"),
    Method("PrefixMemory-Tuning", "[Wang et al. 2025](https://arxiv.org/abs/2506.13674)", """
fastprefix.attach(model, fastprefix.PrefixMemoryConfig())
model(**batch, labels=batch.input_ids).loss.backward()
fastprefix.detach(model)
""", "tests/hf/adapters/added/test_prefix_memory.py::test_equals_the_formula",
           "prompts-and-batches.md#a-prefix-memory"),
    Method("A bias on prefix tokens", "Attention Matching, [Zweiger et al. 2026](https://arxiv.org/abs/2602.16284)", """
fastprefix.attach(model, PrefixConfig(16, prefix_bias=True))
model(**batch, labels=batch.input_ids).loss.backward()
fastprefix.detach(model)
""", "tests/hf/adapters/test_prefix_bias.py::test_equals_concatenation",
           "prompts-and-batches.md#a-bias-on-prefix-tokens"),
    Method("Dropout of prefix tokens", "", """
fastprefix.attach(model.train(), PrefixConfig(16, dropout=0.1))
model(**batch, labels=batch.input_ids).loss.backward()
fastprefix.detach(model.eval())
""", "tests/hf/adapters/test_token_dropout.py::test_a_step_is_one_of_the_prefix_without_the_dropped_tokens",
           "prompts-and-batches.md#dropout-frozen-tokens-values-of-zero"),
    Method("Attention Matching", "[Zweiger et al. 2026](https://arxiv.org/abs/2602.16284)", """
text = "the colour of grass is green, and the colour of snow is white"
start = fastprefix.attention_matching(model, text, tokens=6, tokenizer=tokenizer, mass="bias")
fastprefix.attach(model, PrefixConfig(init=start, prefix_bias=True))
fastprefix.detach(model)
""", "tests/cartridges/test_matching.py::test_keeping_every_token_keeps_attention_exactly",
           "cartridges.md#attention-matching"),
    Method("Cartridge", "[Eyuboglu et al. 2025](https://arxiv.org/abs/2506.06266)", """
config = fastprefix.CartridgeConfig(tokens=8, num_conversations=6, answer_tokens=4, top_k=8, max_steps=2)
text = "the colour of grass is green, and the colour of snow is white"
print(fastprefix.train_cartridge(model, tokenizer, text, "cartridge", config).text())
fastprefix.detach(model)
""", "tests/cartridges/test_targets.py::test_with_the_whole_vocabulary_it_is_the_divergence_and_so_is_its_gradient",
           "cartridges.md"),
    Method("Deep prompts in an encoder", "P-tuning v2, [Liu et al. 2022](https://arxiv.org/abs/2110.07602)", """
from transformers import BertConfig, BertForSequenceClassification

bert = BertForSequenceClassification(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)).eval()
fastprefix.attach(bert, PrefixConfig(16, modules_to_save=["classifier"]))
bert(input_ids=torch.ones(2, 5, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
fastprefix.detach(bert)
""", "tests/models/test_deep_prompts.py::test_a_head_trains_with_the_prefix",
           "prompts-and-batches.md#encoders-with-a-head"),
    Method("Prompt tuning of an encoder-decoder", "[Lester et al. 2021](https://arxiv.org/abs/2104.08691)", """
from transformers import T5Config, T5ForConditionalGeneration

t5 = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=2, decoder_start_token_id=0)).eval()
fastprefix.attach(t5, PromptConfig(20, init=init.normal(0.5)))
t5(input_ids=torch.ones(2, 5, dtype=torch.long), labels=torch.ones(2, 3, dtype=torch.long)).loss.backward()
fastprefix.detach(t5)
""", "tests/models/test_encoder_decoder_prompts.py::test_equals_concatenated_embeddings",
           "prompts-and-batches.md#prompts-of-encoder-decoders"),
    Method("PEFT's models", "", """
from peft import PrefixTuningConfig, get_peft_model

peft_model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
fastprefix.patch(peft_model)
peft_model(**batch, labels=batch.input_ids).loss.backward()
""", "tests/hf/peft/test_patch.py::test_language_models", "peft.md"),
)  # fmt: skip

HEAD = """# Methods

<!-- Written by python -m tests.project.method_table -->

What the library has of the family of prefix tuning. Every example runs as a test, and the test that is named holds the
method to concatenation or to the paper's formula.
"""
SETUP = """```python
import torch
import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
batch = tokenizer(["the colour of snow is white", "the colour of coal is black"], return_tensors="pt")
batch.pop("token_type_ids", None)
```
"""


def page() -> str:
    """The text of ``docs/methods.md``."""
    rows = ["| method | paper | judged by | more |", "|---|---|---|---|"]
    examples = []
    for method in METHODS:
        anchor = method.name.lower().replace(" ", "-").replace("'", "")
        title = method.docs.partition(".")[0].replace("-", " ")
        judge = method.test.rpartition("::")
        rows.append(f"| [{method.name}](#{anchor}) | {method.paper} | `{judge[2]}` | [{title}]({method.docs}) |")
        examples.append(f"### {method.name}\n\n```python\n{method.example.strip()}\n```\n\nJudged by `{judge[0]}`.\n")
    return "\n".join([HEAD, *rows, "", "## Examples\n\nThey use this model:\n", SETUP, "\n".join(examples)])


if __name__ == "__main__":
    PAGE.write_text(page())
