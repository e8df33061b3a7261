"""What `attach` and `patch` verify."""

from __future__ import annotations

import pytest
import torch

import fastprefix
from fastprefix import PrefixConfig, explain, prefix_attention
from fastprefix.verification import store
from fastprefix.verification.cells import Cell
from tests.model_zoo.architectures import ROWS
from tests.support.operator_calls import arguments, make_call
from tests.verification.conftest import CPU, backend_of


class TestModels:
    """``attach`` and ``patch`` verify what the model's layers need."""

    def test_attach(self, examined: list[list[Cell]], capsys: pytest.CaptureFixture[str]) -> None:
        model = ROWS["llama_gqa"].build()
        fastprefix.attach(model, PrefixConfig(4))
        (cells,) = examined
        assert {cell.direction for cell in cells} == {"forward", "backward", "decode"}
        assert {"padding" in cell.features for cell in cells} == {True, False}
        assert all("causal" in cell.features for cell in cells)
        assert "for this model" in capsys.readouterr().err
        fastprefix.detach(model)
        fastprefix.attach(model, PrefixConfig(7))
        assert len(examined) == 1 and "proved on" in explain(model)

    def test_attach_on_a_gpu_verifies_once(
        self, gpu: str, examined: list[list[Cell]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = ROWS["llama_gqa"].build()
        with monkeypatch.context() as named:
            named.setenv("FASTPREFIX_BACKEND", "reference")
            fastprefix.attach(model, PrefixConfig(4))
            fastprefix.detach(model)
            assert not examined
        fastprefix.attach(model, PrefixConfig(4))
        assert len(examined) == 1 and capsys.readouterr().err.count("\n") == 1
        assert "proved on" in explain(model) and len(examined) == 1
        ids = torch.arange(12).view(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        assert len(examined) == 1  # training needs nothing more

    def test_explain_of_a_model_verifies_nothing(self, gpu: str, examined: list[list[Cell]]) -> None:
        model = ROWS["llama_gqa"].build()
        fastprefix.attach(model, PrefixConfig(4))
        store.forget()
        store.path(CPU).unlink()  # type: ignore[union-attr]
        assert "not proved on" in explain(model) and len(examined) == 1

    def test_explain_of_a_bare_model_verifies_nothing(self, gpu: str, examined: list[list[Cell]]) -> None:
        with pytest.raises(ValueError, match="without a prefix"):
            explain(ROWS["llama_gqa"].build())
        assert not examined

    def test_attach_decides_nothing_for_later_calls(self, examined: list[list[Cell]]) -> None:
        fastprefix.attach(ROWS["llama_gqa"].build(), PrefixConfig(4))
        assert not store.decisions

    def test_patch(self, examined: list[list[Cell]]) -> None:
        peft = pytest.importorskip("peft")
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        fastprefix.patch(peft.get_peft_model(ROWS["llama_gqa"].build(), config))
        assert len(examined) == 1 and {cell.dtype for cell in examined[0]} == {"fp32"}

    def test_switched_off(self, examined: list[list[Cell]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTPREFIX_VERIFY", "off")
        fastprefix.attach(ROWS["llama_gqa"].build(), PrefixConfig(4))
        assert not examined

    def test_a_call_on_the_processor_is_not_kept_waiting(self, examined: list[list[Cell]]) -> None:
        prefix_attention(**make_call(S=32).leaves)
        assert not examined and backend_of(arguments(make_call(S=32))) == "aten:None"

    @pytest.mark.slow
    def test_for_real(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = ROWS["llama_gqa"].build()
        fastprefix.attach(model, PrefixConfig(4))
        assert capsys.readouterr().err.count("\n") == 1
        told = explain(model)
        assert "chosen by auto: " in told and "of the rule" in told
