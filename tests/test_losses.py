"""The exact properties of the distillation losses, mostly in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compress_search import losses

TAUS = (1.0, 2.0, 7.5)


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("kind", ["kl", "mse_logits"])
def test_equal_logits_give_zero_loss_and_zero_gradient(kind: losses.SoftLoss, tau: float) -> None:
    student = logits(6, 5).requires_grad_()
    loss = losses.soft_loss(student, student.detach(), kind, tau)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert gradient(loss, student).abs().max() < 1e-15


@pytest.mark.parametrize("tau", TAUS)
def test_gradient_of_kl_is_tau_times_the_difference_of_probabilities(tau: float) -> None:
    student, teacher = logits(6, 5).requires_grad_(), logits(6, 5, seed=1)
    expected = tau * (F.softmax(student / tau, -1) - F.softmax(teacher / tau, -1)) / 6
    torch.testing.assert_close(gradient(losses.kl(student, teacher, tau), student), expected, rtol=0, atol=1e-10)


def test_gradient_of_kl_approaches_that_of_squared_logits_at_high_temperature() -> None:
    student, teacher = (logits(6, 5, seed=s) for s in (0, 1))
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    limit = (student - teacher) / (5 * 6)
    deviations = [
        (gradient(losses.kl(student, teacher, tau), student) - limit).abs().max() for tau in (1.0, 10.0, 1000.0)
    ]
    assert deviations[0] > 5 * deviations[1] > 5 * 50 * deviations[2]
    assert deviations[2] < 1e-4


@pytest.mark.parametrize("tau", TAUS)
def test_cross_entropy_is_kl_plus_the_teachers_entropy(tau: float) -> None:
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    p = F.softmax(teacher / tau, -1)
    entropy = -(p * p.log()).sum(-1).mean()
    difference = losses.soft_cross_entropy(student, teacher, tau) - tau**2 * entropy
    torch.testing.assert_close(difference, losses.kl(student, teacher, tau), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_kl_is_batchmean_of_torch(tau: float) -> None:
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    ours = losses.kl(student, teacher, tau) / tau**2
    logs = F.log_softmax(student / tau, -1)
    theirs = F.kl_div(logs, F.softmax(teacher / tau, -1), reduction="batchmean")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@given(st.integers(0, 1000), st.floats(-50, 50), st.floats(1, 10))
def test_adding_a_constant_to_a_row_changes_nothing(seed: int, constant: float, tau: float) -> None:
    student, teacher = logits(4, 3, seed=seed), logits(4, 3, seed=seed + 1)
    shift = torch.tensor([constant, 0, -constant, 1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        losses.kl(student + shift, teacher - shift, tau), losses.kl(student, teacher, tau), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("wild", [1e4, -1e4, float("inf")])
@pytest.mark.parametrize("kind", ["kl", "mse_logits"])
def test_masked_rows_do_not_matter(kind: losses.SoftLoss, wild: float) -> None:
    student, teacher = logits(2, 4, 3), logits(2, 4, 3, seed=1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]])
    wilder = student.masked_fill(~mask.bool()[..., None], wild).requires_grad_()
    loss = losses.soft_loss(wilder, teacher, kind, 2.0, mask)
    assert loss.item() == losses.soft_loss(student, teacher, kind, 2.0, mask).item()
    assert gradient(loss, wilder)[~mask.bool()].abs().max() == 0


def test_mean_is_over_valid_rows_only() -> None:
    student, teacher = logits(2, 4, 3), logits(2, 4, 3, seed=1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]])
    rows = [losses.kl(student[b, s][None], teacher[b, s][None], 2.0) for b, s in mask.nonzero()]
    torch.testing.assert_close(losses.kl(student, teacher, 2.0, mask), torch.stack(rows).mean())


@pytest.mark.parametrize("kind", ["kl", "mse_logits"])
def test_no_valid_row_gives_zero_with_zero_gradient(kind: losses.SoftLoss) -> None:
    student = logits(2, 4, 3).requires_grad_()
    loss = losses.soft_loss(student, logits(2, 4, 3, seed=1), kind, 2.0, torch.zeros(2, 4))
    assert loss.item() == 0
    assert gradient(loss, student).abs().max() == 0


def test_mse_is_the_mean_over_rows_and_classes() -> None:
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    torch.testing.assert_close(losses.mse_logits(student, teacher), F.mse_loss(student, teacher))


def test_regression_has_a_soft_term_without_temperature() -> None:
    student, teacher = logits(6, 1), logits(6, 1, seed=1)
    expected = F.mse_loss(student, teacher)
    for tau in TAUS:
        torch.testing.assert_close(losses.soft_loss(student, teacher, "mse_logits", tau), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (logits(64, 5, seed=s, dtype=torch.float32).to(dtype) for s in (0, 1))
    loss = losses.kl(student, teacher, 4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses.kl(student.double(), teacher.double(), 4.0).float())


def test_alpha_zero_is_the_hard_loss_exactly() -> None:
    student, teacher, labels = logits(6, 5).requires_grad_(), logits(6, 5, seed=1), torch.arange(6) % 5
    hard = F.cross_entropy(student, labels)
    loss = losses.mixed(losses.kl(student, teacher, 2.0), hard, 0.0)
    assert loss.item() == hard.item()
    torch.testing.assert_close(
        gradient(loss, student), gradient(F.cross_entropy(student, labels), student), rtol=0, atol=1e-12
    )


def test_alpha_one_does_not_depend_on_the_labels() -> None:
    student, teacher = logits(6, 5).requires_grad_(), logits(6, 5, seed=1)
    results = []
    for labels in (torch.zeros(6, dtype=torch.long), torch.arange(6) % 5):
        loss = losses.mixed(losses.kl(student, teacher, 2.0), F.cross_entropy(student, labels), 1.0)
        results.append((loss.item(), gradient(loss, student)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_mixing_is_linear_in_between() -> None:
    assert losses.mixed(torch.tensor(2.0), torch.tensor(4.0), 0.25).item() == 3.5


def test_annealing_reaches_both_ends_and_never_leaves_them() -> None:
    assert losses.annealed(0.7, 0.1, 0.0) == 0.7
    assert losses.annealed(0.7, 0.1, 1.0) == pytest.approx(0.1, abs=1e-15)
    assert losses.annealed(0.7, 0.1, 0.5) == pytest.approx(0.4)
    assert losses.annealed(0.7, 0.1, -1.0) == 0.7
    assert losses.annealed(0.7, 0.1, 2.0) == losses.annealed(0.7, 0.1, 1.0)


def test_token_scopes() -> None:
    labels = torch.tensor([[-100, 1, -100, 0, -100, -100]])
    attention = torch.tensor([[1, 1, 1, 1, 1, 0]])
    assert losses.valid_tokens(labels, attention).tolist() == [[False, True, False, True, False, False]]
    assert losses.valid_tokens(labels, attention, "attended").tolist() == [[True] * 5 + [False]]


def test_masked_mean() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    assert losses.masked_mean(values, torch.tensor([[1, 1], [1, 0]])).item() == 2.0
    assert losses.masked_mean(values, torch.tensor([0, 1])).item() == 51.5
    assert losses.masked_mean(values, torch.zeros(2, 2)).item() == 0.0


# A temperature for each row, and the gold class on top


def test_one_temperature_for_all_rows_is_that_number() -> None:
    student, teacher = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for function in (losses.kl, losses.soft_cross_entropy):
        expected = function(student, teacher, 2.5, mask)
        torch.testing.assert_close(function(student, teacher, torch.full((2, 3), 2.5), mask), expected)


def test_each_rows_temperature_is_squared_for_itself() -> None:
    student, teacher = logits(4, 5), logits(4, 5, seed=1)
    taus = torch.tensor([1.0, 2.0, 3.0, 10.0])
    rows = [losses.kl(student[i : i + 1], teacher[i : i + 1], float(taus[i])) for i in range(4)]
    torch.testing.assert_close(losses.kl(student, teacher, taus), torch.stack(rows).mean())


@pytest.mark.parametrize("scheduler", ["flsw", "cwsm"])
def test_row_temperatures_have_the_base_as_their_mean_and_spread_with_beta(
    scheduler: losses.TemperatureScheduler,
) -> None:
    student, teacher = logits(50, 4), logits(50, 4, seed=1)
    taus = losses.row_temperatures(student, teacher, scheduler, 8.0, beta=1.0)
    assert isinstance(taus, Tensor)
    assert taus.mean().item() == pytest.approx(8.0)
    wider = losses.row_temperatures(student, teacher, scheduler, 8.0, beta=2.0)
    torch.testing.assert_close(wider - 8.0, 2 * (taus - 8.0))
    none = losses.row_temperatures(student, teacher, scheduler, 8.0, beta=0.0)
    torch.testing.assert_close(none, torch.full((50,), 8.0, dtype=torch.float64))


def test_flsw_softens_most_where_teacher_and_student_agree() -> None:
    teacher = logits(3, 4)
    student = torch.stack([teacher[0] * 2, logits(4, seed=5), -teacher[2]])
    same, other, opposite = losses.row_temperatures(student, teacher, "flsw", 5.0).tolist()  # type: ignore[union-attr]
    assert same > other > opposite
    assert same - opposite == pytest.approx(2)  # 1 − cos is 0 and 2


def test_cwsm_softens_most_where_the_student_is_sure() -> None:
    student = torch.tensor([[10.0, 0, 0], [1.0, 0, 0], [0.0, 0, 0]])
    sure, less, least = losses.row_temperatures(student, student, "cwsm", 5.0).tolist()  # type: ignore[union-attr]
    assert sure > less > least
    assert sure - least == pytest.approx(1 / (1 / 3 + 1e-3) - 1 / (1 + 1e-3), rel=1e-3)


def test_row_temperatures_stay_above_zero_and_take_no_gradient() -> None:
    student, teacher = logits(20, 6).requires_grad_(), logits(20, 6, seed=1)
    taus = losses.row_temperatures(student, teacher, "cwsm", 1.0, beta=2.0)
    assert isinstance(taus, Tensor)
    assert taus.min() == losses.LOWEST_TEMPERATURE
    assert not taus.requires_grad


def test_rows_that_do_not_count_leave_the_mean_alone() -> None:
    student, teacher = logits(3, 4), logits(3, 4, seed=1)
    mask = torch.tensor([True, True, False])
    taus = losses.row_temperatures(student, teacher, "flsw", 3.0, mask=mask)
    student[2] = 1e4 * student[2].flip(-1)
    again = losses.row_temperatures(student, teacher, "flsw", 3.0, mask=mask)
    assert torch.equal(taus[:2], again[:2])  # type: ignore[index]


@given(st.integers(0, 1000), st.integers(2, 6))
def test_shifting_puts_the_gold_class_on_top_and_keeps_the_values(seed: int, classes: int) -> None:
    teacher = logits(8, classes, seed=seed)
    labels = torch.randint(classes, (8,), generator=torch.Generator().manual_seed(seed))
    result = losses.shifted(teacher, labels)
    assert torch.equal(result.argmax(-1), labels)
    assert torch.equal(result.sort(-1).values, teacher.sort(-1).values)
    right = teacher.argmax(-1) == labels
    assert torch.equal(result[right], teacher[right])


def test_positions_without_a_label_are_not_shifted() -> None:
    teacher, labels = logits(2, 3, 4), torch.full((2, 3), losses.IGNORED)
    assert torch.equal(losses.shifted(teacher, labels), teacher)
