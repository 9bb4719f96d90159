import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import accuracy_score as seqeval_accuracy
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

from compress_search.errors import NotFinite, TrialError
from compress_search.tasks import IGNORED, RESAMPLES, Task, bounds, is_bio, losses, macro_f1, pearson, spearman

CLASSES = Task("text-classification", ("a", "b", "c"))
NUMBERS = Task("text-regression")
ENTITIES = Task("token-classification", ("B-LOC", "B-PER", "I-LOC", "I-PER", "O"), entities=True)
POS = Task("token-classification", ("ADJ", "NOUN"))


def random_tags(rng, task, sequences=40, right=0.7):
    gold = [rng.integers(task.outputs, size=rng.integers(1, 12)) for _ in range(sequences)]
    chosen = [
        np.where(rng.random(len(row)) < right, row, rng.integers(task.outputs, size=len(row))) for row in gold
    ]
    return [np.eye(task.outputs)[row] for row in chosen], gold, chosen


def random_classes(rng, task, size=200):
    return list(rng.normal(size=(size, task.outputs))), rng.integers(task.outputs, size=size)


class TestShape:
    def test_metrics_follow_the_labels(self):
        assert CLASSES.metrics == ("accuracy", "macro_f1")
        assert NUMBERS.metrics == ("pearson", "spearman")
        assert ENTITIES.metrics == ("f1", "accuracy")
        assert POS.metrics == ("accuracy",)
        assert [task.primary for task in (CLASSES, NUMBERS, ENTITIES, POS)] == [
            "accuracy",
            "pearson",
            "f1",
            "accuracy",
        ]

    def test_a_regression_has_one_output(self):
        assert (CLASSES.outputs, NUMBERS.outputs) == (3, 1)

    @pytest.mark.parametrize("task", [CLASSES, NUMBERS, ENTITIES, POS, replace(CLASSES, numbered=True)])
    def test_it_survives_json(self, task):
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task

    @pytest.mark.parametrize(
        ("tags", "expected"),
        [
            (["O", "B-X", "I-X"], True),
            (["B-X", "B-Y"], True),
            (["O"], False),
            (["O", "BAD"], False),
            (["ADJ", "NOUN"], False),
            (["O", "S-X"], False),
        ],
    )
    def test_only_o_b_and_i_mark_entities(self, tags, expected):
        assert is_bio(tags) is expected


class TestLoss:
    def test_classes_use_cross_entropy(self):
        logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
        torch.testing.assert_close(CLASSES.loss(logits, labels), F.cross_entropy(logits, labels))

    def test_numbers_use_the_squared_error(self):
        logits = torch.tensor([[1.0], [2.0]])
        assert NUMBERS.loss(logits, torch.tensor([0.0, 4.0])).item() == pytest.approx((1 + 4) / 2)

    def test_tokens_are_averaged_over_labelled_positions(self):
        logits, labels = (
            torch.randn(2, 4, 2),
            torch.tensor([[IGNORED, 0, 1, IGNORED], [IGNORED, 1, IGNORED, IGNORED]]),
        )
        real = labels != IGNORED
        torch.testing.assert_close(POS.loss(logits, labels), F.cross_entropy(logits[real], labels[real]))
        logits[~real] += 1e4 * torch.randn_like(logits[~real])
        torch.testing.assert_close(POS.loss(logits, labels), F.cross_entropy(logits[real], labels[real]))

    def test_a_batch_without_labels_costs_nothing(self):
        logits = torch.randn(1, 3, 2, requires_grad=True)
        loss = POS.loss(logits, torch.full((1, 3), IGNORED))
        loss.backward()
        assert loss.item() == 0
        assert logits.grad.abs().max() == 0


