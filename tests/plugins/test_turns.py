"""Learning further tasks by turns: whose turn a step is, what its loss is, and what stays of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count, pairwise
from typing import Any

import pytest
import torch
from compress_search_plugins.distill import Distill
from compress_search_plugins.distillation.soft_targets import SoftTerm, soft_target_loss
from compress_search_plugins.distillation.turns import TURN, Head, take_turns, turn_shares
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress_search import AuxiliaryTask, Batch, Candidate
from compress_search.encoders import backbone, head, read_features
from compress_search.losses import mixed
from compress_search.space import defaults
from compress_search.testing import TinyContext, tiny_candidate, tiny_context

TASKS = ("text-classification", "text-regression", "token-classification")


class Listening(TinyContext):
    """Keeps what ``fit`` was asked for."""

    asked: list[dict[str, Any]]

    def fit(self, network: nn.Module, **options: Any) -> None:
        self.asked = [*getattr(self, "asked", []), options]
        super().fit(network, **options)


def lossy(task: str = "text-classification", seed: int = 1) -> tuple[Candidate, Listening]:
    """A network unlike its teacher in a study that names a further task, and the context of that teacher."""
    candidate = tiny_candidate("bert", task, layers=2, seed=seed)
    plain = tiny_context(tiny_candidate("bert", task, layers=2))
    context = Listening(plain.candidate, plain.scratch)
    return candidate.replace(subject=candidate.subject.having("lossy", "auxiliary")), context


def distilled(candidate: Candidate, context: TinyContext, **changes: Any) -> Candidate:
    params = defaults(Distill().search_space(candidate.subject)) | changes
    return Distill().apply(candidate, Distill().effective(candidate.subject, params), context)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.floats(0, 1))
def test_shares_lie_between_equal_ones_and_those_of_the_examples(sizes: list[int], exponent: float) -> None:
    shares = turn_shares(sizes, exponent)
    assert sum(shares) == pytest.approx(1)
    assert turn_shares(sizes, 0) == pytest.approx([1 / len(sizes)] * len(sizes))
    assert turn_shares(sizes, 1) == pytest.approx([size / sum(sizes) for size in sizes])
    ordered = sorted(zip(sizes, shares, strict=True))
    assert all(a <= b + 1e-12 for (_, a), (_, b) in pairwise(ordered)), "more is never less"
    assert turn_shares([100, 1], 0.5) == pytest.approx([10 / 11, 1 / 11])


def numbered(start: int) -> Iterator[Batch]:
    return ({"index": torch.tensor(start + n)} for n in count())


def test_turns_are_drawn_by_shares_and_no_batch_is_left_out() -> None:
    streams = [numbered(0), numbered(10_000), numbered(20_000)]
    turns = take_turns(streams, [0.5, 0.3, 0.2], 0, lambda: False)
    drawn = [(int(batch[TURN]), int(batch["index"])) for batch, _ in zip(turns, range(3000), strict=False)]
    times = Counter(turn for turn, _ in drawn)
    assert [times[turn] / 3000 for turn in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    for turn in range(3):
        assert [n for t, n in drawn if t == turn] == list(range(turn * 10_000, turn * 10_000 + times[turn]))


def test_alone_every_turn_is_the_studys_own() -> None:
    alone = False
    turns = take_turns([numbered(0), numbered(10_000)], [0.0, 1.0], 0, lambda: alone)
    assert {int(next(turns)[TURN]) for _ in range(20)} == {1}
    alone = True
    assert {int(next(turns)[TURN]) for _ in range(20)} == {0}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("whose", [0, 1, 2])
def test_a_step_is_of_one_task_alone(task: str, whose: int) -> None:
    """Its loss is that task's, and so is its gradient, but for the encoder, which all share."""
    candidate, context = lossy(task)
    context.steps = 2
    distilled(candidate, context, alpha=0.25, annealing="linear", anneal_to=0.75)
    (options,) = context.asked
    options["on_step"](1, 2)
    network, heads = candidate.network.eval(), options["beside"].eval()
    batch = next(context.auxiliary()[whose - 1].batches if whose else context.training_batches())
    if whose:
        further, own_head = context.auxiliary()[whose - 1], heads[whose - 1]
        logits = own_head(read_features(network, batch, ["hidden.2"])["hidden.2"])
        # where the study's own task predicts numbers there is no temperature
        term = SoftTerm(further.kind, temperature=1.0 if task == "text-regression" else 2.0)
        soft, hard = term(logits, further.teacher_logits(batch), batch), further.loss(logits, batch["labels"])
        expected = mixed(soft, hard, 0.5)
    else:
        expected = soft_target_loss(context, task, alpha=lambda: 0.5)(network, batch)
    found = options["loss"](network, {**batch, TURN: torch.tensor(whose)})
    torch.testing.assert_close(found, expected)
    found.backward()
    assert touched(backbone(network))
    assert all(touched(module) == (whose == 0) for module in head(network))
    assert [touched(module) for module in heads] == [whose == 1, whose == 2]


