"""What a table says of a call: the verdict on its kind, and the order of what is right."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastprefix.verification import lookup, ranking, run, store
from fastprefix.verification.cells import Cell, cell_of
from fastprefix.verification.identity import identity
from fastprefix.verification.routes import Candidate
from fastprefix.verification.table import Bucket, Table, Verdict
from tests.support.operator_calls import arguments, make_call
from tests.verification.conftest import CPU
from tests.verification.test_store import BUCKET, CELL, RIGHT, table


def test_a_decision_stands_while_more_becomes_known() -> None:
    """A call that is made again gives the same bits, whatever is attached meanwhile; unless something is wrong."""
    args = arguments(make_call(S=32, P=8))
    before = ranking.order(args, "forward")
    store.add(CPU, table())
    assert ranking.order(args, "forward") == before
    store.add(CPU, table(), decide_again=True)
    assert ranking.order(args, "forward") != before
    store.add(CPU, table("wrong"))
    assert ranking.order(args, "forward") == (lookup.REFERENCE,)


def test_a_failure_on_a_larger_call_outlasts_checks_of_small_ones() -> None:
    failed = replace(RIGHT, result="failed")
    found = Table(
        identity(CPU), {CELL: {"aten:folded": RIGHT}}, {BUCKET: {"aten:packed": 1.0}}, {BUCKET: {"aten:folded": failed}}
    )
    assert Table.from_json(found.to_json()) == found
    found.update(table())  # the small calls are right again; of the bucket nothing is said but by table's own times
    assert lookup.verdict(found, CELL, "aten:folded") == RIGHT
    found.update(Table(identity(CPU), failures={BUCKET: {"aten:folded": failed}}))
    assert "aten:folded" not in found.times[BUCKET]
    found.update(Table(identity(CPU), {CELL: {"aten:folded": RIGHT}}))
    for other in (CELL, CELL._replace(features=("causal", "window")), CELL._replace(D=64)):
        assert lookup.verdict(found, other, "aten:folded") == failed
    assert lookup.verdict(found, CELL._replace(direction="backward"), "aten:folded") is None
    assert lookup.verdict(found, CELL._replace(dtype="bf16"), "aten:folded") is None


def test_a_call_that_the_only_known_route_refuses_is_not_the_references() -> None:
    """A budget may end between the routes of a cell."""
    store.add(CPU, Table(identity(CPU), {CELL: {"aten:concatenated": RIGHT}}))
    order = lookup.order(arguments(make_call(S=32, P=0)), "forward")
    assert order == (Candidate(lookup.VENDOR.module, "concatenated"), lookup.VENDOR, lookup.REFERENCE)


def test_a_guess_is_not_taken_where_one_of_its_routes_has_hung() -> None:
    """Elsewhere a hang may have been a busy machine; in this cell it would be the caller's."""
    hung = replace(RIGHT, result="hung")
    store.add(CPU, Table(identity(CPU), {CELL: {"aten:concatenated": hung}}))
    assert lookup.order(arguments(make_call(S=32, P=8)), "forward") == (lookup.REFERENCE,)
    assert lookup.order(arguments(make_call(S=32, P=8, D=24)), "forward") == (lookup.VENDOR, lookup.REFERENCE)


def test_one_that_was_not_timed_comes_after_those_that_were() -> None:
    found = table(packed=RIGHT)
    store.add(CPU, found)
    order = lookup.order(arguments(make_call(S=32, P=8)), "forward")
    assert [chosen.route for chosen in order[:2]] == ["folded", "packed"]
    assert not run.is_timed(found, BUCKET, CPU)
    found.times[BUCKET].update({"aten:packed": 1.0, "reference": 1.0})
    assert run.is_timed(found, BUCKET, CPU)


def test_what_is_read_again_does_not_undo_decisions() -> None:
    args = arguments(make_call(S=32, P=8))
    store.add(CPU, table("wrong", packed=RIGHT))
    before = ranking.order(args, "forward")
    store.reload(CPU)
    assert store.decisions and ranking.known(args, "forward") == before


