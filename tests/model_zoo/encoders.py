"""Encoders of text."""

from __future__ import annotations

from tests.model_zoo.row import COMMON, GQA, NO_CACHE, Row, row

_BIDIRECTIONAL = "bidirectional, learned positions"
_BEHIND = {"notes": "bidirectional, positions after padding_idx", "positions_behind": 1}
_PAD_1 = {**COMMON, "pad_token_id": 1}
_ESM = {**_PAD_1, "mask_token_id": 4, "token_dropout": False}

ROWS: dict[str, Row] = {
    "bert": row("BERT", "Bert", "Model", COMMON, notes=_BIDIRECTIONAL),
    "roberta": row("RoBERTa", "Roberta", "Model", _PAD_1, **_BEHIND),
    "xlm_roberta": row("XLM-R", "XLMRoberta", "Model", _PAD_1, **_BEHIND),
    "camembert": row("CamemBERT", "Camembert", "Model", _PAD_1, **_BEHIND),
    "data2vec_text": row("data2vec (text)", "Data2VecText", "Model", _PAD_1, **_BEHIND),
    "distilbert": row(
        "DistilBERT", "DistilBert", "Model",
        {"vocab_size": 99, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        notes="bidirectional", peft=NO_CACHE,
    ),
    "electra": row("ELECTRA", "Electra", "Model", {**COMMON, "embedding_size": 16}, notes=_BIDIRECTIONAL),
    "albert": row(
        "ALBERT", "Albert", "Model", {**COMMON, "embedding_size": 16},
        notes="bidirectional; one module runs as every layer: one prefix", peft=NO_CACHE, modes=(),
    ),
    "ernie": row("ERNIE", "Ernie", "Model", COMMON, notes=_BIDIRECTIONAL),
    "modernbert": row(
        "ModernBERT", "ModernBert", "Model",
        {**COMMON, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        notes="bidirectional, mixed windows", peft=NO_CACHE,
    ),
    "eurobert": row(
        "EuroBERT", "EuroBert", "Model", GQA, notes="bidirectional, GQA", peft="content starts at 0 beside its prefix"
    ),
    "nomic_bert": row("Nomic BERT", "NomicBert", "Model", COMMON, notes="bidirectional", peft=NO_CACHE),
    "esm": row(
        "ESM-2", "Esm", "Model", {**_ESM, "position_embedding_type": "rotary"}, notes="bidirectional, of proteins",
        peft=NO_CACHE,
    ),
    "clip_text": row("CLIP (text)", "CLIPText", "Model", COMMON, notes="causal", peft=NO_CACHE, decoder=True),
    "siglip_text": row("SigLIP (text)", "SiglipText", "Model", COMMON, notes=_BIDIRECTIONAL, peft=NO_CACHE),
}  # fmt: skip
