"""Theseus: exact properties of blocks, gates and schedules, then both stages for real."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from compress_search_plugins import theseus
from compress_search_plugins.theseus import Block, Gates, Theseus
from torch import Tensor, nn

from compress_search import Batch, Candidate, TrialError
from compress_search.encoders import embeddings, head, layers, subject_of
from compress_search.space import active, defaults, fix_experts, narrow
from compress_search.testing import TinyContext, tiny_batches, tiny_candidate, tiny_context

FAMILIES = ("bert", "distilbert", "roberta", "electra")
every_family_and_task = pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "text-classification"),
        ("bert", "token-classification"),
        ("distilbert", "text-classification"),
        ("distilbert", "token-classification"),
        ("roberta", "text-regression"),
        ("electra", "token-classification"),
    ],
)


def parameters(candidate: Candidate, **changes: Any) -> dict[str, Any]:
    """The method's defaults with some values changed, and what these make active."""
    space = dict(Theseus().search_space(candidate.subject))
    params: dict[str, Any] = {}
    for name, default in (defaults(space) | changes).items():
        params[name] = default
    for name, dim in space.items():
        if active(dim, params):
            params.setdefault(name, dim.default)
        else:
            params.pop(name, None)
    return params


def inputs(candidate: Candidate, seed: int = 0) -> dict[str, Tensor]:
    batch = next(tiny_batches(candidate, seed=seed))
    return {name: batch[name] for name in candidate.tokenizer.model_input_names}


def logits(network: nn.Module, given: dict[str, Tensor]) -> Tensor:
    result: Tensor = network(**given).logits
    return result


def hybrid(candidate: Candidate, sizes: list[int], **options: Any) -> tuple[nn.Module, Gates]:
    gates = Gates(len(sizes))
    return theseus.make_hybrid(
        candidate.network, sizes, theseus.source_layers("first_k", sizes), gates, **options
    ).eval(), gates


def state(modules: Iterator[nn.Module] | list[nn.Module]) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Blocks


def test_uniform_blocks_are_the_divisors() -> None:
    assert theseus.divisors(12) == [2, 3, 4, 6, 12]
    assert theseus.block_sizes(12, {"block_size": 3}) == [3, 3, 3, 3]


def test_a_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(TrialError, match=r"block_size 4 does not divide 6 layers: expected one of 2, 3, 6"):
        theseus.block_sizes(6, {"block_size": 4})


def test_size_one_is_for_studies_that_name_it() -> None:
    dim = Theseus().search_space(tiny_candidate().subject)["block_size"]
    assert fix_experts({"block_size": dim})["block_size"].distribution.choices == (2, 4)
    assert narrow(dim, 1).default == 1
    assert theseus.block_sizes(3, {"block_size": 1}) == [1, 1, 1]


def test_custom_partition_cuts_where_it_says() -> None:
    params = {"partition": "custom", "cut_after_1": True, "cut_after_2": False, "cut_after_3": True}
    assert theseus.block_sizes(6, params) == [1, 2, 3]
    assert theseus.block_sizes(6, {"partition": "custom"}) == [6]


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("first_k", [0, 1, 2, 3, 4, 5]),
        ("every_nth", [0, 2, 4, 7, 9, 11]),
        ("first_of_block", [0, 2, 4, 6, 8, 10]),
        ("last_of_block", [1, 3, 5, 7, 9, 11]),
    ],
)
def test_successors_start_from_the_named_layers(init: str, expected: list[int]) -> None:
    assert theseus.source_layers(init, [2] * 6) == expected


# Gates and schedules


