"""Methods on a network with a CRF: who freezes it, who takes it along, and what distillation learns from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_search_plugins import born_again
from compress_search_plugins.bilstm import BiLstm
from compress_search_plugins.born_again import BornAgain
from compress_search_plugins.distilbert import DistilBert
from compress_search_plugins.distill import Distill
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.distillation.objective import Objective
from compress_search_plugins.distillation.soft_targets import SoftTerm, soft_target_loss, transfer_loss
from compress_search_plugins.layer_match import LayerMatch
from compress_search_plugins.minilm import MiniLM
from compress_search_plugins.plain_student import PlainStudent
from compress_search_plugins.quantization import Quantization
from compress_search_plugins.shortcut import Shortcut
from compress_search_plugins.structured_pruning import StructuredPruning
from compress_search_plugins.theseus import Theseus
from compress_search_plugins.tinybert import TinyBert
from torch import Tensor, nn

from compress_search import Candidate, Method
from compress_search.candidate import Subject
from compress_search.encoders import attach_crf, crf_of, describe, subject_of
from compress_search.losses import kl
from compress_search.space import defaults, narrow
from compress_search.testing import TinyContext, tiny_batches, tiny_candidate, tiny_context

TASK = "token-classification"


def with_crf(seed: int = 0, layers: int = 2) -> Candidate:
    """The tiny tagger with random transitions."""
    candidate = tiny_candidate("bert", TASK, layers, seed=seed)
    network: Any = candidate.network
    network.config.crf = True
    attach_crf(network)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.crf.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return candidate.replace(subject=subject_of(network, TASK))


def crf_state(network: nn.Module) -> list[Tensor]:
    crf = crf_of(network)
    assert crf is not None
    return [tensor.clone() for tensor in crf.state_dict().values()]


def parameters(method: Method, candidate: Candidate, **changes: Any) -> dict[str, Any]:
    return dict(method.effective(candidate.subject, defaults(method.search_space(candidate.subject)) | changes))


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Theseus


class Watched:
    """A Context that notes the state of the head after each phase."""

    def __init__(self, context: TinyContext) -> None:
        self._context = context
        self.after: list[tuple[list[Tensor], Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def fit(self, network: nn.Module, **options: Any) -> None:
        self._context.fit(network, **options)
        self.after.append((crf_state(network), network.classifier.weight.detach().clone()))  # type: ignore[operator, union-attr]


def test_theseus_freezes_the_head_with_its_crf_hands_it_to_the_successor_and_frees_it() -> None:
    candidate = with_crf()
    watched: Any = Watched(tiny_context(candidate))
    before = crf_state(candidate.network), candidate.network.classifier.weight.detach().clone()  # type: ignore[operator, union-attr]
    method = Theseus()
    result = method.apply(candidate, parameters(method, candidate), watched)
    (first, classifier), (second, later) = watched.after
    assert equal(first, before[0])
    assert torch.equal(classifier, before[1])
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(classifier, later)
    assert equal(crf_state(result.network), second)
    assert all(parameter.requires_grad for parameter in result.network.parameters())
    assert equal(crf_state(candidate.network), before[0])


def test_theseus_trains_it_in_stage_one_when_asked_to_train_the_head() -> None:
    candidate = with_crf()
    watched: Any = Watched(tiny_context(candidate))
    method = Theseus()
    method.apply(candidate, parameters(method, candidate, train_head_in_stage1=True), watched)
    assert not equal(watched.after[0][0], crf_state(candidate.network))


# every method that makes a network


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (Theseus(), {}),
        (LayerMatch(), {"width": 0.5}),
        (LayerMatch(), {}),
        (MiniLM(), {"width": 0.5}),
        (BornAgain(), {}),
        (PlainStudent(), {}),
        (BiLstm(), {"units": 32, "alpha": 0.5}),
        (StructuredPruning(), {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else str(value),
)
def test_it_comes_along_with_shapes_as_promised(method: Method, changes: dict[str, Any]) -> None:
    candidate = with_crf(layers=4)
    params = parameters(method, candidate, **changes)
    assert method.unsupported(candidate.subject) is None
    dry = method.apply(candidate, params, tiny_context(candidate, dry=True))
    if not isinstance(method, BornAgain | PlainStudent):  # these start as the network once was
        assert equal(crf_state(dry.network), crf_state(candidate.network))
    result = method.apply(candidate, params, tiny_context(candidate))
    assert "crf" in method.after(candidate.subject, params).traits
    assert "crf" in subject_of(result.network, TASK).traits
    assert not equal(crf_state(result.network), crf_state(dry.network))  # it was trained with the rest
    trained = sum(parameter.numel() for parameter in result.network.parameters())
    if "non-uniform" not in result.subject.traits:
        assert result.subject.parameters == trained
    assert describe(result.network)["config"]["crf"] is True


def test_a_network_of_sixteen_bits_keeps_its_transitions() -> None:
    candidate = with_crf()
    subject = candidate.subject.having("kernel:bf16")
    method, given = Quantization(), candidate.replace(subject=subject)
    result = method.apply(given, parameters(method, given, weight_bits=16), tiny_context(given))
    assert equal(crf_state(result.network), crf_state(candidate.network))
    assert {p.dtype for p in crf_of(result.network).parameters()} == {torch.float32}  # type: ignore[union-attr]
    assert describe(result.network)["dtype"] in ("bfloat16", "float16")


# distillation


def pair() -> tuple[Candidate, TinyContext, dict[str, Tensor]]:
    """A student, the context of its teacher, and a batch."""
    student, teacher = with_crf(seed=1), with_crf()
    return student, tiny_context(teacher), next(tiny_batches(teacher))


def soft(student: Candidate, context: TinyContext, batch: dict[str, Tensor], **term: Any) -> Tensor:
    return soft_target_loss(context, SoftTerm(TASK, **term), alpha=lambda: 1.0)(student.network, batch)


def test_targets_are_the_named_losses() -> None:
    student, context, batch = pair()
    ours: Any = crf_of(student.network)
    theirs: Any = crf_of(context.teacher)
    mask = batch["labels"] != -100
    given = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    said, expected = student.network(**given).logits, context.teacher_logits(batch)
    torch.testing.assert_close(
        soft(student, context, batch, crf_target="emission", temperature=3.0), kl(said, expected, 3.0, mask)
    )
    p, q = theirs.log_marginals(expected, mask), ours.log_marginals(said, mask)
    torch.testing.assert_close(
        soft(student, context, batch, crf_target="posterior", temperature=1.0),
        (p.exp() * (p - q)).sum() / mask.sum(),
    )
    torch.testing.assert_close(
        soft(student, context, batch, crf_target="viterbi"), ours.loss(said, theirs.viterbi(expected, mask))
    )


@pytest.mark.parametrize("target", ["emission", "posterior"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_teacher_itself_has_nothing_to_learn_from_itself(target: str, temperature: float) -> None:
    _, context, batch = pair()
    loss = soft(context.candidate, context, batch, crf_target=target, temperature=temperature)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    gradients = [p.grad.abs().max() for p in context.candidate.network.parameters() if p.grad is not None]
    assert max(gradients) < 1e-4


@pytest.mark.parametrize("target", ["posterior", "viterbi"])
def test_the_transitions_of_both_take_part_and_labels_do_not(target: str) -> None:
    student, context, batch = pair()
    loss = soft(student, context, batch, crf_target=target)
    loss.backward()
    crf: Any = crf_of(student.network)
    assert all(bool((p.grad != 0).any()) and bool(p.grad.isfinite().all()) for p in crf.parameters())
    other = batch | {"labels": torch.where(batch["labels"] == -100, -100, 0)}
    assert soft(student, context, other, crf_target=target).item() == loss.item()
    theirs: Any = crf_of(context.teacher)
    theirs.transitions.copy_(theirs.transitions.flip(0))
    assert soft(student, context, batch, crf_target=target).item() != loss.item()


def test_the_shift_puts_the_gold_tags_posterior_on_top() -> None:
    student, context, batch = pair()
    plain, shift = (soft(student, context, batch, crf_target="posterior", shift=s) for s in (False, True))
    assert plain.item() != shift.item()


def test_text_without_labels_has_no_chain_and_teaches_by_emissions() -> None:
    student, context, batch = pair()
    text = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    said = student.network(**text).logits
    expected = kl(said, context.teacher_logits(text), 2.0, text["attention_mask"].bool())
    for target in ("emission", "posterior", "viterbi"):
        loss = transfer_loss(context, SoftTerm(TASK, crf_target=target))(student.network, text)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, expected)


def test_the_target_is_a_dimension_where_there_is_a_crf_and_only_there() -> None:
    space = Distill().search_space(with_crf().subject)
    assert space["crf_target"].default == "posterior"
    assert not space["crf_target"].expert
    assert set(space["temperature"].when["crf_target"]) == {"emission", "posterior"}
    plain: Subject = tiny_candidate("bert", TASK).subject
    assert "crf_target" not in Distill().search_space(plain)
    for dim in Distill().search_space(plain).values():
        assert "crf_target" not in dim.when


STUDENTS: list[tuple[Method, dict[str, Any]]] = [
    (Theseus(), {"kd_in_stage2": True}),
    (TinyBert(), {}),
    (DistilBert(), {}),
    (MiniLM(), {}),
    (LayerMatch(), {}),
    (BornAgain(), {}),
    (PlainStudent(), {"alpha": 0.5}),
    (Shortcut(), {}),
    (BiLstm(), {"units": 32}),
]
NAMES = [type(method).__name__ for method, _ in STUDENTS]


def written(method: Method, candidate: Candidate, **wishes: Any) -> dict[str, Any]:
    """The parameters of a study that writes these values."""
    space = method.search_space(candidate.subject)
    assert wishes.keys() <= space.keys()
    fixed = {name: narrow(dim, wishes[name]) if name in wishes else dim for name, dim in space.items()}
    return dict(method.effective(candidate.subject, defaults(fixed)))


@pytest.mark.parametrize(("method", "changes"), STUDENTS, ids=NAMES)
def test_students_learn_emissions_unless_a_study_names_another_target(
    method: Method, changes: dict[str, Any]
) -> None:
    candidate = with_crf(layers=4)
    assert written(method, candidate, **changes)["crf_target"] == "emission"
    assert method.search_space(candidate.subject)["crf_target"].expert
    plain = tiny_candidate("bert", TASK).subject
    assert "crf_target" not in method.search_space(plain)
    assert "teacher.fine_tune.crf" in method.missing(plain)["crf_target"]


@pytest.mark.parametrize("target", ["posterior", "viterbi"])
@pytest.mark.parametrize(("method", "changes"), STUDENTS, ids=NAMES)
def test_every_students_answers_are_compared_by_the_target(
    method: Method, changes: dict[str, Any], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []
    original = SoftTerm.__call__

    def call(term: SoftTerm, student: Tensor, teacher: Tensor, batch: Any, chains: Any = None) -> Tensor:
        seen.append((term.crf_target, chains is not None and chains[0] is not chains[1]))
        return original(term, student, teacher, batch, chains)

    monkeypatch.setattr(SoftTerm, "__call__", call)
    candidate = with_crf(layers=4)
    params = written(method, candidate, crf_target=target, **changes)
    assert method.faults(candidate.subject, params) == {}
    assert ("temperature" in params) == (target != "viterbi" and not isinstance(method, Theseus))
    method.apply(candidate, params, tiny_context(candidate))
    assert set(seen) == {(target, True)}


def test_an_objective_is_the_named_loss_of_both_chains() -> None:
    student, context, batch = pair()
    for target in ("posterior", "viterbi"):
        term = SoftTerm(TASK, crf_target=target)  # type: ignore[arg-type]
        value = Objective(context, Matching(()), term, soft_weight=1.0)(student.network, batch)
        torch.testing.assert_close(value, soft(student, context, batch, crf_target=target))


def test_a_second_generation_reads_the_first_ones_logits_by_the_first_ones_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidate = with_crf()
    context, speakers = tiny_context(candidate), list[Any]()
    original = born_again.annealed_loss
    monkeypatch.setattr(born_again, "annealed_loss", lambda *given: speakers.append(given[4]) or original(*given))
    params = written(BornAgain(), candidate, crf_target="posterior", generations=2)
    result = BornAgain().apply(candidate, params, context)
    assert speakers[0] is None
    assert crf_of(speakers[1]) is not None
    assert speakers[1] is not context.teacher
    assert speakers[1] is not result.network


def test_generations_that_are_averaged_have_no_chain_in_common() -> None:
    candidate = with_crf()
    params = written(BornAgain(), candidate, crf_target="posterior", generations=2, average=True)
    assert "no transitions in common" in BornAgain().faults(candidate.subject, params)["crf_target"]
    params = written(BornAgain(), candidate, generations=2, average=True)
    assert BornAgain().faults(candidate.subject, params) == {}


def test_distilberts_text_without_labels_has_no_chain_and_says_so_in_the_parameters() -> None:
    given = with_crf(layers=4)
    candidate = given.replace(subject=given.subject.having("unlabelled"))
    params = written(DistilBert(), candidate, crf_target="viterbi")
    assert {"crf_target", "temperature"} <= params.keys()  # the second phase has chains, the first a temperature
    DistilBert().apply(candidate, params, tiny_context(candidate))
    alone = written(DistilBert(), candidate, crf_target="viterbi", second_distillation=False)
    assert "crf_target" not in alone
    assert "temperature" in alone


@pytest.mark.parametrize("target", ["emission", "posterior", "viterbi"])
def test_every_target_brings_the_students_tags_nearer_to_the_teachers(target: str) -> None:
    student, context, batch = pair()
    context.steps = 60
    student = student.replace(subject=student.subject.having("lossy"))
    params = parameters(Distill(), student, crf_target=target, alpha=1.0, learning_rate=3e-3)
    result = Distill().apply(student, params, context)
    mask = batch["labels"] != -100

    def tags(network: nn.Module) -> Tensor:
        given = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
        crf: Any = crf_of(network)
        found: Tensor = crf.viterbi(network(**given).logits, mask)[mask]
        return found

    agreement = [(tags(n) == tags(context.teacher)).float().mean() for n in (student.network, result.network)]
    assert agreement[1] > agreement[0]
