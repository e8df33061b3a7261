"""What users do, on tiny models, with PEFT alone or patched; each gives what came of it in a few words.

What it ought to be comes by other means: the same rows alone, without padding, without the feature, or with explicit
concatenation, and always from a model that is not patched.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import peft
import torch
from torch import Tensor

import fastprefix
from tests.model_zoo.architectures import ROWS
from tests.model_zoo.encoder_decoders import ROWS as ENCODER_DECODERS
from tests.model_zoo.peft_models import (
    ENCODERS,
    GREEDY,
    PREFIX,
    P,
    S,
    add,
    concatenated,
    gradient,
    ids,
    padding,
    train,
    trainer,
    tuned,
)
from tests.support.tiny_models import tiny_model

RIGHT = "right"


def compared(what: str, got: Tensor, want: Tensor) -> str:
    """How far apart, by one digit."""
    error = (got - want).abs().max().item()
    return RIGHT if error < 1e-4 else f"{what} off by {float(f'{error:.1g}'):g}"


def tokens(got: Tensor, want: Tensor) -> str:
    """Whether two generations are the same."""
    return RIGHT if torch.equal(got, want) else "other tokens"


def adding_while_checkpointing(patched: bool) -> str:
    model, plain = tuned(patched), tuned(False)
    model.gradient_checkpointing_enable()
    for x in (model, plain):
        add(x)
        x.set_adapter("other")
    got, want = (gradient(x, input_ids=ids(), labels=ids()) for x in (model, plain))
    return compared("gradients", got, want)


def checkpointing(patched: bool) -> str:
    model, batch = tuned(patched), {"input_ids": ids(), "labels": ids()}
    want = gradient(tuned(False), **batch)
    model.gradient_checkpointing_enable()
    return compared("gradients", gradient(model, **batch), want)


def left_padding(patched: bool, cls: Any) -> str:
    got = tuned(patched, cls)(input_ids=ids(), attention_mask=padding("left")).logits[0, -1]
    return compared("logits", got, tuned(False, cls)(input_ids=ids()[:1, 4:]).logits[0, -1])


def left_padding_in_generate(patched: bool, cls: Any) -> str:
    got = tuned(patched, cls).generate(input_ids=ids(), attention_mask=padding("left"), **GREEDY)[:1, S:]
    return tokens(got, tuned(False, cls).generate(input_ids=ids()[:1, 4:], **GREEDY)[:, S - 4 :])


def packing(patched: bool, cls: Any) -> str:
    positions = torch.arange(S).repeat(2)[None]
    got = tuned(patched, cls)(input_ids=ids(2).view(1, -1), position_ids=positions).logits[0, -2 * S :]
    return compared("logits", got, tuned(False, cls)(input_ids=ids(2)).logits[:, -S:].flatten(0, 1))


def second_turn(patched: bool, cls: Any) -> str:
    model = tuned(patched, cls)
    first = model.generate(input_ids=ids(), return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, ids()[:, :3]], 1)
    both = {"input_ids": text, "attention_mask": torch.ones_like(text), **GREEDY}
    got = model.generate(past_key_values=first.past_key_values, **both)
    return tokens(got, tuned(False, cls).generate(**both))


def generating(patched: bool, cls: Any = PREFIX, **options: Any) -> str:
    got = tuned(patched, cls).generate(input_ids=ids(), **options, **GREEDY)
    return tokens(got, tuned(False, cls).generate(input_ids=ids(), **GREEDY))


def static(patched: bool, cls: Any) -> str:
    return generating(patched, cls, cache_implementation="static")


def lookup(patched: bool, cls: Any) -> str:
    given = {"input_ids": ids(1, 6).repeat(1, 2), **GREEDY, "max_new_tokens": 12}
    got = tuned(patched, cls).generate(prompt_lookup_num_tokens=3, **given)
    return tokens(got, tuned(False, cls).generate(**given))


def generating_from_embeddings(patched: bool) -> str:
    model = tuned(patched)
    given = {"inputs_embeds": model.get_input_embeddings()(ids()), "attention_mask": torch.ones_like(ids())}
    return tokens(model.generate(**given, **GREEDY), tuned(False).generate(input_ids=ids(), **GREEDY)[:, S:])


def adapter_names(patched: bool, generate: bool) -> str:
    both, alone = tuned(patched), tuned(False)
    add(both), add(alone)

    def run(model: Any, rows: slice = slice(None), **kwargs: Any) -> Tensor:
        given = {"input_ids": ids()[rows], **kwargs}
        return model.generate(**given, **GREEDY) if generate else model(**given).logits

    want = [run(alone, slice(0, 1))]
    alone.set_adapter("other")
    want.append(run(alone, slice(1, 2)))
    with alone.disable_adapter():
        want.append(run(alone, slice(2, 3)))
    got = run(both, adapter_names=["default", "other", "__base__"])
    return tokens(got, torch.cat(want)) if generate else compared("logits", got, torch.cat(want))


def window(patched: bool) -> str:
    model, base = tuned(patched, row="mistral_window"), ROWS["mistral_window"].build()
    got = model(input_ids=ids()).logits[:, -1]
    want = concatenated(model, base, input_ids=ids()).logits[:, -1]
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.neg_()
    unseen = torch.equal(model(input_ids=ids()).logits[:, -1], got)
    return "late tokens never see it" if unseen else compared("logits", got, want)


def zero(patched: bool) -> str:
    model = tuned(patched, init_weights="zero")
    train(model, 5)
    rank = torch.linalg.matrix_rank(model.prompt_encoder.default.embedding.weight.detach()).item()
    return RIGHT if rank == P else f"after 5 steps {P} tokens of rank {rank}"


def resuming(patched: bool, cls: Any) -> str:
    want = train(tuned(False, cls, **ENCODERS[cls]), 6)
    model = tuned(patched, cls, **ENCODERS[cls])
    train(model, 3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if patched:
            again = tuned(True, cls, **ENCODERS[cls])
            again.load_adapter(folder, "default", is_trainable=True)
        else:
            again = peft.PeftModel.from_pretrained(ROWS["llama_gqa"].build(), folder, is_trainable=True)
    return compared("losses", torch.tensor(train(again, 3)), torch.tensor(want[3:]))


def trainer_resumes(patched: bool, cls: Any) -> str:
    whole, first, again = (tuned(on, cls, base=tiny_model(), **ENCODERS[cls]) for on in (False, patched, patched))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        trainer(whole, one, 6).train()
        trainer(first, other, 3).train()
        trainer(again, other, 6).train(resume_from_checkpoint=True)
    got, want = (torch.cat([p.detach().flatten() for p in m.prompt_encoder.parameters()]) for m in (again, whole))
    return compared("weights", got, want)


def best_checkpoint(patched: bool) -> str:
    model = tuned(patched, base=tiny_model(), **ENCODERS[PREFIX])
    # The highest loss counts as the best, so that it is not the last.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(model, folder, 6, eval_strategy="steps", eval_steps=3, **best)
        run.train()
        losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
        return compared("loss", torch.tensor(run.evaluate()["eval_loss"]), torch.tensor(losses[3]))


def disabled_classifier(patched: bool) -> str:
    def base() -> Any:
        return replace(ROWS["llama_gqa"], cls="LlamaForSequenceClassification").build()

    model = tuned(patched, base=base(), task_type="SEQ_CLS")
    with model.disable_adapter():
        return compared("logits", model(input_ids=ids()).logits, base()(input_ids=ids()).logits)


def unwrapped(patched: bool) -> str:
    model, want = tuned(patched), tuned(False)(input_ids=ids()).logits
    got = model.get_base_model()(input_ids=ids()).logits
    vanished = torch.equal(got, ROWS["llama_gqa"].build()(input_ids=ids()).logits)
    return "the prefix vanishes" if vanished else compared("logits", got, want)


SIZES = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}  # PEFT does not know DistilBERT's names for them


def no_past(patched: bool, cls: str, task: str) -> str:
    row = replace(ROWS["distilbert"], cls=cls)
    model, bare = tuned(patched, base=row.build(), task_type=task, **SIZES), row.build()
    got, want = model(input_ids=ids())[0], concatenated(model, bare, input_ids=ids())[0]
    ignored = torch.equal(got, bare(input_ids=ids())[0])
    return "the prefix is ignored" if ignored else compared("output", got, want)


def slots_of_an_encoder_decoder(patched: bool) -> str:
    """Which of the prefix's slots get a gradient."""
    torch.manual_seed(0)
    base = replace(ENCODER_DECODERS["bart"], options={**ENCODER_DECODERS["bart"].options, "decoder_layers": 2}).build()
    model = peft.get_peft_model(base, PREFIX(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM")).eval()
    if patched:
        fastprefix.patch(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    grad = model.prompt_encoder.default.embedding.weight.grad.view(P, 4, -1).abs().sum((0, 2))
    return RIGHT if (grad > 0).all() else f"{int((grad == 0).sum())} of 4 slots are never trained"