def touched(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_without_turns_nothing_of_further_tasks_is_looked_at(task: str) -> None:
    candidate, context = lossy(task)
    plain, alone = lossy(task)
    plain = plain.replace(subject=plain.subject.without("auxiliary"))
    first, second = distilled(candidate, context, by_turns=0.0), distilled(plain, alone)
    assert same(first.network, second.network)
    assert not same(distilled(candidate, lossy(task)[1], by_turns=0.9).network, second.network)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_turns_end_where_the_study_says_and_what_was_annealed_goes_on() -> None:
    candidate, context = lossy()
    context.steps = 100
    distilled(candidate, context, by_turns=0.4, turn_exponent=0.0, alpha=0.0, annealing="linear", anneal_to=1.0)
    (options,) = context.asked
    whose = []
    for step in range(100):
        options["on_step"](step, 100)
        whose.append(int(next(options["batches"])[TURN]))
    assert set(whose[:40]) == {0, 1, 2}
    assert set(whose[40:]) == {0}
    own = next(context.training_batches())
    network = candidate.network.eval()
    for step, alpha in ((0, 0.0), (50, 0.5), (100, 1.0)):
        options["on_step"](step, 100)
        expected = soft_target_loss(context, "text-classification", alpha=lambda alpha=alpha: alpha)(network, own)
        torch.testing.assert_close(options["loss"](network, {**own, TURN: torch.tensor(0)}), expected)


@pytest.mark.parametrize("task", TASKS)
def test_all_tasks_are_learnt_and_only_the_studys_own_is_kept(task: str) -> None:
    candidate, context = lossy(task)
    context.steps, context.batch_size = 250, 16
    names = list(candidate.network.state_dict())
    result = distilled(candidate, context, by_turns=0.9, alpha=0.0, learning_rate=3e-3)
    assert list(result.network.state_dict()) == names
    for further, trained in zip(context.auxiliary(), context.asked[0]["beside"].eval(), strict=True):
        right = []
        for batch, _ in zip(further.batches, range(16), strict=False):
            states = read_features(result.network.eval(), batch, ["hidden.2"])["hidden.2"]
            asked = batch["labels"] != -100
            right.append((trained(states).argmax(-1) == batch["labels"])[asked].float().mean())
        assert torch.stack(right).mean() > 0.7, f"{further.kind}: one half is chance, or the commonest tag"
    own = [next(context.training_batches()) for _ in range(8)]
    before, after = (mean_loss(context, network, own) for network in (candidate.network, result.network))
    assert after < 0.7 * before


def mean_loss(context: TinyContext, network: nn.Module, batches: list[Batch]) -> float:
    with torch.no_grad():
        losses: list[Tensor] = [context.task_loss(network.eval(), batch) for batch in batches]
    return float(torch.stack(losses).mean())


def test_how_often_each_has_its_turn_follows_from_the_examples() -> None:
    """The tags are four times as many as the study's own examples, and as those of the other further task."""
    for exponent, tags in ((0.0, 1 / 3), (0.5, 1 / 2), (1.0, 2 / 3)):
        candidate, context = lossy()
        distilled(candidate, context, by_turns=0.9, turn_exponent=exponent)
        batches = context.asked[0]["batches"]
        times = Counter(int(next(batches)[TURN]) for _ in range(600))
        assert times[2] / 600 == pytest.approx(tags, abs=0.06)
        assert times[0] / 600 == pytest.approx((1 - tags) / 2, abs=0.06)


@pytest.mark.parametrize(("kind", "shape"), [("token-classification", (2, 5, 3)), ("text-regression", (2, 3))])
def test_a_head_answers_for_words_or_for_the_text(kind: str, shape: tuple[int, ...]) -> None:
    task = AuxiliaryTask(kind, 3, 1, iter(()), lambda a, b: a, lambda batch: torch.zeros(1))
    assert Head(8, task)(torch.randn(2, 5, 8)).shape == shape


def test_a_recurrent_student_takes_no_turns() -> None:
    candidate, _ = lossy()
    params = defaults(Distill().search_space(candidate.subject))
    assert Distill().effective(candidate.subject, params) == params
    settled = Distill().effective(candidate.subject.having("recurrent"), params)
    assert settled["by_turns"] == 0
    assert "turn_exponent" not in settled
    assert Distill().effective(candidate.subject, settled) == settled