class TestLookup:
    """What a table says of calls whose own kind it does not have."""

    def verdict(self, cells: dict[tuple[str, ...], Verdict], *features: str) -> Verdict | None:
        found = Table(identity(CPU), {CELL._replace(features=f): {"aten:folded": v} for f, v in cells.items()})
        return lookup.verdict(found, CELL._replace(features=features), "aten:folded")

    def test_each_alone_and_all_together(self) -> None:
        cells = {("causal", *more): RIGHT for more in ((), ("padding",), ("window",), ("sinks",))}
        assert self.verdict(cells, "causal", "padding", "window") is None
        worse = replace(RIGHT, worst=0.9)
        cells[("causal", "padding", "window", "softcap")] = worse
        assert self.verdict(cells, "causal", "padding", "window") == worse
        assert self.verdict(cells, "causal", "padding", "window", "sinks") is None  # never together with others
        del cells[("causal",)]
        assert self.verdict(cells, "causal", "padding", "window") is None

    def test_one_argument_is_proved_by_itself_alone(self) -> None:
        cells = {("causal", "padding", "window"): RIGHT, ("causal",): RIGHT}
        assert self.verdict(cells, "causal", "padding") is None and self.verdict(cells) is None
        assert self.verdict({("causal", "padding", "window"): RIGHT}, "causal") is None

    def test_one_that_is_wrong_outweighs(self) -> None:
        wrong = replace(RIGHT, result="wrong")
        cells = {("causal",): RIGHT, ("causal", "padding"): wrong, ("causal", "window"): RIGHT}
        cells[("causal", "padding", "window", "sinks")] = RIGHT
        assert self.verdict(cells, "causal", "padding", "window") == wrong
        cells[("causal", "padding", "window")] = RIGHT  # its own kind is known
        assert self.verdict(cells, "causal", "padding", "window") == RIGHT

    def test_a_refusal_says_nothing_of_other_calls(self) -> None:
        refused = replace(RIGHT, result="refused")
        cells = {("causal", *more): RIGHT for more in ((), ("padding",), ("window",), ("padding", "window", "sinks"))}
        cells[("causal", "padding", "window", "softcap")] = refused
        assert self.verdict(cells, "causal", "padding", "window") == RIGHT
        assert self.verdict({("causal", "softcap"): refused}, "causal") is None

    def test_other_groups_and_directions_are_other_kernels(self) -> None:
        found = Table(identity(CPU), {CELL: {"aten:folded": RIGHT}})
        changes = ({"G": 1}, {"P": 16}, {"features": ()}, {"direction": "backward"}, {"D": 64})
        for other in (CELL._replace(**change) for change in changes):  # type: ignore[arg-type]
            assert lookup.verdict(found, other, "aten:folded") is None

    def test_a_cell_that_is_half_known_does_not_end_trust(self) -> None:
        refused = replace(RIGHT, result="refused")
        args = arguments(make_call(S=32, P=8))
        store.add(CPU, Table(identity(CPU), {CELL: {"aten:concatenated": refused}}))
        assert lookup.order(args, "forward") == (lookup.VENDOR, lookup.REFERENCE)
        store.add(CPU, Table(identity(CPU), {CELL: {"aten:concatenated": replace(RIGHT, result="wrong")}}))
        assert lookup.order(args, "forward") == (lookup.REFERENCE,)

    def test_the_nearest_bucket(self) -> None:
        times = {
            BUCKET: {"aten:folded": 1.0, "aten:packed": 2.0},
            BUCKET._replace(S=2048, T=2048): {"aten:folded": 2.0, "aten:packed": 1.0},
            BUCKET._replace(P=1024): {"aten:folded": 3.0},
            BUCKET._replace(variant="masked"): {"aten:folded": 4.0},
            BUCKET._replace(variant="bank"): {"aten:folded": 5.0},
        }
        found = Table(identity(CPU), {}, times)
        for changes, best in (({"S": 32}, 1.0), ({"S": 1500}, 2.0), ({"P": 600}, 3.0)):
            args = arguments(make_call(**{"S": 40, "P": 8, **changes}))
            assert lookup.nearest(found, args, "forward")["aten:folded"] == best
        padded = make_call(S=40, P=8, key_padding_mask=torch.ones(2, 40, dtype=torch.bool))
        assert lookup.nearest(found, arguments(padded), "forward")["aten:folded"] == 4.0
        bank = make_call(S=40, P=8, N=2, prefix_ids=torch.tensor([0, 1]))
        assert lookup.nearest(found, arguments(bank), "forward")["aten:folded"] == 5.0
        assert lookup.nearest(found, arguments(make_call(S=40)), "backward") == {}

    def test_no_slower_than_the_reference(self) -> None:
        refused = replace(RIGHT, result="refused")
        found = table(concatenated=refused, packed=refused)
        found.times[BUCKET]["reference"] = 1e-4
        store.add(CPU, found)
        assert lookup.order(arguments(make_call(S=32, P=8)), "forward") == (lookup.REFERENCE,)

    def test_names_are_inverted(self) -> None:
        args = arguments(make_call(S=32, P=8, softcap=2.0, key_padding_mask=torch.ones(2, 32, dtype=torch.bool)))
        for direction in ("forward", "backward", "decode"):
            cell = cell_of(args, direction)  # type: ignore[arg-type]
            assert Cell.parse(str(cell)) == cell and "padding" in cell.features
        assert Bucket.parse(str(BUCKET)) == BUCKET