@pytest.mark.parametrize("base", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("full_at", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("steps", [7, 100, 3001])
def test_linear_rate_starts_at_base_rises_and_hits_one_exactly_on_time(
    base: float, full_at: float, steps: int
) -> None:
    rates = [theseus.replacing_rate(step / steps, "linear", base, full_at) for step in range(steps + 1)]
    slope = (1 - base) / (full_at * steps)
    hit = math.ceil((1 - base) / slope - 1e-6)
    assert rates[0] == base
    assert all(a <= b <= 1 for a, b in pairwise(rates))
    assert rates[hit] == 1.0
    assert rates[hit - 1] < 1.0


def test_the_other_schedules() -> None:
    assert theseus.replacing_rate(0.8, "constant", 0.4, 0.5) == 0.4
    assert theseus.replacing_rate(0.0, "anti_linear", 0.3, 0.5) == pytest.approx(0.7)
    assert theseus.replacing_rate(0.25, "anti_linear", 0.3, 0.5) == pytest.approx(0.35)
    assert theseus.replacing_rate(0.6, "anti_linear", 0.3, 0.5) == 0.0


def test_bernoulli_gates_have_the_distribution_of_redrawing_until_one_is_open() -> None:
    generator, rate, blocks, draws = torch.Generator().manual_seed(0), 0.3, 3, 20_000
    gates = torch.stack([theseus.draw_gates("bernoulli", rate, (blocks,), generator) for _ in range(draws)])
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert gates.sum(1).min() == 1
    mean = rate / (1 - (1 - rate) ** blocks)
    for observed in gates.mean(0):  # the same for every block
        assert abs(observed - mean) < 3 * math.sqrt(mean * (1 - mean) / draws)
    both = rate**2 / (1 - (1 - rate) ** blocks)  # and blocks are drawn apart, not all alike
    assert abs((gates[:, 0] * gates[:, 2]).mean() - both) < 3 * math.sqrt(both * (1 - both) / draws)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_uniform_gates_have_the_rate_as_their_mean_and_stay_in_range(rate: float) -> None:
    gates = theseus.draw_gates("uniform", rate, (4, 5000), torch.Generator().manual_seed(0))
    assert 0 <= gates.min() < gates.max() <= 1
    assert abs(gates.mean() - rate) < 3 * math.sqrt(min(rate, 1 - rate) ** 2 / 3 / gates.numel())


@pytest.mark.parametrize("mixing", theseus.MIXINGS)
@pytest.mark.parametrize("shape", [(3,), (3, 8)])
def test_every_gate_is_open_at_rate_one(mixing: str, shape: tuple[int, ...]) -> None:
    assert theseus.draw_gates(mixing, 1.0, shape, torch.Generator().manual_seed(0)).eq(1).all()


def test_at_rate_zero_one_block_is_replaced_any_of_them_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = torch.stack([theseus.draw_gates("bernoulli", 0.0, (3,), generator) for _ in range(3000)])
    assert gates.sum(1).eq(1).all()
    assert (gates.mean(0) - 1 / 3).abs().max() < 3 * math.sqrt(2 / 9 / 3000)


def test_without_redrawing_gates_are_independent_and_may_all_be_shut() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [theseus.draw_gates("bernoulli", 0.3, (3,), generator, redraw_empty=False) for _ in range(4000)]
    gates = torch.stack(draws)
    assert (gates.mean(0) - 0.3).abs().max() < 3 * (0.3 * 0.7 / 4000) ** 0.5
    empty = (gates.sum(1) == 0).float().mean().item()
    assert abs(empty - 0.7**3) < 3 * (0.343 * 0.657 / 4000) ** 0.5


def test_a_step_whose_gates_are_all_shut_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = tiny_candidate()
    context = tiny_context(candidate, steps=9)
    drawn, seen = 0, list[list[Tensor]]()
    fit = context.fit

    def opened(mixing: str, rate: float, shape: tuple[int, ...], generator: Any, *, redraw_empty: bool) -> Tensor:
        nonlocal drawn
        assert not redraw_empty
        drawn += 1
        return torch.full(shape, float(drawn == 2))

    def watching(network: nn.Module, **options: Any) -> None:
        loss = options["loss"] or context.task_loss

        def watched(network: nn.Module, batch: Batch) -> Tensor:
            seen.append(state([network]))
            return loss(network, batch)

        fit(network, **{**options, "loss": watched})

    monkeypatch.setattr(theseus, "draw_gates", opened)
    context.fit = watching  # type: ignore[method-assign]
    Theseus().apply(candidate, parameters(candidate, redraw_empty=False, learning_rate=0.01), context)
    assert context.fits == [6, 3]
    moved = [not same(before, after) for before, after in pairwise(seen[:6])]
    assert moved == [False, True, False, False, False], "neither without a gradient ever, nor by its momentum later"
    assert not same(seen[6], seen[7]), "stage 2 has no gates"


def test_deterministic_gates_are_the_rate() -> None:
    assert theseus.draw_gates("deterministic", 0.25, (3,), torch.Generator()).tolist() == [0.25] * 3


# The hybrid


@every_family_and_task
def test_shut_gates_are_the_predecessor_to_the_bit(family: str, task: str) -> None:
    candidate = tiny_candidate(family, task)
    network, _ = hybrid(candidate, [2, 2], with_embeddings=True)
    assert torch.equal(logits(network, inputs(candidate)), logits(candidate.network, inputs(candidate)))


@every_family_and_task
def test_open_gates_are_the_released_successor_to_the_bit(family: str, task: str) -> None:
    candidate = tiny_candidate(family, task)
    network, gates = hybrid(candidate, [1, 3], with_embeddings=True)
    gates.values = torch.ones(2)
    before = logits(network, inputs(candidate))
    assert torch.equal(before, logits(theseus.release(network), inputs(candidate)))
    assert not torch.equal(before, logits(candidate.network, inputs(candidate)))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_replaced_block_learns(family: str) -> None:
    candidate = tiny_candidate(family, layers=6)
    network, gates = hybrid(candidate, [2, 2, 2])
    network.requires_grad_(False)
    for module in theseus.successors(network):
        module.requires_grad_(True)
    gates.values = torch.tensor([0.0, 1.0, 0.0])
    logits(network, inputs(candidate)).square().sum().backward()
    for index, block in enumerate(layers(network)):
        assert isinstance(block, Block)
        grads = [p.grad for p in block.successor.parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads) == (index == 1)
        assert all(p.grad is None for p in block.predecessor.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(4,), (4, 8)])
@pytest.mark.parametrize("mixing", ["uniform", "deterministic"])
def test_equal_branches_mix_to_the_predecessor(family: str, shape: tuple[int, ...], mixing: str) -> None:
    candidate = tiny_candidate(family)
    network, gates = hybrid(candidate, [1, 1, 1, 1], with_embeddings=True)
    gates.values = theseus.draw_gates(mixing, 0.3, shape, torch.Generator().manual_seed(1))
    expected = logits(candidate.network, inputs(candidate))
    torch.testing.assert_close(logits(network, inputs(candidate)), expected, rtol=0, atol=1e-5)


def test_gates_per_example_choose_a_branch_for_each_row() -> None:
    candidate = tiny_candidate()
    network, gates = hybrid(candidate, [4])
    given = inputs(candidate)
    outputs = []
    for value in (0.0, 1.0):
        gates.values = torch.tensor([value])
        outputs.append(logits(network, given))
    gates.values = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1.0]])
    rows = logits(network, given)
    torch.testing.assert_close(rows[0::2], outputs[0][0::2])
    torch.testing.assert_close(rows[1::2], outputs[1][1::2])


