"""``share_prompts``: TRL's trainers compute the prompts that rows of a batch share once.

TRL gives its models a forward that returns log-probabilities (``add_fused_lm_head``, called with
``fused_lm_head=True``). That is where this steps in: the same forward gets the rows' completions alone, inside of a
block that lets them read their prompts, and its result is put where TRL looks for it. Losses, references, clipping and
metrics are TRL's own.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import find_installation
from fastprefix.hf.model import dtensor
from fastprefix.hf.model.offload import meta_parameters
from fastprefix.hf.model.wrappers import unwrapped
from fastprefix.hf.runtime.warn_once import WarnOnce
from fastprefix.hf.sharing import hidden_states
from fastprefix.hf.sharing.padded_positions import counts_padding
from fastprefix.hf.sharing.plan import IGNORED, SharingPlan, plan_rows
from fastprefix.hf.sharing.shared_prompt import bare_model, installed

_FLAG = "fused_lm_head"
_MARK = "_fastprefix_shares_prompts"
_TRAINERS = ("GRPOTrainer", "RLOOTrainer", "DPOTrainer", "KTOTrainer")
# The arguments of a forward that the rows of a plan stand for; with any other the forward runs as it is.
_TAKEN = ("input_ids", "attention_mask", "labels")
_PASSED_ON = ("num_items_in_batch", "use_cache", "return_dict")


class PromptSharing:
    """What :func:`share_prompts` returns: it counts tokens, and can be undone.

    Attributes:
        given: number of tokens in the batches of log-probabilities so far, padding included.
        computed: number of those that ran through the model; the others were shared.
        not_shared: for each reason why a model or a forward ran as TRL runs it, how often it did.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled  # whether the trainer compiles its model
        self.given = 0
        self.computed = 0
        self.not_shared: dict[str, int] = {}
        self._warn = WarnOnce()
        self._forwards: list[tuple[Any, Callable[..., Any], Callable[..., Any]]] = []  # model, TRL's, ours

    def __repr__(self) -> str:
        return f"PromptSharing(given={self.given}, computed={self.computed}, not_shared={self.not_shared})"

    def remove(self) -> None:
        """Give the models TRL's own forward back."""
        for model, _, ours in self._forwards:
            if model.__dict__.get("forward") is not ours:
                got = "a forward that was wrapped again since"
                raise fail("trainer", got, "remove() before that: what wrapped it last comes off first")
        for model, theirs, _ in self._forwards:
            model.forward = theirs
        self._forwards.clear()

    def _add(self, model: Any) -> None:
        """Let a bare model's forward of log-probabilities share prompts."""
        theirs = model.forward
        try:
            installation = installed(model)
        except ValueError as error:
            self._refuse(f"{type(model).__name__} cannot share prompts ({error})", 0)
            return
        if installation.selection.provider.gated:
            self._refuse("gated prompts (ADAPTION_PROMPT) are read beside the content", 0)
            return
        # Found out now, while the model is whole.
        starts = counts_padding(installation.facts)
        if installation.selection.current() is None:
            hidden_states.packs(installation)

        @functools.wraps(theirs)
        def forward(self_: Any, *args: Any, **kwargs: Any) -> Any:
            # Bound again, as a deep copy of the model has this function too.
            bound = types.MethodType(theirs.__func__, self_) if isinstance(theirs, types.MethodType) else theirs
            if not kwargs.get(_FLAG):
                return bound(*args, **kwargs)
            return self._run(self_, bound, starts, args, kwargs)

        setattr(forward, _MARK, True)
        ours = types.MethodType(forward, model)
        model.forward = ours
        self._forwards.append((model, theirs, ours))

    # Plans depend on the batch's tokens, so under torch.compile this frame stays Python; the forwards in it compile.
    @torch.compiler.disable(recursive=False)
    def _run(
        self, model: Any, theirs: Callable[..., Any], starts: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        installation, packed = find_installation(model), False
        plan: SharingPlan | str
        if args:
            plan = "the forward has positional arguments"
        elif installation is None:
            plan = "fastprefix.detach took its slots out of the model"
        else:
            plan = hidden_states.why_not_now(installation) or _plan(model, kwargs, starts)
            if isinstance(plan, SharingPlan) and plan.worthwhile:
                packed = not self._compiled and hidden_states.fits_one_text(installation, plan)
                plan = hidden_states.why_not(installation, plan) or _why_not_sharded(installation, packed) or plan
        if isinstance(plan, str):
            self._refuse(plan, 1)
            return theirs(*args, **kwargs)
        self.given += plan.given
        if not plan.worthwhile:
            self.computed += plan.given
            return theirs(**kwargs)
        self.computed += plan.computed
        assert installation is not None
        options = {name: kwargs[name] for name in _PASSED_ON if name in kwargs}
        with hidden_states.reading(installation, plan, packed) as inputs:
            output = theirs(**inputs, shift_labels=plan.labels, **options, **{_FLAG: True})
        return _as_given(output, plan.labels, kwargs["labels"])

    def _refuse(self, reason: str, count: int) -> None:
        """Count a forward that runs as TRL runs it, and say why once."""
        self.not_shared[reason] = self.not_shared.get(reason, 0) + count
        self._warn(reason, f"fastprefix: prompts are not shared, and run as TRL runs them: {reason}", stacklevel=5)


def share_prompts(trainer: Any) -> PromptSharing:
    """Let a TRL trainer compute every prompt once, however many completions of it a batch holds.

    Call it on the trainer before ``train``. Log-probabilities and entropies, those of the reference model and of old
    policies included, are those of TRL; so are losses, rewards, clipping and logged metrics, to rounding. Prompts are
    grouped by their tokens, batch by batch, in any order and in groups of any size; a beginning that all of them have
    (a system prompt) runs once too. Rollouts are TRL's own. A batch in which little is shared runs as TRL runs it.

    Where sharing would not be exact the forward is TRL's too, with one warning that says why: images, dropout that is
    active (also LoRA's), layers without attention, rows that outgrow a sliding window, the load-balancing loss of a
    mixture of experts, packed rows (``padding_free``).

    Args:
        trainer: a ``GRPOTrainer``, ``RLOOTrainer``, ``DPOTrainer`` or ``KTOTrainer`` of TRL 1.16 or newer, or one of a
            class derived from these, with LoRA or all weights trained, and its model not yet sharded.

    Returns:
        A :class:`PromptSharing`, which counts what was shared and can undo this.

    Raises:
        ValueError: the trainer is none of these, its models are sharded, or prompts are shared already.
    """
    names = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    if not any(name in _TRAINERS for name in names):
        raise fail("trainer", type(trainer).__name__, f"a trainer of TRL with groups or pairs: {', '.join(_TRAINERS)}")
    given = [trainer.model, getattr(trainer, "ref_model", None)]
    bare = [bare_model(unwrapped(model)) for model in given if model is not None]
    models = list({id(model): model for model in bare}.values())  # the reference may be the policy itself
    for model in models:
        _check(trainer, model)
    sharing = PromptSharing(bool(getattr(getattr(trainer, "args", None), "torch_compile", False)))
    for model in models:
        sharing._add(model)
    return sharing


def _why_not_sharded(installation: Installation, packed: bool) -> str | None:
    """Why prompts cannot be shared where layers are gathered by one forward at a time, alike on every device."""
    sharded = any(dtensor.is_sharded(p) for p in installation.facts.layers.modules[0].parameters())
    return "the model is sharded, and cannot run prompts and rows as one text" if sharded and not packed else None


def _check(trainer: Any, model: Any) -> None:
    """Raise ValueError for a model of a trainer that prompts cannot be shared in, whatever its batches are."""
    wrapped = list(_wrapped(model.forward))
    if any(hasattr(forward, _MARK) for forward in wrapped):
        raise fail("trainer", f"{type(trainer).__name__} that shares prompts already", "one call of share_prompts")
    if not any(_FLAG in inspect.signature(forward, follow_wrapped=False).parameters for forward in wrapped):
        got = f"{type(trainer).__name__} whose {type(model).__name__} has no fused head (add_fused_lm_head)"
        raise fail("trainer", got, "a trainer of TRL 1.16 or newer, as it was made")
    dtensor.refuse(model)
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "ds_id") or p.numel() == 0]
    if sharded or meta_parameters(model):
        got = f"{type(trainer).__name__} whose {type(model).__name__} is sharded"
        raise fail(
            "trainer", got, "whole parameters on each device (DistributedDataParallel): prompts run by themselves"
        )


