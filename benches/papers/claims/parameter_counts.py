"""The counts of trained parameters that introductions give, counted in models that the library prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastprefix
from benches.papers.experiment import Experiment, Outcome, Row, Statement
from fastprefix import LlamaAdapterConfig, PrefixConfig, PromptConfig

# Widths, heads and layers are those of the models. The vocabulary and the inner width take no part in the counts, and
# are small so that the weights need little memory; what a whole model has is counted without any.
SMALL_LLAMA = {"vocab_size": 32, "intermediate_size": 8, "hidden_size": 4096, "num_attention_heads": 32, "head_dim": 4}


def run(seed: int, full: bool) -> Outcome:
    """Count; nothing is random, and there is no other size."""
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    medium = {"n_embd": 1024, "n_layer": 24, "n_head": 16}

    def gpt2() -> Any:
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(**medium, vocab_size=32, n_inner=8, bos_token_id=0, eos_token_id=0)
        ).eval()

    def llama(layers: int) -> Any:
        config = hf.LlamaConfig(**SMALL_LLAMA, num_key_value_heads=32, num_hidden_layers=layers)
        return hf.LlamaForCausalLM(config).eval()

    with torch.device("meta"):
        whole_gpt2 = _numbers(hf.GPT2LMHeadModel(hf.GPT2Config(**medium)))
    bare = gpt2().requires_grad_(False)
    lora = get_peft_model(bare, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    prefix = _trained(gpt2(), PrefixConfig(5))
    measured = {
        "prompt_4096": _trained(llama(1), PromptConfig(5)),
        "prefix_gpt2": prefix,
        "prefix_share": 100 * prefix / whole_gpt2,
        "mlp_gpt2": _trained(gpt2(), PrefixConfig(5, prefix_projection=True, encoder_hidden_size=512)),
        "llama_adapter": _trained(llama(32), LlamaAdapterConfig(10, num_layers=30)),
        "prompt_gpt2": _trained(gpt2(), PromptConfig(5)),
        "lora_gpt2": _numbers(lora, trained=True),
        "whole_gpt2": whole_gpt2,
    }
    return Outcome({key: float(value) for key, value in measured.items()})


def _numbers(model: Any, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def _trained(model: Any, config: Any) -> int:
    fastprefix.attach(model, config)
    return _numbers(model, trained=True)


def draw(outcomes: Sequence[Outcome]) -> Any:
    """Bars of trained parameters by method, GPT-2 medium."""
    from fastprefix.analysis.result import figure

    drawn = figure(7.5, 3.2)
    axes = drawn.subplots()
    names = {
        "prompt_gpt2": "soft prompt, P = 5",
        "prefix_gpt2": "prefix, P = 5, as stored",
        "lora_gpt2": "LoRA, rank 4, c_attn",
        "mlp_gpt2": "prefix, P = 5, while it trains by an MLP",
        "whole_gpt2": "full tuning",
    }
    counts = [outcomes[0].measured[key] for key in names]
    bars = axes.barh(list(names.values()), counts, color=("#2b83ba", "#2b83ba", "#d9772b", "#2b83ba", "#8a8a8a"))
    axes.bar_label(bars, labels=[f"{count:,.0f}" for count in counts], padding=3)
    axes.set(xscale="log", xlim=(1e3, 6e9), title="trained parameters, GPT-2 medium")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


COUNT = "{:,.0f}"
EXPERIMENT = Experiment(
    name="parameter_counts",
    claim="f",
    title="Counts of parameters",
    papers=(
        "[Li and Liang 2021](https://arxiv.org/abs/2101.00190), [Lester et al. "
        "2021](https://arxiv.org/abs/2104.08691), [Zhang et al. 2023](https://arxiv.org/abs/2303.16199)"
    ),
    setting=(
        "Trained parameters are counted in models that were prepared by `fastprefix.attach`, and by PEFT for LoRA. "
        "Their widths, heads and layers are those of GPT-2 medium, of a model of width 4096, and of LLaMA-7B."
    ),
    run=run,
    rows=(
        Row("prompt_4096", "soft prompt, 5 tokens of width 4096", "20,480", COUNT),
        Row("prefix_gpt2", "prefix, 5 tokens, GPT-2 medium: stored", "245,760", COUNT),
        Row("prefix_share", "the same as a share of the model (%)", "0.1", "{:.3f}"),
        Row("mlp_gpt2", "the same while it trains through an MLP of width 512", "", COUNT),
        Row("llama_adapter", "LLaMA-Adapter, 10 tokens in 30 of 32 layers, LLaMA-7B", "1.2 million", COUNT),
        Row("prompt_gpt2", "soft prompt, 5 tokens, GPT-2 medium", "", COUNT),
        Row("lora_gpt2", "LoRA of rank 4 on the attention's c_attn, GPT-2 medium", "", COUNT),
        Row("whole_gpt2", "full tuning, GPT-2 medium", "", COUNT),
    ),
    statements=(
        Statement(
            "A soft prompt of 5 tokens of width 4096 has 20,480 parameters, and a prefix of 5 tokens stores 245,760 "
            "for GPT-2 medium.",
            lambda x: x["prompt_4096"] == [20_480] and x["prefix_gpt2"] == [245_760],
        ),
        Statement("This prefix is 0.1% of the model, rounded.", lambda x: round(x["prefix_share"][0], 1) == 0.1),
        Statement("LLaMA-Adapter trains 1.2 million.", lambda x: round(x["llama_adapter"][0] / 1e6, 1) == 1.2),
    ),
    differs="It does not. LLaMA-Adapter's count has a gate for each of 32 heads in 30 layers, 960 numbers, in it.",
    against=(
        "What is stored is not what is trained: the MLP that Li and Liang train a prefix by has about a hundred "
        "times as many numbers, with gradients and the optimizer's state. Few parameters do not make training cheap "
        "either: gradients go through the whole model."
    ),
    draw=draw,
    seeds=(0,),
    minutes=0.35,
)
