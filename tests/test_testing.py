"""The contract's own tests: sound methods pass, and each way to break it is caught by the check meant for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress_search import Candidate, Context, Dim, Method, Params, Stage, Subject, TrialError
from compress_search.encoders import keep_layers, parts, prune_neurons, subject_of
from compress_search.encoders import layers as layers_of
from compress_search.testing import (
    ContractBroken,
    MethodContract,
    check_method,
    checks,
    contract,
    tiny_batches,
    tiny_candidate,
    tiny_context,
)
from compress_search.testing.rehearsal import Rehearsal, draw
from compress_search.training import forward

FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
TASKS = ("text-classification", "text-regression", "token-classification")


class Mask(nn.Module):
    """Keeps the larger half of a matrix's entries, whatever training does to the rest."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", weight.abs() > weight.abs().median())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Halve(Method):
    """A correct method: masks half of every feed-forward matrix so that it stays masked."""

    stage = Stage.SPARSITY

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        """Which matrices."""
        return {"matrices": Dim.choice(("up", "down"), "up")}

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        """Mask by parametrization."""
        candidate = candidate.copy()
        for layer in layers_of(candidate.network):
            linear = getattr(parts(layer), str(params["matrices"]))
            parametrize.register_parametrization(linear, "weight", Mask(linear.weight.detach()))
        return candidate


class Naive(Halve):
    """Zeroes the weights themselves: the next training step revives them."""

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        for layer in layers_of(candidate.network):
            weight = getattr(parts(layer), str(params["matrices"])).weight
            weight.data *= weight.abs() > weight.abs().median()
        return candidate


class Identity(Halve):
    """Does nothing; the base of what is broken in one place."""

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"ratio": Dim.real(0.0, 1.0, 0.5)}

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        return candidate.copy()


class Modest(Halve):
    """Says that it changes nothing, and halves weights."""

    def changes_nothing(self, subject: Subject, params: Params) -> bool:
        return True


class NoStage(Identity):
    stage = 6  # type: ignore[assignment]


class Vague(Identity):
    def unsupported(self, subject: Subject) -> str | None:
        return "" if "shared" in subject.traits else None


class Forgetful(Identity):
    calls = 0

    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        type(self).calls += 1
        return {"ratio": Dim.real(0.0, 1.0 + self.calls, 0.5)}


class BadDefault(Identity):
    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"heads": Dim.integer(1, 4, 8)}


class Dangling(Identity):
    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {"ratio": Dim.real(0.0, 1.0, 0.5, when={"mode": ("on",)})}


class NeverActive(Identity):
    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        modes = Dim.choice(("a", "b"), "a")
        return {"mode": modes, "ratio": Dim.real(0.0, 1.0, 0.5, when={"mode": ("c",)})}


class Shrinking(Identity):
    def effective(self, subject: Subject, params: Params) -> Params:
        return {"ratio": float(params["ratio"]) / 2}


class Escaping(Identity):
    def effective(self, subject: Subject, params: Params) -> Params:
        return {"ratio": 2.0}


class Choosy(Identity):
    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        return {"ratio": "expected another"}


class FaultsOfNothing(Identity):
    def faults(self, subject: Subject, params: Params) -> Mapping[str, str]:
        return {} if params["ratio"] == 0.5 else {"ration": "expected another"}


class MissesWhatIsThere(Identity):
    def missing(self, teacher: Subject) -> Mapping[str, str]:
        return {"ratio": "another teacher"}


class MissesAChoiceThatIsThere(Identity):
    def search_space(self, teacher: Subject) -> Mapping[str, Dim]:
        return {**super().search_space(teacher), "how": Dim.choice(("fast", "well"), "fast")}

    def missing(self, teacher: Subject) -> Mapping[str, str]:
        return {"how: cheaply": "a smaller teacher", "how: well": "a better teacher"}