def _wrapped(forward: Any) -> Iterator[Any]:
    """A forward, and everything that it wraps (accelerate's autocast stands around TRL's)."""
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _plan(model: Any, kwargs: dict[str, Any], starts: bool) -> SharingPlan | str:
    """The plan of a forward of log-probabilities, or why its rows cannot share prompts."""
    others = [
        name
        for name, value in kwargs.items()
        if name not in (*_TAKEN, *_PASSED_ON, _FLAG) and value is not None and value is not False
    ]
    if others:
        return f"the forward has other inputs ({', '.join(sorted(others))})"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "the load-balancing loss counts every token of every row"
    if any(not isinstance(kwargs.get(name), Tensor) for name in ("input_ids", "labels")):
        return "the forward has no input_ids or no labels"
    with torch.no_grad():
        return plan_rows(kwargs["input_ids"], kwargs.get("attention_mask"), kwargs["labels"], starts)


def _as_given(output: Any, labels: Tensor, given: Tensor) -> Any:
    """Move what TRL's forward returned, ``[B, 1 + R]``, to where it returns it for the labels given, ``[B, L - 1]``."""
    found, wanted = labels != IGNORED, given[:, 1:] != IGNORED
    for name, value in list(output.items()):
        if isinstance(value, Tensor) and value.shape == found.shape:
            values = value[found.to(value.device)]
            output[name] = value.new_zeros(wanted.shape).masked_scatter(wanted.to(value.device), values)
    return output
