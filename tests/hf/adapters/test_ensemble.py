"""``ensemble``: each member's logits are those of its prefix alone, and the votes are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.model_zoo.architectures import ROWS, VOCAB

IDS = torch.arange(3, 19).view(2, 8) % VOCAB


def model_with_members(row: str = "llama_gqa") -> Any:
    model = ROWS[row].build(torch.float64)
    for name, tokens in (("a", 3), ("b", 5)):
        fastprefix.attach(model, PrefixConfig(tokens, init=init.normal(1.0)), name).to(torch.float64)
    fastprefix.attach(model, PromptConfig(4, init=init.normal(1.0)), "prompt").to(torch.float64)
    fastprefix.set_prefix(model, None)
    return model


def test_each_members_logits_are_those_of_its_prefix_alone() -> None:
    model, names = model_with_members(), ["a", "prompt", None, ("a", "b")]
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    with torch.no_grad():  # rotary angles are fp32, and the bare model's begin at another position with padding
        found = fastprefix.ensemble(model, names, input_ids=IDS, attention_mask=mask)
        for i, name in enumerate(names):
            with fastprefix.prefix_batch(model, [name]):
                want = model(input_ids=IDS, attention_mask=mask).logits
            torch.testing.assert_close(found.logits[i, 0], want[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.logits[i, 1, 3:], want[1, 3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.probabilities, found.logits.float().softmax(-1).mean(0))
    assert found.votes.shape == IDS.shape


def test_votes_are_counted_and_probabilities_decide_between_equal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_members()
    said = torch.tensor(
        [
            [[9.0, 0.0, 0.0], [3.0, 0.0, 0.0]],  # a: class 0, and class 0 with doubts
            [[0.0, 1.0, 0.0], [0.0, 9.0, 0.0]],  # b: class 1, narrowly; class 1 for sure
            [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
        ]
    )
    forward = type(model).forward

    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = said[: len(output.logits) // 2].flatten(0, 1)
        return output

    monkeypatch.setattr(type(model), "forward", replaced)
    three = fastprefix.ensemble(model, ["a", "b", "b"], input_ids=IDS)
    assert three.votes.tolist()[0] == 1  # two against one, however sure that one is
    assert three.probabilities[0].argmax() == 0
    assert fastprefix.ensemble(model, ["a", "b"], input_ids=IDS).votes.tolist() == [0, 1]


def test_a_classifier_and_gradients_of_all_members() -> None:
    model = model_with_members()
    members = {name: list(model._fastprefix.selection.prefixes[name].parameters()) for name in ("a", "b")}
    found = fastprefix.ensemble(model, ["a", "b"], input_ids=IDS)
    assert found.logits.shape == (2, 2, 8, VOCAB)
    torch.nn.functional.nll_loss(found.probabilities.log().flatten(0, 1), IDS.flatten()).backward()
    for name in members:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in members[name])


@pytest.mark.parametrize(
    ("names", "more", "says"),
    [
        ("a", {}, "names: got 'a', expected a list of names"),
        ([], {}, "names: got \\[\\], expected a list of names"),
        (["a", "x"], {}, "names: got 'x'"),
        (["a"], {"labels": IDS}, "labels: got Tensor, expected none"),
    ],
)
def test_wrong_calls(names: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fastprefix.ensemble(model_with_members(), names, input_ids=IDS, **more)


def test_a_number_for_each_place_is_no_row() -> None:
    """Even where there are as many places as rows; positions are each row's own."""
    model, ids = model_with_members(), IDS[:, :2]
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    model.register_forward_pre_hook(look, with_kwargs=True)
    positions = torch.arange(2)[None].repeat(2, 1)
    places = torch.arange(2)
    with torch.no_grad():
        fastprefix.ensemble(model, ["a", "b", None], input_ids=ids, position_ids=positions, cache_position=places)
    assert seen["input_ids"].shape == seen["position_ids"].shape == (6, 2)
    assert torch.equal(seen["cache_position"], places)


def test_adapters_of_a_patched_peft_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made = peft.get_peft_model(ROWS["llama_gqa"].build(), config, adapter_name="a")
    made.add_adapter("b", config)
    fastprefix.patch(made)
    with torch.no_grad():
        found = fastprefix.ensemble(made, ["a", "b"], input_ids=IDS)
        for i, name in enumerate("ab"):
            made.set_adapter(name)
            torch.testing.assert_close(found.logits[i], made(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found.logits[0], found.logits[1])