class Fails(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        raise TrialError("not today")


class AssumesEvenLayers(Identity):
    """Cuts every layer to half of the first one's width, which another may not have."""

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        width = parts(layers_of(candidate.network)[0]).neurons // 2
        prune_neurons(candidate.network, {index: range(width) for index in range(4)})
        return candidate.replace(subject=self.after(candidate.subject, params))

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having(intermediate=32)


class Diverges(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        next(candidate.network.parameters()).data[:] = float("nan")
        return candidate


class OnTheArgument(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        next(candidate.network.parameters()).data *= 1.5
        return candidate


class OnTheTeacher(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        next(context.teacher.parameters()).data *= 1.5
        return candidate.copy()


class Borrows(Identity):
    """Hands on its argument's network, which the next step then trains."""

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        return candidate


class Silent(Identity):
    """Cuts layers and says nothing of it in ``after``."""

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        keep_layers(candidate.network, [0])
        return candidate


class Boastful(Identity):
    """Says in ``after`` what it does not hand on."""

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having("lossy", layers=1)


class Uneven(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        # one layer loses half, the next gains nothing: the mean is right only by accident of what after says
        prune_neurons(candidate.network, {0: range(32)})
        return candidate.replace(subject=self.after(candidate.subject, params))

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having(intermediate=subject.intermediate - 32 / subject.layers)


class Undeclared(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        context.fit(candidate.network)
        return candidate


class OwnLoop(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        optimizer = torch.optim.SGD(candidate.network.parameters(), lr=0.1)
        for batch in context.calibration(16):
            context.task_loss(candidate.network, batch).backward()
            optimizer.step()
        return candidate


class Greedy(Undeclared):
    def trains(self, params: Params) -> bool:
        return True

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        for _ in range(3):
            candidate = super().apply(candidate, params, context)
        return candidate


class Unseeded(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        fresh = torch.Generator()
        fresh.seed()
        weight = next(candidate.network.parameters())
        weight.data += torch.randn(weight.shape, generator=fresh)
        return candidate


class OtherShapesWhenDry(Identity):
    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()
        if not context.dry:
            keep_layers(candidate.network, [0, 1])
        return candidate.replace(subject=self.after(candidate.subject, params))

    def after(self, subject: Subject, params: Params) -> Subject:
        return subject.having(layers=2)


class Unsaveable(Identity):
    """Leaves something in the network that no file holds."""

    def apply(self, candidate: Candidate, params: Params, context: Context) -> Candidate:
        candidate = candidate.copy()

        def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
            return output * 2

        layers_of(candidate.network)[0].register_forward_hook(scale)
        return candidate


class Infinite(Identity):
    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        return {"sparsity": float("inf")}


class Meddling(Identity):
    def evaluate(self, candidate: Candidate, context: Context) -> Mapping[str, float]:
        next(candidate.network.parameters()).data *= 2
        return {}


BROKEN: dict[type[Method], str] = {
    NoStage: "declares_its_stage",
    Vague: "unsupported_gives_reasons",
    Forgetful: "search_space_is_pure",
    BadDefault: "defaults_lie_inside",
    Dangling: "conditions_name_dimensions",
    NeverActive: "conditions_name_dimensions",
    Shrinking: "effective_is_idempotent",
    Escaping: "effective_is_idempotent",
    Choosy: "faults_name_dimensions",
    FaultsOfNothing: "faults_name_dimensions",
    MissesWhatIsThere: "missing_dimensions_are_missing",
    MissesAChoiceThatIsThere: "missing_dimensions_are_missing",
    Fails: "drawn_parameters_apply",
    AssumesEvenLayers: "drawn_parameters_apply",
    Diverges: "drawn_parameters_apply",
    OnTheArgument: "leaves_the_others_alone",
    OnTheTeacher: "leaves_the_others_alone",
    Modest: "nothing_is_changed_where_it_says_so",
    Silent: "leaves_what_after_says",
    Boastful: "leaves_what_after_says",
    Uneven: "leaves_what_after_says",
    Undeclared: "trains_as_declared",
    OwnLoop: "trains_as_declared",
    Greedy: "trains_as_declared",
    Naive: "survives_later_training",
    Borrows: "survives_later_training",
    Unseeded: "same_seed_same_weights",
    OtherShapesWhenDry: "dry_run_has_the_shapes",
    Unsaveable: "saves_and_reloads",
    Infinite: "evaluate_gives_numbers",
    Meddling: "evaluate_gives_numbers",
}


@pytest.mark.parametrize(("kind", "name"), BROKEN.items(), ids=[kind.__name__ for kind in BROKEN])
def test_a_broken_method_fails_the_check_meant_for_it(kind: type[Method], name: str) -> None:
    check = dict(checks(kind()))[name]
    with pytest.raises((ContractBroken, TrialError, ValueError)):
        check()


def test_a_sound_method_keeps_the_whole_contract() -> None:
    assert [result for result in check_method(Identity()) if not result.ok] == []


def test_every_check_has_a_method_that_fails_it() -> None:
    assert set(BROKEN.values()) == {name for name, _ in checks(Identity())}


def test_an_expected_failure_is_reported_with_its_reason_and_must_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "survives_later_training"
    monkeypatch.setattr(contract, "CHECKS", {name: contract.CHECKS[name]})
    (broken,) = check_method(Naive(), {name: "zeros are not its point"})
    assert broken.ok
    assert not broken.passed
    assert "revives the zeros" in broken.message
    (cured,) = check_method(Identity(), {name: "outdated"})
    assert not cured.ok
    assert "expected to fail: outdated" in cured.message


def test_an_exception_for_an_unknown_check_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such check: survives"):
        check_method(Identity(), {"survives": "?"})


class TestHalve(MethodContract):
    """The class a plugin's author subclasses, used as they would."""

    method = Halve()


class TestNaive(MethodContract):
    method = Naive()
    expected_failures: ClassVar = {"survives_later_training": "the example of what goes wrong"}


def test_a_method_that_supports_no_model_says_why() -> None:
    class Picky(Identity):
        def unsupported(self, subject: Subject) -> str | None:
            return "wants a GPU"

    with pytest.raises(ContractBroken, match=r"supports none of the tiny models .*wants a GPU"):
        _ = Rehearsal(Picky()).models


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_candidates_of_every_family_and_task_run(family: str, task: str) -> None:
    candidate = tiny_candidate(family, task, layers=2)
    batch = next(tiny_batches(candidate))
    logits = forward(candidate.network, batch)
    columns = {"text-classification": 2, "text-regression": 1, "token-classification": 3}[task]
    rows = batch["input_ids"].shape if task == "token-classification" else batch["input_ids"].shape[:1]
    assert logits.shape == (*rows, columns)
    assert candidate.subject == subject_of(candidate.network, task)
    assert candidate.subject.layers == 2


def test_tiny_batches_are_the_same_for_the_same_seed_and_end_when_asked_to() -> None:
    candidate = tiny_candidate(layers=2)
    first, second = (list(tiny_batches(candidate, batch_size=8, seed=3, examples=20)) for _ in range(2))
    assert [len(batch["labels"]) for batch in first] == [8, 8, 4]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    assert not torch.equal(first[0]["labels"], next(tiny_batches(candidate, seed=4))["labels"])


def test_the_tiny_context_calibrates_on_no_more_than_it_trains_on() -> None:
    context = tiny_context(tiny_candidate())
    assert sum(len(batch["labels"]) for batch in context.calibration(10)) == 10
    assert sum(len(batch["labels"]) for batch in context.calibration(1000)) == context.examples


def test_the_tiny_context_really_trains() -> None:
    candidate = tiny_candidate(task="token-classification", layers=2)
    context = tiny_context(candidate, steps=80, batch_size=32)

    def accuracy() -> float:
        batch = next(tiny_batches(candidate, batch_size=256, seed=99))
        labelled = batch["labels"] != -100
        with torch.no_grad():
            right = forward(candidate.network, batch).argmax(-1) == batch["labels"]
        return float(right[labelled].float().mean())

    before = accuracy()
    context.fit(candidate.network, learning_rate=1e-2)
    assert before < 0.4
    assert accuracy() > 0.75


def test_the_tiny_context_keeps_to_the_interface(tmp_path: Path) -> None:
    def lend(context: Context) -> Context:
        return context

    candidate = tiny_candidate(layers=2)
    context = tiny_context(candidate, steps=6, scratch=tmp_path)
    lend(context)
    seen: list[tuple[int, int]] = []
    context.fit(candidate.network.train(), share=0.5, on_step=lambda step, steps: seen.append((step, steps)))
    assert seen == [(0, 3), (1, 3), (2, 3)]
    assert context.fits == [3]
    assert not candidate.network.training
    batch = next(tiny_batches(candidate))
    assert context.teacher_logits(batch).shape == (8, 2)
    assert sum(len(part["labels"]) for part in context.calibration(20, batch_size=8)) == 20
    with pytest.raises(TrialError, match=r"got 0\.0"):
        context.fit(candidate.network, share=0.0)


def test_a_dry_context_trains_no_step() -> None:
    candidate = tiny_candidate(layers=2)
    before = {name: tensor.clone() for name, tensor in candidate.network.state_dict().items()}
    tiny_context(candidate, dry=True).fit(candidate.network, learning_rate=1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in candidate.network.state_dict().items())


def test_the_scratch_directory_goes_with_its_context() -> None:
    context = tiny_context(tiny_candidate(layers=2))
    scratch = context.scratch
    assert scratch.is_dir()
    del context
    assert not scratch.exists()


def test_random_parameters_are_active_and_inside() -> None:
    import random

    space = {
        "mode": Dim.choice(("on", "off"), "on"),
        "ratio": Dim.real(1e-4, 1.0, 0.1, log=True, when={"mode": ("on",)}),
        "layers": Dim.integer(2, 8, 4, step=2),
    }

    def draws() -> Iterator[dict[str, Any]]:
        rng = random.Random(1)
        for _ in range(200):
            yield draw(space, rng)

    for params in draws():
        assert ("ratio" in params) == (params["mode"] == "on")
        assert all(space[name].contains(value) for name, value in params.items())
    assert {params["layers"] for params in draws()} == {2, 4, 6, 8}
