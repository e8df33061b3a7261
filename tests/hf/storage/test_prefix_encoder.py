"""Checkpoints of P-tuning v2 and ChatGLM, against their own formula: the encoder's output as past keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastprefix
from fastprefix.prefixes.prefix import Prefix
from tests.model_zoo.architectures import ROWS, VOCAB
from tests.model_zoo.trained_heads import ids, model
from tests.support.concat_oracle import run_concat
from tests.support.tiny_models import tiny_model

P, HIDDEN = 3, 5
BERT = "BertForSequenceClassification"


class PrefixEncoder(nn.Module):
    """P-tuning v2's, by its names: an embedding, and an MLP of two layers with tanh if it is projected."""

    def __init__(self, d: int, numbers: int, projected: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(P, d if projected else numbers)
        layers = [nn.Linear(d, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, numbers)]
        self.trans = nn.Sequential(*layers) if projected else nn.Identity()

    def forward(self) -> Tensor:
        x: Tensor = self.trans(self.embedding.weight)
        return x


def checkpoint(of: Any, d: int, numbers: int, projected: bool, at: str = "") -> tuple[PrefixEncoder, dict[str, Tensor]]:
    """An encoder, and the weights of a whole model with it."""
    encoder = PrefixEncoder(d, numbers, projected)
    own = {f"{at}prefix_encoder.{name}": x for name, x in encoder.state_dict().items()}
    return encoder, {**{name: x.clone() for name, x in of.state_dict().items()}, **own}


def past(output: Tensor, layers: int, heads: int) -> list[tuple[Tensor, Tensor]]:
    """The repositories' ``get_prompt``: ``view(P, 2 L, heads, dim)``, then one pair of slots for each layer."""
    slots = output.double().view(P, 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return [(kv[0], kv[1]) for kv in slots.split(2)]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("projected", [False, True])
def test_p_tuning_v2(projected: bool, file: str, tmp_path: Path) -> None:
    trained, fresh = model(BERT, seed=1), model(BERT, seed=2)
    encoder, weights = checkpoint(trained, 16, 2 * 2 * 16, projected)
    weights["bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(weights, tmp_path / file) if file.endswith("bin") else save_file(weights, tmp_path / file)
    assert not torch.equal(trained.classifier.weight, fresh.classifier.weight)
    prefix = fastprefix.load(fresh, tmp_path)
    assert isinstance(prefix, Prefix) and (prefix.encoder is not None) == projected
    assert prefix.config.modules_to_save == ("classifier",) and fresh.classifier.weight.requires_grad
    pairs = past(encoder(), layers=2, heads=2)
    names = [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    positions = torch.arange(P, P + 7)[None].expand(4, -1)
    want = run_concat(trained, dict(zip(names, pairs, strict=True)), input_ids=ids(), position_ids=positions).logits
    got = fresh(input_ids=ids()).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # Training resumes: the gradient reaches what the checkpoint holds.
    labels = torch.tensor([0, 1, 2, 0])
    fresh(input_ids=ids(), labels=labels).loss.backward()
    torch.nn.functional.cross_entropy(want, labels).backward()
    given = prefix.encoder.embedding.grad if prefix.encoder is not None else None
    if given is not None:
        assert encoder.embedding.weight.grad is not None
        torch.testing.assert_close(given, encoder.embedding.weight.grad, rtol=1e-4, atol=1e-6)
    fastprefix.save(fresh, tmp_path / "again")
    again = model(BERT, seed=3)
    fastprefix.load(again, tmp_path / "again")
    torch.testing.assert_close(again(input_ids=ids()).logits, got)


def test_chatglm_with_grouped_heads_keeps_the_text_s_positions(tmp_path: Path) -> None:
    bare = ROWS["llama_gqa"].build(torch.float64)
    heads, layers = bare.config.num_key_value_heads, bare.config.num_hidden_layers
    dim = bare.config.head_dim
    encoder = PrefixEncoder(1, 2 * layers * heads * dim, projected=False)
    torch.save({"transformer.prefix_encoder.embedding.weight": encoder().detach().half()}, tmp_path / "prefix.bin")
    rows = torch.randint(3, VOCAB, (2, 6))
    pairs = past(encoder().detach().half().float(), layers, heads)
    names = [f"model.layers.{i}.self_attn" for i in range(layers)]
    want = run_concat(bare, dict(zip(names, pairs, strict=True)), input_ids=rows).logits
    prefix = fastprefix.load(bare, tmp_path / "prefix.bin")
    assert isinstance(prefix, Prefix) and prefix.offset == 0 and prefix.num_virtual_tokens == P
    torch.testing.assert_close(bare(input_ids=rows).logits, want, rtol=1e-5, atol=1e-5)


def without(name: str) -> Any:
    return lambda weights: weights.pop(name)


def with_shape(name: str, *shape: int) -> Any:
    return lambda weights: weights.update({name: torch.zeros(*shape)})


WRONG: dict[str, tuple[Any, str]] = {
    "no prefix": (without("prefix_encoder.embedding.weight"), "got weights without a prefix, expected prefix_encoder"),
    "no layer": (without("prefix_encoder.trans.2.bias"), r"prefix_encoder.trans.2.bias: got no such tensor"),
    "another layer": (
        with_shape("prefix_encoder.trans.2.weight", 64, HIDDEN + 1),
        r"prefix_encoder.trans.2.weight: got shape \[64, 6\], expected \[2\*L\*H_kv\*D, hidden\] = \[64, 5\]",
    ),
    "a stranger": (with_shape("prefix_encoder.trans.4.weight", 2), r"trans.4.weight: got a tensor of no known meaning"),
    "other width": (
        lambda w: w.update({"prefix_encoder.embedding.weight": torch.zeros(P, 8), "prefix_encoder.trans.0.weight":
                            torch.zeros(HIDDEN, 8)}),
        r"embedding: got shape \[3, 8\], expected shape = \[3, 16\]",
    ),
    "other numbers of layers": (
        lambda w: w.update({"prefix_encoder.trans.2.weight": torch.zeros(32, HIDDEN), "prefix_encoder.trans.2.bias":
                            torch.zeros(32)}),
        r"prompt_embeddings: got shape \[3, 32\], expected \[P, 2\*L\*H_kv\*D\] = \[3, 64\]",
    ),
    "nan": (lambda w: w["prefix_encoder.trans.2.bias"].fill_(torch.nan), r"trans.2.bias: got nan"),
    "another base": (
        lambda w: w["bert.encoder.layer.0.output.dense.weight"].add_(1.0),
        r"bert.encoder.layer.0.output.dense.weight: got other numbers.*in front of another model",
    ),
    "unknown tensor": (with_shape("dense.weight", 2, 2), r"dense.weight.: got a tensor that is no part of the prefix"),
    "another head": (
        with_shape("classifier.weight", 2, 2), r"base_model.classifier.weight: got shape \[2, 2\], expected shape \[3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str, tmp_path: Path) -> None:
    bare = model(BERT)
    _, weights = checkpoint(bare, 16, 64, projected=True)
    change, message = WRONG[what]
    change(weights)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    before = {name: x.clone() for name, x in bare.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fastprefix.load(bare, tmp_path)
    after = bare.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())


class Evil:
    """What a pickle may hold: a call."""

    def __reduce__(self) -> Any:
        return (print, ("called",))


@pytest.mark.parametrize("content", [Evil(), {"prefix_encoder.embedding.weight": Evil()}, [torch.zeros(2)], None])
def test_only_tensors_are_unpickled(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path) if content is not None else path.write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: got (no weights|list)"):
        fastprefix.load(tiny_model(), tmp_path)
    assert "called" not in capsys.readouterr().out
