"""Distillation: what the soft term sees, how the two terms meet, and that only lossy steps can be recovered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_search_plugins.bilstm import BiLstm
from compress_search_plugins.born_again import BornAgain
from compress_search_plugins.distill import Distill
from compress_search_plugins.distillation.soft_targets import SoftTerm, logits_and_task_loss, soft_target_loss
from torch import nn

from compress_search import Candidate, StudyError
from compress_search.driver import prepare
from compress_search.losses import kl, mse_logits, row_temperatures, shifted
from compress_search.space import defaults
from compress_search.study import load_study
from compress_search.testing import TinyContext, tiny_batches, tiny_candidate, tiny_context

TASKS = ("text-classification", "text-regression", "token-classification")


def lossy(task: str = "text-classification", seed: int = 1) -> tuple[Candidate, TinyContext]:
    """A network unlike its teacher, and the context of that teacher."""
    candidate = tiny_candidate("bert", task, layers=2, seed=seed)
    context = tiny_context(tiny_candidate("bert", task, layers=2))
    return candidate.replace(subject=candidate.subject.having("lossy")), context


def parameters(candidate: Candidate, **changes: Any) -> dict[str, Any]:
    return defaults(Distill().search_space(candidate.subject)) | changes


class Spy:
    """A Context that keeps the loss it is asked to fit, and counts forward passes of the network."""

    def __init__(self, context: TinyContext) -> None:
        self._context = context
        self.calls: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def fit(self, network: nn.Module, **options: Any) -> None:
        self.calls.append(options)


@pytest.mark.parametrize("task", TASKS)
def test_alpha_zero_is_the_task_loss_and_alpha_one_ignores_the_labels(task: str) -> None:
    candidate, context = lossy(task)
    batch = next(tiny_batches(candidate))
    hard = soft_target_loss(context, task, alpha=lambda: 0.0)(candidate.network, batch)
    assert hard.item() == context.task_loss(candidate.network, batch).item()

    soft = soft_target_loss(context, task, alpha=lambda: 1.0)
    # other labels at the same positions
    labels = torch.where(batch["labels"] == -100, batch["labels"], torch.zeros_like(batch["labels"]))
    assert soft(candidate.network, batch).item() == soft(candidate.network, batch | {"labels": labels}).item()


@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_itself_has_no_soft_loss(task: str) -> None:
    _, context = lossy(task)
    batch = next(tiny_batches(context.candidate))
    loss = soft_target_loss(context, task, alpha=lambda: 1.0)(context.candidate.network, batch)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_terms_of_each_task_are_the_named_losses() -> None:
    for task in TASKS:
        candidate, context = lossy(task)
        batch = next(tiny_batches(candidate))
        student, hard = logits_and_task_loss(candidate.network, batch, context)
        teacher = context.teacher_logits(batch)
        mask = batch["labels"] != -100 if task == "token-classification" else None
        soft = mse_logits(student, teacher) if task == "text-regression" else kl(student, teacher, 3.0, mask)
        loss = soft_target_loss(context, SoftTerm(task, temperature=3.0), alpha=lambda: 0.25)(
            candidate.network, batch
        )
        torch.testing.assert_close(loss, 0.25 * soft + 0.75 * hard)


@pytest.mark.parametrize("scheduler", ["constant", "flsw"])
def test_without_the_square_of_the_temperature_the_soft_term_is_textbrewers(scheduler: str) -> None:
    candidate, context = lossy("text-classification")
    batch = next(tiny_batches(candidate))
    student, _ = logits_and_task_loss(candidate.network, batch, context)
    teacher = context.teacher_logits(batch)
    params = {"temperature": 3.0, "temperature_sq": False, "temperature_scheduler": scheduler}
    tau = row_temperatures(student, teacher, scheduler, 3.0)
    tau = tau[:, None] if isinstance(tau, torch.Tensor) else tau
    p, q = ((each / tau).softmax(-1) for each in (teacher, student))
    loss = soft_target_loss(context, SoftTerm.of("text-classification", params), alpha=lambda: 1.0)
    torch.testing.assert_close(loss(candidate.network, batch), (p * (p / q).log()).sum(-1).mean())


def test_attended_scope_counts_unlabelled_tokens_but_no_padding() -> None:
    candidate, context = lossy("token-classification")
    batch = next(tiny_batches(candidate))
    student, _ = logits_and_task_loss(candidate.network, batch, context)
    expected = kl(student, context.teacher_logits(batch), 2.0, batch["attention_mask"])
    loss = soft_target_loss(context, SoftTerm("token-classification", scope="attended"), alpha=lambda: 1.0)
    torch.testing.assert_close(loss(candidate.network, batch), expected)
    labelled = soft_target_loss(context, "token-classification", alpha=lambda: 1.0)
    assert labelled(candidate.network, batch).item() != pytest.approx(expected.item())


def test_both_terms_come_from_one_forward_pass() -> None:
    candidate, context = lossy()
    passes: list[int] = []
    candidate.network.register_forward_hook(lambda *_: passes.append(1))
    batch = next(tiny_batches(candidate))
    soft_target_loss(context, "text-classification")(candidate.network, batch)
    assert len(passes) == 1
    assert len(candidate.network._forward_hooks) == 1  # ours alone: the capturing one is gone again


@pytest.mark.parametrize("task", TASKS)
def test_training_brings_the_student_nearer_to_the_teacher(task: str) -> None:
    candidate, context = lossy(task)
    context.steps = 25
    result = Distill().apply(candidate, parameters(candidate, alpha=1.0, learning_rate=3e-3), context)
    batch = next(tiny_batches(candidate, batch_size=64, seed=7))
    loss = soft_target_loss(context, task, alpha=lambda: 1.0)
    assert loss(result.network, batch).item() < 0.7 * loss(candidate.network, batch).item()


@pytest.mark.parametrize(("annealing", "middle", "last"), [("none", 0.8, 0.8), ("linear", 0.5, 0.2)])
def test_annealing_moves_the_weight_over_the_training(annealing: str, middle: float, last: float) -> None:
    candidate, context = lossy()
    changes = {"annealing": annealing} | ({"anneal_to": 0.2} if annealing == "linear" else {})
    spy = Spy(context)
    Distill().apply(candidate, parameters(candidate, alpha=0.8, **changes), spy)
    batch = next(tiny_batches(candidate))
    student, hard = logits_and_task_loss(candidate.network, batch, context)
    soft = kl(student, context.teacher_logits(batch), 2.0)
    options = spy.calls[0]
    for step, alpha in ((0, 0.8), (50, middle), (100, last)):
        options["on_step"](step, 100)
        loss = options["loss"](candidate.network, batch)
        torch.testing.assert_close(loss, alpha * soft + (1 - alpha) * hard)


def test_the_scheduler_and_the_shift_reach_the_soft_term() -> None:
    candidate, context = lossy()
    params = parameters(
        candidate,
        alpha=1.0,
        temperature=3.0,
        temperature_scheduler="flsw",
        scheduler_beta=1.5,
        probability_shift=True,
    )
    spy = Spy(context)
    Distill().apply(candidate, params, spy)
    batch = next(tiny_batches(candidate))
    student, _ = logits_and_task_loss(candidate.network, batch, context)
    teacher = shifted(context.teacher_logits(batch), batch["labels"])
    assert not torch.equal(teacher, context.teacher_logits(batch))
    tau = row_temperatures(student, teacher, "flsw", 3.0, beta=1.5)
    loss = spy.calls[0]["loss"](candidate.network, batch)
    torch.testing.assert_close(loss, kl(student, teacher, tau))


@pytest.mark.parametrize("method", [Distill(), BornAgain(), BiLstm()], ids=lambda method: type(method).__name__)
def test_without_a_soft_term_nothing_said_of_it_counts(method: Any) -> None:
    subject = tiny_candidate().subject.having("unlabelled")
    params = defaults(method.search_space(subject))

    def counts(**changes: Any) -> bool:
        return "temperature" in method.effective(subject, {**params, **changes})

    assert counts(alpha=0.5)
    assert not counts(alpha=0.0)
    if "annealing" in params:
        assert counts(alpha=0.0, annealing="linear", anneal_to=0.5)
        assert not counts(alpha=0.0, annealing="none", anneal_to=0.5)
    if "transfer" in params:
        assert counts(alpha=0.0, transfer=0.5), "text without labels has nothing else"


@pytest.mark.parametrize("task", TASKS)
def test_unlabelled_text_comes_first_and_only_the_teacher_speaks_on_it(task: str) -> None:
    candidate, context = lossy(task)
    candidate = candidate.replace(subject=candidate.subject.having("unlabelled"))
    spy = Spy(context)
    params = Distill().effective(candidate.subject, parameters(candidate, transfer=0.4))
    Distill().apply(candidate, params, spy)
    first, second = spy.calls
    assert (first["share"], second["share"]) == (0.4, 0.6)
    batch = next(first["batches"])
    assert "labels" not in batch
    student, teacher = candidate.network(**batch).logits, context.teacher_logits(batch)
    mask = batch["attention_mask"] if task == "token-classification" else None
    expected = mse_logits(student, teacher) if task == "text-regression" else kl(student, teacher, 2.0, mask)
    torch.testing.assert_close(first["loss"](candidate.network, batch), expected)
    context.steps = 5
    Distill().apply(candidate, params, context)
    assert context.fits == [2, 3]


@pytest.mark.parametrize("wish", ["0.4", "{low: 0.0, high: 0.5}"])
def test_a_study_without_such_text_is_refused_and_told_what_is_missing(tiny_study: Any, wish: str) -> None:
    path = tiny_study(methods={"theseus": {}, "distill": {}})
    with pytest.raises(
        StudyError, match=r"methods\.distill\.transfer: .* needs text without labels.*data\.unlabeled"
    ):
        prepare(load_study(path, [f"methods.distill.transfer={wish}"]))
    text = "data.unlabeled=data/test.jsonl"
    prepare(load_study(path, [f"methods.distill.transfer={wish}", text]))


def test_without_such_text_all_of_the_training_is_on_the_labelled_rows() -> None:
    candidate, context = lossy()
    assert "transfer" not in parameters(candidate)
    Distill().apply(candidate, parameters(candidate), context)
    assert context.fits == [context.steps]


def test_its_argument_is_left_alone_and_the_result_is_recovered() -> None:
    candidate, context = lossy()
    before = {name: value.clone() for name, value in candidate.network.state_dict().items()}
    teacher = {name: value.clone() for name, value in context.teacher.state_dict().items()}
    params = parameters(candidate)
    result = Distill().apply(candidate, params, context)
    assert all(torch.equal(value, before[name]) for name, value in candidate.network.state_dict().items())
    assert all(torch.equal(value, teacher[name]) for name, value in context.teacher.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in result.network.state_dict().items())
    assert result.subject == Distill().after(candidate.subject, params) == candidate.subject.without("lossy")


def test_only_a_lossy_step_can_be_recovered() -> None:
    subject = tiny_candidate(layers=2).subject
    assert "nothing to recover" in (Distill().unsupported(subject) or "")
    assert Distill().unsupported(subject.having("lossy")) is None


def test_each_task_has_the_dimensions_that_mean_something() -> None:
    spaces = {task: set(Distill().search_space(tiny_candidate("bert", task, layers=2).subject)) for task in TASKS}
    assert spaces["text-classification"] - spaces["text-regression"] == {
        "soft_loss",
        "temperature",
        "temperature_sq",
        "temperature_scheduler",
        "scheduler_beta",
        "scheduler_gamma",
        "probability_shift",
    }
    assert spaces["token-classification"] - spaces["text-classification"] == {"token_scope"}


def test_the_seed_decides_everything() -> None:
    candidate, context = lossy()
    runs = [Distill().apply(candidate, parameters(candidate), context).network.state_dict()]
    candidate, context = lossy()
    runs.append(Distill().apply(candidate, parameters(candidate), context).network.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
