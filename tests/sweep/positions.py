"""Where content stands behind a prefix: the text in its context, or position ids and tables moved by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprefix import PrefixConfig, init
from fastprefix.hf.adapters.lookup import require_installation
from tests.sweep import oracles
from tests.sweep.models import inputs
from tests.sweep.models.inputs import Case, takes
from tests.sweep.oracles import P
from tests.sweep.outcome import ORACLE, RAISED, RIGHT, Outcome, compare, line, tensors
from tests.sweep.running import Concatenating, Refused, attached, judged, only_real, pairs_by_name, run, with_gradients


def checked(bare: Any, model: Any, cases: list[Case]) -> dict[str, Outcome]:
    """Content stands at positions from P on: the text in context where that is the same, or position ids by hand."""
    state = require_installation(model)
    if getattr(bare.config, "is_encoder_decoder", False):
        return {"moved": _moved(bare, cases[0])}
    if bare.main_input_name != "input_ids" or "input_ids" not in cases[0].inputs:
        return {}
    if cases[0].inputs["input_ids"].dim() != 2:
        return {}
    causal = [case for case in cases if oracles.is_causal(bare, case)]
    elsewhere = oracles.has_states(bare) or oracles.has_narrow_window(bare) or state.facts.layers.reuses_modules
    elsewhere = elsewhere or oracles.depends_on_length(bare)
    if causal and _moves_nothing(bare, causal[0]):  # its positions are those of something else than a text
        return {"position ids": Outcome(RIGHT, "position ids move nothing")}
    if causal and not elsewhere:
        return in_context(bare, causal)
    if takes(bare, "position_ids"):
        return {"position ids": _by_hand(bare, cases[0])}
    return {}


def _moves_nothing(bare: Any, case: Case) -> bool:
    """Whether a forward takes position ids and passes them by."""
    if not takes(bare, "position_ids") or case.inputs["input_ids"].shape[1] < 3:
        return False
    counted = torch.arange(case.inputs["input_ids"].shape[1]).expand(len(case.inputs["input_ids"]), -1)
    jumping = counted + (counted >= 2) * 3
    try:
        with torch.no_grad():
            results = [tensors(bare(**{**case.inputs, "position_ids": x})) for x in (counted, jumping)]
    except Exception:  # positions of another shape
        return False
    return all(torch.equal(x, y) for x, y in zip(results[0].values(), results[1].values()))


def in_context(bare: Any, cases: list[Case]) -> dict[str, Outcome]:
    """The keys and values of a text as the prefix, against that text in front of the content."""
    tokens = inputs.ids(bare.config, 1, P, seed=5)[0]
    try:
        model, _ = attached(bare, PrefixConfig(P, init=init.token_ids(tokens.tolist())))
    except Refused as refusal:
        if "position_offset='none'" in str(refusal):  # which was taken
            return {"in context": Outcome(RIGHT, f"moved content is refused: {refusal}")}
        return {"in context": Outcome(RAISED, f"attach(init.token_ids), where init.normal is taken: {refusal}")}
    except Exception as error:
        return {"in context": Outcome(RAISED, "attach(init.token_ids): " + line(error))}
    found = {}
    for case in cases:
        given = dict(case.inputs)
        labels = given.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:  # the text's last token would predict the first
            given["labels"] = labels.clone()
            given["labels"][:, 0] = -100
        case = Case(case.name, given, case.real)
        length = given["input_ids"].shape[1]

        def want(case: Case = case, length: int = length) -> dict[str, Tensor]:
            with torch.no_grad():
                output = tensors(bare(**oracles.in_front(case.inputs, tokens)))
            return _by_token(only_real(oracles.behind(output, length), case))

        def got(case: Case = case) -> dict[str, Tensor]:
            with torch.no_grad():
                return _by_token(run(model, case))

        found[f"{case.name} in context"] = judged(got, want)
    return found


def _by_token(output: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what a text with no end of its own is pooled to: its first token, which is another one in context."""
    return {k: x for k, x in output.items() if "pooler_output" not in k and "embeds" not in k}


def _moved(bare: Any, case: Case) -> Outcome:
    """An encoder-decoder's, its decoder's table of positions moved by hand."""
    try:
        model, made = attached(bare, PrefixConfig(P, init=init.normal(1.0)))
        pairs = pairs_by_name(model, made)
        with oracles.moved(bare, P) as twin, torch.no_grad():
            if twin is None and takes(bare, "decoder_position_ids"):
                targets = case.inputs["decoder_input_ids"]
                ids = {"decoder_position_ids": torch.arange(targets.shape[1]).expand(len(targets), -1) + P}
                return judged(lambda: run(model, case), lambda: run(Concatenating(bare, pairs), case, **ids))
            if twin is None:
                return Outcome(RIGHT, "no table of positions")
            return judged(lambda: run(model, case), lambda: run(Concatenating(twin, pairs), case))
    except Refused as refusal:
        return Outcome(RAISED, f"attach, where position_offset='none' is taken: {refusal}")
    except Exception as error:
        return Outcome(ORACLE, line(error))


def _by_hand(bare: Any, case: Case) -> Outcome:
    """Position ids from P on, counted from where the model itself starts."""
    try:
        model, made = attached(bare, PrefixConfig(P, init=init.normal(1.0)))
    except Refused as refusal:
        return Outcome(RAISED, f"attach, where position_offset='none' is taken: {refusal}")
    pairs = pairs_by_name(model, made)
    length = case.inputs["input_ids"].shape[1]
    start = _start(bare, case)
    moved = {"position_ids": (torch.arange(length) + start + P).expand(len(case.inputs["input_ids"]), -1)}
    with torch.no_grad():
        plain = {"position_ids": moved["position_ids"] - P}
        try:
            same = compare(run(bare, case, **plain), run(bare, case))
        except Exception as error:
            return Outcome(ORACLE, line(error))
        if same.outcome != RIGHT:
            return Outcome(ORACLE, f"position ids from {start} on are not its own: {same.message}")
    leaves = [p for p in made.parameters() if p.requires_grad]
    return judged(
        lambda: with_gradients(run(model, case), leaves),
        lambda: with_gradients(run(Concatenating(bare, pairs), case, **moved), leaves),
    )


def _start(bare: Any, case: Case) -> int:
    """The first position id of a text, as a table of learned positions sees it."""
    seen: list[int] = []
    for name, module in bare.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embeddings"):
            handle = module.register_forward_pre_hook(lambda m, args: seen.append(int(args[0].min())) if args else None)
            with torch.no_grad():
                bare(**case.inputs)
            handle.remove()
            break
    return seen[0] if seen else 0
