"""The distillation loss against explicit divergences, and what is stored of a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastprefix.cartridges import targets
from fastprefix.cartridges.targets import distillation_loss, targets_of

N, V = 7, 11


def logits(seed: int) -> Tensor:
    return 2.0 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels() -> Tensor:
    return torch.arange(N) % V


def test_with_the_whole_vocabulary_it_is_the_divergence_and_so_is_its_gradient() -> None:
    teacher, student = logits(0), logits(1).requires_grad_()
    loss = distillation_loss(student, targets_of(teacher, labels(), V))
    p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    torch.testing.assert_close(loss, (p.exp() * (p - log_q)).sum(-1))
    loss.sum().backward()
    torch.testing.assert_close(student.grad, log_q.detach().exp() - p.exp())


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_with_fewer_the_others_are_one_event(k: int) -> None:
    teacher, student = logits(0), logits(1).requires_grad_()
    found = targets_of(teacher, labels(), k)
    loss = distillation_loss(student, found)
    for i in range(N):
        p, q = teacher[i].softmax(-1), student[i].softmax(-1)
        kept = p.argsort(descending=True)[:k]
        expected = sum(p[j] * (p[j] / q[j]).log() for j in kept)
        rest_p, rest_q = 1.0 - p[kept].sum(), 1.0 - q[kept].sum()
        torch.testing.assert_close(loss[i], expected + rest_p * (rest_p / rest_q).log())
    whole = distillation_loss(student, targets_of(teacher, labels(), V))
    assert bool((loss <= whole + 1e-12).all()) and bool((loss >= 0).all())
    torch.testing.assert_close(distillation_loss(teacher, found), torch.zeros(N, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, found), (student,))


def test_predictions_of_a_half_precision_model_are_compared_in_fp32() -> None:
    found = targets_of(logits(0).bfloat16(), labels(), 3)
    assert found.logprobs.dtype == torch.float32
    assert distillation_loss(logits(1).bfloat16(), found).dtype == torch.float32


def test_the_label_s_probability_is_the_teacher_s() -> None:
    found = targets_of(logits(0), labels(), 2)
    expected = -torch.nn.functional.cross_entropy(logits(0), labels(), reduction="none")
    torch.testing.assert_close(found.label, expected)


def test_files_are_read_by_the_run_that_wrote_them_alone(tmp_path: Path) -> None:
    found = targets_of(logits(0), labels(), 2)
    targets.write(tmp_path / "t.safetensors", found, "a")
    again = targets.read(tmp_path / "t.safetensors", "a")
    assert all(torch.equal(getattr(again, name), getattr(found, name)) for name in vars(found))
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    with pytest.raises(ValueError, match="predictions of another text, model or data"):
        targets.read(tmp_path / "t.safetensors", "b")


@pytest.mark.parametrize("k", [0, V + 1])
def test_wrong_numbers_are_named(k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k: got {k}, expected 1 to {V}"):
        targets_of(logits(0), labels(), k)