def test_predecessor_stays_in_evaluation_mode_while_the_rest_trains() -> None:
    network, _ = hybrid(tiny_candidate(), [2, 2])
    network.train()
    for block in layers(network):
        assert isinstance(block, Block)
        assert block.successor.training
        assert not any(module.training for module in block.predecessor.modules())
    assert embeddings(network).training


def test_a_random_start_has_the_shapes_and_none_of_the_weights() -> None:
    layer = layers(tiny_candidate().network)[0]
    before = state([layer])
    theseus.reinitialise(layer, 0.02, torch.Generator().manual_seed(0))
    weights = torch.cat([p.flatten() for name, p in layer.named_parameters() if p.ndim == 2])
    assert [t.shape for t in state([layer])] == [t.shape for t in before]
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(p.abs().max() == 0 for name, p in layer.named_parameters() if name.endswith("bias"))


# The method


def recorded(context: TinyContext) -> list[dict[str, Any]]:
    """What each call of the context's fit is asked, whether anything learned, and whether the rest was kept."""
    calls, fit = [], context.fit

    def recording(network: nn.Module, **options: Any) -> None:
        rest = [embeddings(network), *head(network)]
        rest += [block.predecessor for block in layers(network) if isinstance(block, Block)]
        before, everything = state(rest), state([network])
        fit(network, **options)
        calls.append(
            options | {"kept": same(before, state(rest)), "learned": not same(everything, state([network]))}
        )

    context.fit = recording  # type: ignore[method-assign]
    return calls