class TestScore:
    def test_classes_agree_with_scikit_learn(self):
        logits, gold = random_classes(np.random.default_rng(0), CLASSES)
        chosen = np.argmax(logits, -1)
        expected = {"accuracy": accuracy_score(gold, chosen), "macro_f1": f1_score(gold, chosen, average="macro")}
        assert CLASSES.score(logits, gold) == pytest.approx(expected)

    def test_macro_f1_leaves_out_classes_that_never_occur(self):
        gold, chosen = np.array([0, 0, 1]), np.array([0, 1, 1])
        expected = f1_score(gold, chosen, average="macro")
        assert CLASSES.score(np.eye(3)[chosen], gold)["macro_f1"] == pytest.approx(expected)

    def test_correlations_agree_with_scipy_with_ties(self):
        rng = np.random.default_rng(1)
        gold = rng.integers(5, size=100) / 2
        logits = np.round(gold + rng.normal(size=100), 1)[:, None]
        found = NUMBERS.score(list(logits), gold)
        assert found["pearson"] == pytest.approx(pearsonr(logits[:, 0], gold).statistic)
        assert found["spearman"] == pytest.approx(spearmanr(logits[:, 0], gold).statistic)

    @pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
    def test_a_constant_correlates_with_nothing(self, constant):
        found = NUMBERS.score([np.array([constant])] * 7, np.arange(7.0))
        assert found == {"pearson": 0.0, "spearman": 0.0}

    def test_entities_agree_with_seqeval(self):
        logits, gold, chosen = random_tags(np.random.default_rng(2), ENTITIES)
        names = [[ENTITIES.labels[i] for i in row] for row in gold]
        predicted = [[ENTITIES.labels[i] for i in row] for row in chosen]
        found = ENTITIES.score(logits, gold)
        assert found["f1"] == pytest.approx(seqeval_f1(names, predicted))
        assert found["accuracy"] == pytest.approx(seqeval_accuracy(names, predicted))
        assert 0 < found["f1"] < 1

    def test_no_entities_anywhere_score_zero(self):
        nothing = np.full(3, ENTITIES.labels.index("O"))
        assert ENTITIES.score([np.eye(5)[nothing]], [nothing]) == {"f1": 0.0, "accuracy": 1.0}

    def test_tags_without_entities_have_an_accuracy_only(self):
        logits, gold, chosen = random_tags(np.random.default_rng(3), POS)
        right = np.concatenate(gold) == np.concatenate(chosen)
        assert POS.score(logits, gold) == {"accuracy": pytest.approx(right.mean())}

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_logits_that_are_not_finite_fail_the_trial(self, bad):
        logits = np.zeros((4, 3))
        logits[2, 1] = bad
        with pytest.raises(NotFinite, match="1 of 4 examples") as caught:
            CLASSES.score(logits, np.zeros(4, dtype=int))
        assert isinstance(caught.value, TrialError)
        assert caught.value.kind == "nan"

    def test_unpad_keeps_labelled_positions_only(self):
        logits = np.arange(2 * 3 * 2).reshape(2, 3, 2)
        labels = np.array([[IGNORED, 1, 0], [0, IGNORED, IGNORED]])
        found, truth = POS.unpad(logits, labels)
        assert [row.tolist() for row in found] == [[[2, 3], [4, 5]], [[6, 7]]]
        assert [row.tolist() for row in truth] == [[1, 0], [0]]


def random_answers(rng, task):
    """Logits and labels of any task, some of them wrong."""
    if task.tokens:
        logits, gold, _ = random_tags(rng, task)
        return logits, gold
    if task.labels:
        return random_classes(rng, task)
    gold = rng.normal(size=100)
    return list((gold + rng.normal(size=100))[:, None]), gold


class TestConstantScore:
    def test_classes_take_the_most_frequent_one(self):
        assert CLASSES.constant_score([0, 2, 2, 1, 2]) == {
            "accuracy": pytest.approx(0.6),
            "macro_f1": pytest.approx(0.75 / 3),
        }

    def test_numbers_cannot_be_ranked_by_a_constant(self):
        assert NUMBERS.constant_score([1.0, 2.0, 5.0]) == {"pearson": 0.0, "spearman": 0.0}

    def test_tags_take_the_most_frequent_one(self):
        outside = ENTITIES.labels.index("O")
        labels = [np.array([outside, outside, 1]), np.array([outside])]
        assert ENTITIES.constant_score(labels) == {"f1": 0.0, "accuracy": 0.75}


