"""What a method may ask of ``fit``: groups with rates of their own, modules beside the network, batches, text."""

from itertools import islice, pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from compress_search import Context, ParameterGroup, TrialError
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.training import Phase, fit

SETTINGS = {"warmup": 0.0, "weight_decay": 0.01, "device": "cpu", "seed": 0}


def line():
    while True:
        yield {"input_ids": torch.ones(2, 4), "labels": torch.zeros(2)}


def output(network, batch):
    return network(batch["input_ids"]).sum()


def moved(before, module):
    return max((now - then).abs().max().item() for now, then in zip(module.parameters(), before, strict=True))


def copies(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_groups_learn_at_their_own_rates():
    network = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1)])
    before = [copies(layer) for layer in network]

    def loss(network, batch):
        return sum(layer(batch["input_ids"]).sum() for layer in network)

    groups = [
        *network[0].parameters(),
        ParameterGroup(list(network[1].parameters()), 1e-1),
        ParameterGroup(list(network[2].parameters()), 1e-3, weight_decay=0.0),
    ]
    fit(network, line(), 1, loss, learning_rate=1e-2, parameters=groups, **SETTINGS)
    steps = [moved(old, layer) for old, layer in zip(before, network, strict=True)]
    # AdamW's first step is the learning rate, and its decay far smaller
    assert steps == pytest.approx([1e-2, 1e-1, 1e-3], rel=0.01)


def test_a_groups_weight_decay_is_its_own():
    layer, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        other.weight.copy_(layer.weight)
    start = layer.weight.detach().clone()

    def still(network, batch):
        return 0 * sum(parameter.sum() for parameter in network.parameters())

    groups = [ParameterGroup([layer.weight], weight_decay=0.5), ParameterGroup([other.weight], weight_decay=0.0)]
    fit(nn.ModuleList([layer, other]), line(), 1, still, learning_rate=0.1, parameters=groups, **SETTINGS)
    torch.testing.assert_close(layer.weight, start * (1 - 0.1 * 0.5))
    assert torch.equal(other.weight, start)


def test_modules_beside_the_network_are_trained_and_clipped_with_it():
    network, beside = nn.Linear(4, 1), nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    before, modes = copies(beside), []
    norms = []

    def loss(network, batch):
        modes.append((network.training, beside[1].training))
        return 1e6 * beside[0](network(batch["input_ids"])).sum()

    original = torch.optim.AdamW.step

    def watch(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return original(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        fit(network, line(), 2, loss, learning_rate=1e-2, beside=beside, **SETTINGS)
    assert moved(before, beside) > 0
    assert modes == [(True, True)] * 2
    assert not network.training
    assert not beside[1].training
    assert all(parameter.grad is None for parameter in [*network.parameters(), *beside.parameters()])
    assert norms == pytest.approx([1.0, 1.0], rel=1e-4)
    assert [name for name, _ in network.named_parameters()] == ["weight", "bias"]


def test_a_parameter_that_is_named_twice_is_refused():
    network = nn.Linear(4, 1)
    twice = [*network.parameters(), ParameterGroup([network.weight], 1e-3)]
    with pytest.raises(TrialError, match="named twice"):
        fit(network, line(), 1, output, learning_rate=1e-2, parameters=twice, **SETTINGS)


def test_frozen_parameters_of_groups_are_left_out():
    network = nn.Linear(4, 1).requires_grad_(False)
    groups = [ParameterGroup(list(network.parameters()), 1e-3)]
    with pytest.raises(TrialError, match="nothing to train"):
        fit(network, line(), 1, output, learning_rate=1e-2, parameters=groups, **SETTINGS)


def test_batches_that_end_are_refused():
    with pytest.raises(TrialError, match="ended after 2 of the steps"):
        fit(nn.Linear(4, 1), islice(line(), 2), 5, output, learning_rate=1e-2, **SETTINGS)


@given(budget=st.integers(20, 5000), cuts=st.lists(st.integers(1, 99), max_size=3, unique=True))
def test_phases_of_the_whole_budget_take_all_its_steps(budget, cuts):
    ends = [0.0, *(cut / 100 for cut in sorted(cuts)), 1.0]
    taken = [Phase(share=end - start).steps(budget, start) for start, end in pairwise(ends)]
    assume(all(round(end * budget) > round(start * budget) for start, end in pairwise(ends)))
    assert sum(taken) == budget


def test_an_odd_budget_is_halved_without_a_rest():
    context = tiny_context(tiny_candidate(layers=1), steps=5)
    network = tiny_candidate(layers=1).network
    context.fit(network, share=0.5)
    context.fit(network, share=0.5)
    assert sum(context.fits) == 5


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_lies_between_nothing_and_all(share):
    with pytest.raises(TrialError, match=f"got {share}"):
        Phase(share=share)


def test_an_unknown_option_is_refused_and_not_ignored():
    candidate = tiny_candidate(layers=2)
    with pytest.raises(TypeError, match="shares"):
        tiny_context(candidate).fit(candidate.network, shares=0.5)


def test_a_context_trains_on_a_methods_own_batches_and_modules():
    candidate = tiny_candidate(layers=2)
    context: Context = tiny_context(candidate, steps=4)
    seen, scale = [], nn.Linear(1, 1)
    before = copies(scale)

    def own():
        for batch in tiny_batches(candidate, seed=77):
            seen.append(batch)
            yield batch

    def loss(network, batch):
        assert any(batch["input_ids"] is known["input_ids"] for known in seen)
        return scale(context.task_loss(network, batch)[None]).sum()

    context.fit(candidate.network, loss=loss, batches=own(), beside=scale)
    assert len(seen) == 4
    assert moved(before, scale) > 0


def test_tiny_unlabelled_text_has_neither_labels_nor_rows():
    candidate = tiny_candidate(layers=2)
    batch = next(tiny_context(candidate).unlabelled(5))
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    assert len(batch["input_ids"]) == 5