@every_family_and_task
def test_both_stages_leave_an_ordinary_shorter_network(family: str, task: str) -> None:
    candidate = tiny_candidate(family, task)
    before = state([candidate.network])
    context = tiny_context(candidate)
    calls = recorded(context)
    params = parameters(candidate)
    result = Theseus().apply(candidate, params, context)

    first, second = calls
    assert first["scored"] is False
    assert first["kept"]
    assert first["learned"]
    assert second.get("scored", True)
    assert second["learned"]
    assert not second["kept"]
    assert first["share"] + second["share"] == pytest.approx(1)
    assert second["learning_rate"] == first["learning_rate"] / 2

    assert same(before, state([candidate.network]))
    assert type(result.network) is type(candidate.network)
    assert not any(isinstance(module, Block | theseus.Stack) for module in result.network.modules())
    assert all(p.requires_grad for p in result.network.parameters())
    assert result.subject == Theseus().after(candidate.subject, params)
    assert result.subject.without("lossy") == subject_of(result.network, task)
    assert sum(p.numel() for p in result.network.parameters()) == result.subject.parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "constant", "constant_rate": 0.5},
        {"mixing": "uniform", "sample_granularity": "example"},
        {"mixing": "deterministic"},
        {"sample_granularity": "example"},
        {"anti_linear": True},
        {"replace_embeddings": True},
        {"train_head_in_stage1": True},
        {"successor_init": "random"},
        {"kd_in_stage2": True},
        {"partition": "custom", "cut_after_1": True},
    ],
    ids=str,
)
def test_every_option_trains_and_leaves_finite_weights(changes: dict[str, Any]) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate, **changes)
    result = Theseus().apply(candidate, params, tiny_context(candidate))
    assert len(layers(result.network)) == 2
    assert all(value.isfinite().all() for value in state([result.network]))


@pytest.mark.parametrize("changes", [{}, {"successor_init": "random"}])
def test_the_seed_decides_everything(changes: dict[str, Any]) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate, **changes)
    runs = [Theseus().apply(candidate, params, tiny_context(candidate, seed=seed)) for seed in (0, 0, 1)]
    states = [state([run.network]) for run in runs]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_the_replaced_embeddings_and_the_head_learn_in_stage_one_when_asked() -> None:
    candidate = tiny_candidate()
    context = tiny_context(candidate)
    calls = recorded(context)
    Theseus().apply(candidate, parameters(candidate, train_head_in_stage1=True), context)
    assert not calls[0]["kept"]
    network, _ = hybrid(candidate, [2, 2], with_embeddings=True)
    assert len(theseus.successors(network)) == 3


def test_both_starts_are_searched_and_counted_once_where_they_are_one() -> None:
    candidate = tiny_candidate()
    space = fix_experts(Theseus().search_space(candidate.subject))
    assert space["successor_init"].distribution.choices == ("first_k", "last_of_block")
    for size, inits in ((2, {"first_k", "last_of_block"}), (1, {"first_k"})):
        chosen = [parameters(candidate, block_size=size, successor_init=init) for init in theseus.STARTS]
        assert {Theseus().effective(candidate.subject, params)["successor_init"] for params in chosen} == inits