class TestIntervals:
    """A resample in which an example counts k times must score as a data set that holds it k times."""

    @given(st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(lambda weights: sum(weights) > 2))
    @settings(max_examples=30, deadline=None)
    def test_weights_are_repetitions(self, weights):
        rng = np.random.default_rng(5)
        gold, chosen = rng.integers(3, size=12), rng.integers(3, size=12)
        x, y = rng.integers(4, size=12) / 2, rng.normal(size=12)
        rows, once = np.repeat(np.arange(12), weights), np.array([weights], dtype=float)
        expected = f1_score(gold[rows], chosen[rows], average="macro", zero_division=0)
        assert macro_f1(chosen, gold, once)[0] == pytest.approx(expected)
        if len(set(x[rows])) > 1 and len(set(y[rows])) > 1:
            assert pearson(x, y, once)[0] == pytest.approx(pearsonr(x[rows], y[rows]).statistic)
            assert spearman(x, y, once)[0] == pytest.approx(spearmanr(x[rows], y[rows]).statistic)

    @pytest.mark.parametrize("task", [CLASSES, NUMBERS, ENTITIES, POS])
    def test_the_score_lies_inside(self, task):
        logits, gold = random_answers(np.random.default_rng(6), task)
        score, intervals = task.score(logits, gold), bounds(task.resampled(logits, gold))
        assert set(score) == set(intervals) == set(task.metrics)
        for name, (low, high) in intervals.items():
            assert low < score[name] < high

    def test_accuracy_has_the_binomial_width(self):
        gold = np.zeros(1000, dtype=int)
        chosen = np.where(np.arange(1000) < 800, 0, 1)
        low, high = bounds(CLASSES.resampled(np.eye(3)[chosen], gold))["accuracy"]
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 1000), rel=0.1)

    def test_sequences_are_resampled_whole(self):
        """Tokens of a sequence that are all right or all wrong count as one example for the interval's width."""
        gold = [np.zeros(25, dtype=int)] * 100
        logits = [np.eye(2)[np.full(25, int(i < 20))] for i in range(100)]
        low, high = bounds(POS.resampled(logits, gold))["accuracy"]
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 100), rel=0.15)

    @pytest.mark.parametrize("task", [CLASSES, NUMBERS, ENTITIES, POS])
    def test_nothing_is_lost_against_itself(self, task):
        logits, gold = random_answers(np.random.default_rng(10), task)
        found = bounds(losses(task.resampled(logits, gold), task.resampled(logits, gold)))
        assert found == {f"{name}_drop": (0.0, 0.0) for name in task.metrics}

    def test_what_both_get_wrong_does_not_widen_the_interval_of_what_is_lost(self):
        """As wide as McNemar's: only the examples on which the two differ count."""
        gold = np.zeros(1000, dtype=int)
        theirs = np.where(np.arange(1000) < 200, 1, 0)
        ours = np.where(np.arange(1000) < 230, 1, 0)  # 30 more errors
        drawn = [CLASSES.resampled(np.eye(3)[chosen], gold) for chosen in (theirs, ours)]
        low, high = bounds(losses(*drawn))["accuracy_drop"]
        assert low < 0.03 < high
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.03 * 0.97 / 1000), rel=0.1)
        alone = bounds(CLASSES.resampled(np.eye(3)[ours], gold))["accuracy"]
        assert high - low < 0.5 * (alone[1] - alone[0])

    def test_a_model_that_reads_less_of_a_text_is_compared_by_its_own_labels(self):
        gold = [np.array([0, 1]), np.array([1, 1, 0])] * 50
        cut = [row[:1] for row in gold]
        right, wrong = [np.eye(2)[row] for row in gold], [np.eye(2)[1 - row] for row in cut]
        lost = losses(POS.resampled(right, gold), POS.resampled(wrong, cut))
        assert bounds(lost) == {"accuracy_drop": (1.0, 1.0)}

    def test_a_seed_repeats_and_another_differs(self):
        logits, gold = random_classes(np.random.default_rng(7), CLASSES)
        first, again = (
            bounds(CLASSES.resampled(logits, gold, seed=1)),
            bounds(CLASSES.resampled(logits, gold, seed=1)),
        )
        assert first == again != bounds(CLASSES.resampled(logits, gold, seed=2))

    def test_a_higher_level_is_wider(self):
        logits, gold = random_classes(np.random.default_rng(8), CLASSES)
        (low, high), (lower, higher) = (bounds(CLASSES.resampled(logits, gold), p)["accuracy"] for p in (0.8, 0.99))
        assert lower < low < high < higher

    @pytest.mark.parametrize("task", [CLASSES, NUMBERS, ENTITIES])
    def test_it_is_cheap(self, task):
        rng = np.random.default_rng(9)
        if task.tokens:
            logits, gold, _ = random_tags(rng, task, sequences=2000)
        else:
            logits, gold = (
                list(rng.normal(size=(2000, task.outputs))),
                rng.integers(task.outputs + 1, size=2000) % 3,
            )
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            bounds(task.resampled(logits, gold))
            seconds.append(time.perf_counter() - started)
        # 0.1 to 0.25 s on a quiet core; a loop over the resamples would take tens of seconds
        assert min(seconds) < 2
        assert RESAMPLES == 1000
