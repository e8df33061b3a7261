"""When ``detach`` with a name is refused, and what a prefix that was taken out leaves behind: caches, graphs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, init
from tests.hf.adapters.test_detach import IDS, NAMES, outputs, same_outputs, several

pytest.importorskip("transformers")


@contextmanager
def in_a_batch(model: Any) -> Iterator[None]:
    with fastprefix.prefix_batch(model, ["direct", None]):
        yield


@contextmanager
def in_a_shared_prompt(model: Any) -> Iterator[None]:
    with fastprefix.shared_prompt(model, torch.arange(3, 6)):
        yield


@pytest.mark.parametrize("block", [in_a_batch, in_a_shared_prompt])
def test_not_inside_a_block(block: Any) -> None:
    model = several()
    for name in ("direct", "prompt"):
        which = "prefix_batch" if block is in_a_batch else "shared_prompt"
        with block(model), pytest.raises(ValueError, match=f"name: got '{name}' inside a block of {which}, expected"):
            fastprefix.detach(model, name)
    want = outputs(model, NAMES)
    fastprefix.detach(model, "direct")
    assert same_outputs(outputs(model, NAMES[1:]), want)


@pytest.mark.parametrize("name", ["nothing", "", 3, ("direct", "prompt")])
def test_names_that_nothing_has(name: Any) -> None:
    model = several()
    with pytest.raises(
        ValueError, match=r"name: got .*, expected None or one of \['direct', 'encoded_prompt', 'frozen'"
    ):
        fastprefix.detach(model, name)
    assert list(model._fastprefix.selection.prefixes) == list(NAMES)


def test_a_wrapper_that_has_collected_the_parameters() -> None:
    model = several()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(ValueError, match="model: got a AveragedModel around it, expected the model itself"):
        fastprefix.detach(averaged, "direct")
    assert "direct" in averaged.module._fastprefix.selection.prefixes


@torch.no_grad()
def test_a_cache_belongs_to_the_prefix_that_was_taken_out() -> None:
    model = several()
    caches = {}
    for name in ("direct", "frozen"):
        fastprefix.set_prefix(model, name)
        caches[name] = model(IDS, use_cache=True).past_key_values
    with fastprefix.prefix_batch(model, ["direct", "frozen"]):
        both = model(IDS, use_cache=True).past_key_values
    fastprefix.detach(model, "direct")
    fastprefix.attach(model, PrefixConfig(3, init=init.normal(0.5)), "direct")
    with pytest.raises(ValueError, match="past_key_values: got a cache made with prefix 'direct'"):
        model(IDS[:, :1], past_key_values=caches["direct"])
    with (
        fastprefix.prefix_batch(model, ["direct", "frozen"]),
        pytest.raises(ValueError, match="past_key_values: got a cache made with prefixes"),
    ):
        model(IDS[:, :1], past_key_values=both)
    row = copy.deepcopy(both)
    row.batch_select_indices(torch.tensor([0]))
    with (
        fastprefix.prefix_batch(model, ["direct"]),
        pytest.raises(ValueError, match="past_key_values: got a cache made with prefixes"),
    ):
        model(IDS[:1, :1], past_key_values=row)
    fastprefix.set_prefix(model, "frozen")
    model(IDS[:, :1], past_key_values=caches["frozen"])
    both.batch_select_indices(torch.tensor([1]))
    with fastprefix.prefix_batch(model, ["frozen"]):
        model(IDS[1:, :1], past_key_values=both)


@pytest.mark.parametrize("reentrant", [True, False])
def test_between_a_checkpointed_forward_and_its_backward(reentrant: bool) -> None:
    model = several()
    fastprefix.set_prefix(model, "direct")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(IDS, labels=IDS, use_cache=False).loss
    fastprefix.detach(model, "direct")
    with pytest.raises(RuntimeError, match="the prefix was taken out between a checkpointed forward and its backward"):
        loss.backward()
    fastprefix.set_prefix(model, "frozen")
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    fastprefix.detach(model, "projected")  # another one may go
    loss.backward()


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_not_from_a_model_whose_parameters_are_collected_or_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = several()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(ValueError, match=r"model: got a DistributedDataParallel around it, .* it waits for the grad"):
        fastprefix.detach(wrapped, "direct")
    del wrapped
    fastprefix.detach(model, "frozen")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="model: got FSDPLlamaForCausalLM with sharded parameters"):
        fastprefix.detach(model, "direct")
    assert "direct" in model._fastprefix.selection.prefixes


def test_another_threads_block() -> None:
    model = several()
    found: list[BaseException] = []

    def detach() -> None:
        try:
            fastprefix.detach(model, "prompt")
        except ValueError as error:
            found.append(error)

    with fastprefix.prefix_batch(model, ["direct", None]):
        thread = threading.Thread(target=detach)
        thread.start()
        thread.join()
    assert len(found) == 1 and "name: got 'prompt' inside a block of prefix_batch" in str(found[0])