@pytest.mark.parametrize("init", ["first_k", "every_nth", "last_of_block", "first_of_block"])
def test_a_successor_of_the_same_size_starts_as_the_predecessor_and_learns(init: str) -> None:
    candidate = tiny_candidate()
    params = parameters(candidate, block_size=1, successor_init=init)
    dry = Theseus().apply(candidate, params, tiny_context(candidate, dry=True))
    assert torch.equal(logits(dry.network, inputs(candidate)), logits(candidate.network, inputs(candidate)))
    result = Theseus().apply(candidate, params, tiny_context(candidate))
    assert result.subject.layers == candidate.subject.layers
    assert not same(state([result.network]), state([candidate.network]))


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_embeddings_learn_and_those_they_replace_do_not(family: str) -> None:
    candidate = tiny_candidate(family)
    context = tiny_context(candidate)
    table, stages = embeddings(candidate.network).word_embeddings.weight.clone(), []
    fit = context.fit

    def watching(network: nn.Module, **options: Any) -> None:
        block = embeddings(network)
        old = block.predecessor.word_embeddings.weight.clone() if isinstance(block, Block) else None
        fit(network, **options)
        if isinstance(block, Block):
            stages.append((torch.equal(old, block.predecessor.word_embeddings.weight), block.successor))

    context.fit = watching  # type: ignore[method-assign]
    result = Theseus().apply(candidate, parameters(candidate, replace_embeddings=True), context)
    [(kept, successor)] = stages
    assert kept
    assert embeddings(result.network) is successor
    assert not torch.equal(successor.word_embeddings.weight, table)


@pytest.mark.parametrize("mixing", theseus.MIXINGS)
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_stage_one_follows_its_schedule_and_stage_two_knows_no_gate(mixing: str, schedule: str) -> None:
    """The mean gate at each step is the rate; where it is a ramp, stage 1 ends as the pure successor."""
    candidate = tiny_candidate()
    rates: list[float] = []
    context = tiny_context(candidate, steps=60)
    draw = theseus.draw_gates

    def drawing(mixing: str, rate: float, *arguments: Any, **options: Any) -> Tensor:
        rates.append(rate)
        return draw(mixing, rate, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theseus, "draw_gates", drawing)
        ramp = mixing == "deterministic" or schedule == "linear"
        changes = {"base_rate": 0.4, "full_replacement_at": 0.25} if ramp else {"constant_rate": 0.6}
        if mixing != "deterministic":
            changes["schedule"] = schedule
        Theseus().apply(candidate, parameters(candidate, mixing=mixing, **changes), context)
    assert len(rates) == context.fits[0] == 40
    if ramp:
        assert rates[0] == pytest.approx(0.4)
        assert rates[9] < 1
        assert rates[10:] == [1.0] * 30
    else:
        assert rates == [0.6] * 40


def test_a_dry_run_has_the_final_shapes() -> None:
    candidate = tiny_candidate(layers=6)
    params = parameters(candidate, block_size=3)
    context = tiny_context(candidate, dry=True)
    result = Theseus().apply(candidate, params, context)
    assert context.fits == [0, 0]
    assert subject_of(result.network, candidate.subject.task).layers == 2


@pytest.mark.parametrize(("trait", "reason"), [("shared", "share weights"), ("non-uniform", "differ in shape")])
def test_layers_that_cannot_be_grouped_are_refused(trait: str, reason: str) -> None:
    subject = tiny_candidate(layers=2).subject
    assert Theseus().unsupported(subject) is None
    assert reason in (Theseus().unsupported(subject.having(trait)) or "")
    assert "at least 2" in (Theseus().unsupported(subject.having(layers=1)) or "")


def test_a_deterministic_mixture_is_always_a_ramp() -> None:
    params = parameters(tiny_candidate(), mixing="deterministic", schedule="constant")
    assert "schedule" not in params
    assert "sample_granularity" not in params


@pytest.mark.slow
def test_successors_learn_the_task_they_are_replaced_under() -> None:
    """Half of a trained network, replaced gradually, is far better than half of it cut off."""
    candidate = tiny_candidate(layers=4)
    tiny_context(candidate, steps=300, batch_size=16).fit(candidate.network, learning_rate=5e-3)
    context = tiny_context(candidate, steps=150, batch_size=16)
    batch = next(tiny_batches(candidate, batch_size=256, seed=99))

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return float(context.task_loss(network.eval(), batch))

    truncated, _ = hybrid(candidate, [2, 2])
    result = Theseus().apply(candidate, parameters(candidate, learning_rate=1e-3), context)
    assert loss(result.network) < 0.75 * loss(theseus.release(truncated))
