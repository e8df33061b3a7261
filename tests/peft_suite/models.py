"""Tiny random models under the names PEFT's tests pull from the hub, laid out as the hub's own cache.

``from_pretrained`` stays PEFT's and transformers' own: under ``HF_HUB_OFFLINE`` it reads this cache and nothing else.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

# PEFT finds the word embeddings by their first dimension: no other parameter may have it.
VOCAB = 320
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
IMAGE_TOKEN = len(SPECIAL) + 256
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # large enough that a prompt is seen in the logits
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLM = {**_SIZES, **_IDS}
_GQA = {**_LLM, "num_key_value_heads": 2}
_GEMMA3 = {**_GQA, "head_dim": 8, "sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA4 = {  # two layers of their own and two that share keys and values; full attention has its own head dim
    **_GQA,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.15,
    **_IDS,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 512, "init_std": 0.15} | {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in {"layers": 2, "ffn_dim": 48, "attention_heads": 4}.items()
}
_DEBERTA = {**_SIZES, "pad_token_id": 0, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _of(config: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, config)(**options)


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(**_CLIP, image_size=28, patch_size=14, projection_dim=32)
    text = transformers.LlamaConfig(**_LLM)
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=4, pad_token_id=0
    )


def _gemma4() -> Any:
    # Like the E2B checkpoints a model of several modalities, of which the tests use text.
    return transformers.Gemma4Config(
        text_config=transformers.Gemma4TextConfig(**_GEMMA4), vision_config=None, audio_config=None
    )


# Asked in this order: a pattern of the hub's name, the config, and the class where the name says none.
FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (_llava, "LlavaForConditionalGeneration"),
    "gemma4": (_gemma4, "Gemma4ForConditionalGeneration"),
    "gemma3": (_of("Gemma3TextConfig", **_GEMMA3), "Gemma3ForCausalLM"),
    "gptj": (_of("GPTJConfig", **_GPT, rotary_dim=4), "GPTJForCausalLM"),
    "gpt2": (_of("GPT2Config", **_GPT), "GPT2LMHeadModel"),
    "optfor": (_of("OPTConfig", **_LLM, ffn_dim=48, word_embed_proj_dim=32), "OPTForCausalLM"),
    "tiny-(random-)?llama": (_of("LlamaConfig", **_LLM), "LlamaForCausalLM"),
    "mistral": (_of("MistralConfig", **_GQA, sliding_window=256), "MistralForCausalLM"),
    "qwen2": (_of("Qwen2Config", **_GQA), "Qwen2ForCausalLM"),
    "qwen3": (_of("Qwen3Config", **_GQA, head_dim=16), "Qwen3ForCausalLM"),
    "t5": (_of("T5Config", **_T5), "T5ForConditionalGeneration"),
    "bart": (_of("BartConfig", **_BART), "BartForConditionalGeneration"),
    "debertav2": (_of("DebertaV2Config", **_DEBERTA), "DebertaV2Model"),
    "deberta": (_of("DebertaConfig", **_DEBERTA), "DebertaModel"),
    "roberta": (_of("RobertaConfig", **_SIZES), "RobertaModel"),  # its padding index, 1, is most of the tests' ids
    "bert": (_of("BertConfig", **_SIZES, pad_token_id=0), "BertModel"),
}
_CLASS = re.compile(r"[A-Z]\w*?(?:ForCausalLM|ForSequenceClassification|ForConditionalGeneration|LMHeadModel|Model)")
# The checkpoint behind this name scores with one output.
_ONE_LABEL = "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"


def architecture(name: str) -> tuple[str, Callable[[], Any]] | None:
    """The class and the config that a name on the hub asks for; None: nothing here stands in for it."""
    short = name.split("/")[-1]
    if short.endswith("-lora"):  # an adapter
        return None
    for pattern, (config, default) in FAMILIES.items():
        if re.search(pattern, short.lower()):
            named = _CLASS.search(short)
            return (named.group() if named else default), config
    return None


def build(name: str) -> Any:
    """The model behind a name: always the same numbers, the random state left as it was."""
    found = architecture(name)
    if found is None:
        raise ValueError(f"nothing stands in for {name}")
    cls, make = found
    config = make()
    if name == _ONE_LABEL:
        config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, cls)(config).eval()


def tokenizer() -> Any:
    """One token per byte; pad 0, bos 1, eos 2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    symbols = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "<image>")
    raw = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    raw.add_special_tokens([AddedToken(symbol) for symbol in (*SPECIAL, "<image>")])
    names = {f"{symbol[1:-1]}_token": symbol for symbol in SPECIAL}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def _processor() -> Any:
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        images, tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def write_hub(root: Path, names: Iterable[str]) -> Path:
    """The cache with these models and their tokenizers, made once for each content of this file and each version."""
    names = [name for name in names if architecture(name)]
    content = Path(__file__).read_text() + transformers.__version__ + torch.__version__ + " ".join(names)
    commit = hashlib.sha1(content.encode()).hexdigest()
    hub = root / f"hub-{commit[:10]}"
    if not hub.exists():
        making = root / f"hub-{commit[:10]}.part"
        shutil.rmtree(making, ignore_errors=True)
        for name in names:
            folder = making / f"models--{name.replace('/', '--')}"
            snapshot = folder / "snapshots" / commit
            build(name).save_pretrained(snapshot)
            (_processor() if "Llava" in name else tokenizer()).save_pretrained(snapshot)
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text(commit)
        making.rename(hub)
    return hub
