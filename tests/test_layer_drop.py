"""LayerDrop: whole layers are skipped for whole batches, in training alone, and nothing is left of it after."""

from __future__ import annotations

import math

import pytest
import torch

from compress_search.encoders import keep_layers, layer_drop, layers
from compress_search.encoders.skipping import Skippable
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.training import forward

FAMILIES = ("bert", "distilbert", "roberta", "electra")


def logits(network, batch):
    with torch.no_grad():
        return forward(network, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_layers_is_the_network_without_them(family, monkeypatch):
    candidate = tiny_candidate(family)
    batch = next(tiny_batches(candidate))
    fewer = candidate.copy().network
    keep_layers(fewer, [0, 2])
    draws = iter([0.9, 0.1, 0.9, 0.1])
    with layer_drop(candidate.network, 0.5):
        for gate in layers(candidate.network):
            gate.training = True  # the gates alone: dropout would hide the equality
        monkeypatch.setattr("compress_search.encoders.skipping.torch.rand", lambda _: torch.tensor(next(draws)))
        skipped = logits(candidate.network, batch)
    assert torch.equal(skipped, logits(fewer, batch))


def test_a_skipped_layer_is_not_called_and_one_gate_holds_for_the_batch():
    candidate = tiny_candidate()
    batch, draws = next(tiny_batches(candidate)), 400
    called = [0] * 4
    for index, layer in enumerate(layers(candidate.network)):
        layer.register_forward_hook(lambda *_, index=index: called.__setitem__(index, called[index] + 1))
    torch.manual_seed(0)
    with layer_drop(candidate.network, 0.3):
        candidate.network.train()
        for _ in range(draws):
            logits(candidate.network, batch)
    for count in called:
        assert abs(count / draws - 0.7) < 3.5 * math.sqrt(0.3 * 0.7 / draws)


def test_evaluation_runs_every_layer():
    candidate = tiny_candidate()
    batch = next(tiny_batches(candidate))
    expected = logits(candidate.network, batch)
    with layer_drop(candidate.network, 0.9):
        assert torch.equal(logits(candidate.network.eval(), batch), expected)


def test_the_layers_stand_where_they_stood_even_after_a_failure():
    network = tiny_candidate().network
    before, names = list(layers(network)), list(network.state_dict())

    def fail() -> None:
        with layer_drop(network, 0.5):
            assert all(isinstance(layer, Skippable) for layer in layers(network))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(layers(network)) == before
    assert list(network.state_dict()) == names


def test_rate_zero_touches_nothing():
    network = tiny_candidate().network
    stack = layers(network)
    with layer_drop(network, 0.0):
        assert layers(network) is stack


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_no_probability_below_one_is_refused(rate):
    with pytest.raises(ValueError, match=r"probability in \[0, 1\)"), layer_drop(tiny_candidate().network, rate):
        pass


@pytest.mark.slow
def test_depths_can_be_extracted_without_training_again():
    """After LayerDrop shallower networks cut out of one lose much less than those cut out of one trained whole."""

    def loss_of_cuts(rate):
        candidate = tiny_candidate()
        candidate.network.config.initializer_range = 0.1
        torch.manual_seed(0)
        candidate = candidate.replace(network=type(candidate.network)(candidate.network.config))
        context = tiny_context(candidate, steps=300, batch_size=16)
        with layer_drop(candidate.network, rate):
            context.fit(candidate.network, learning_rate=2e-3)
        batch = next(tiny_batches(candidate, batch_size=256, seed=99))
        losses = []
        for kept in ([0, 2], [0, 1], [1, 3], [0]):
            network = candidate.copy().network
            keep_layers(network, kept)
            with torch.no_grad():
                losses.append(float(context.task_loss(network, batch)))
        return sum(losses)

    assert loss_of_cuts(0.5) < 0.7 * loss_of_cuts(0.0)
