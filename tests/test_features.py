"""Features are what the networks themselves hand out, for every family and either way of computing attention."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from compress_search import TrialError
from compress_search.encoders import (
    FAMILIES,
    feature_shape,
    head,
    layers,
    prune_heads,
    read_features,
    recording,
    set_attention,
    set_layers,
)
from compress_search.encoders.features import KINDS, parse
from compress_search.losses import masked_softmax
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context
from compress_search.training import forward, task_loss

LAYERS = 3
ALL = [
    *(f"hidden.{n}" for n in range(LAYERS + 1)),
    *(
        f"{kind}.{i}"
        for kind in ("query", "key", "value", "scores", "probabilities", "values")
        for i in range(LAYERS)
    ),
    "logits",
]


def model(family="bert", task="text-classification", attention="sdpa", **shapes):
    candidate = tiny_candidate(family, task, LAYERS, **shapes)
    set_attention(candidate.network, attention)
    return candidate, next(tiny_batches(candidate))


def inputs_of(batch):
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_head_inner_features_are_the_same_and_the_head_is_not_computed(family):
    candidate, batch = model(family)
    language, computed = tiny_context(candidate).masked_lm(), []
    language.get_output_embeddings().register_forward_hook(lambda *_: computed.append(1))
    names = [name for name in ALL if name != "logits"]
    whole, inner = (read_features(language, batch, names, head=head) for head in (True, False))
    assert computed == [1]
    assert all(torch.equal(whole[name], inner[name]) for name in names)
    with pytest.raises(TrialError, match="logits was computed 0 times in a forward pass, expected 1"):
        read_features(language, batch, ["logits"], head=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_probabilities_are_those_of_transformers(family, attention):
    candidate, batch = model(family, attention=attention)
    with torch.no_grad():
        found = read_features(candidate.network, batch, ALL)
        set_attention(candidate.network, "eager")
        theirs = candidate.network(**inputs_of(batch), output_hidden_states=True, output_attentions=True)
    assert len(theirs.hidden_states) == LAYERS + 1
    assert len(theirs.attentions) == LAYERS
    real = batch["attention_mask"].bool()
    for n, states in enumerate(theirs.hidden_states):
        torch.testing.assert_close(found[f"hidden.{n}"][real], states[real], atol=2e-5, rtol=1e-5)
    queries = real[:, None, :, None].expand_as(theirs.attentions[0])
    for i, attention_of in enumerate(theirs.attentions):
        torch.testing.assert_close(
            found[f"probabilities.{i}"][queries], attention_of[queries], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(found["logits"], theirs.logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "text-regression"])
def test_shapes_are_those_announced(task):
    candidate, batch = model(task=task)
    rows, length = batch["input_ids"].shape
    found = read_features(candidate.network, batch, ALL)
    shape = {name: feature_shape(candidate.network, name) for name in ("hidden.2", "query.1", "logits")}
    assert shape == {"hidden.2": (32,), "query.1": (4, 8), "logits": (candidate.subject.labels,)}
    assert found["hidden.2"].shape == (rows, length, 32)
    assert found["query.1"].shape == (rows, 4, length, 8)
    assert found["scores.1"].shape == found["values.1"].shape == (rows, 4, length, length)
    assert found["logits"].shape == forward(candidate.network, batch).shape


def test_scores_are_before_the_mask_and_the_softmax():
    candidate, batch = model()
    found = read_features(candidate.network, batch, ["scores.1", "query.1", "key.1", "values.1", "value.1"])
    expected = torch.einsum("bhqd,bhkd->bhqk", found["query.1"], found["key.1"]) / 8**0.5
    torch.testing.assert_close(found["scores.1"], expected)
    expected = torch.einsum("bhqd,bhkd->bhqk", found["value.1"], found["value.1"]) / 8**0.5
    torch.testing.assert_close(found["values.1"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_is_what_the_classifier_goes_on_with(family):
    candidate, batch = model(family)
    found = read_features(candidate.network, batch, ["pooled", "logits"])
    assert found["pooled"].shape == (len(batch["labels"]), *feature_shape(candidate.network, "pooled"))
    last = [part for module in head(candidate.network) for part in module.modules() if isinstance(part, nn.Linear)][
        -1
    ]
    activation = {"bert": nn.Identity(), "electra": nn.GELU(), "distilbert": nn.ReLU()}.get(family, nn.Tanh())
    torch.testing.assert_close(last(activation(found["pooled"])), found["logits"], atol=1e-5, rtol=1e-5)


def test_tokens_have_no_pooled_sentence():
    candidate, batch = model(task="token-classification")
    with pytest.raises(TrialError, match="classifies tokens"):
        read_features(candidate.network, batch, ["pooled"])


def test_gradients_flow_through_one_pass_that_also_gives_the_loss():
    candidate, batch = model()
    from compress_search.tasks import Task

    with recording(candidate.network, ["hidden.1"]) as found:
        loss = task_loss(Task("text-classification", ("a", "b")))(candidate.network, batch)
        assert not found
    (found["hidden.1"].sum() + 0 * loss).backward()
    first, second = (layer.output.dense.weight.grad for layer in list(layers(candidate.network))[:2])
    assert first.abs().sum() > 0
    assert second.abs().sum() == 0


def test_a_layer_at_several_positions_is_read_at_each():
    candidate, batch = model()
    plain = candidate.network
    set_layers(plain, [layers(plain)[0]] * 3)
    unshared = deepcopy(plain)
    set_layers(unshared, [deepcopy(layers(plain)[0]) for _ in range(3)])
    names = ["hidden.0", "hidden.1", "hidden.2", "hidden.3", "query.0", "value.2", "scores.1"]
    with torch.no_grad():
        shared, apart = (read_features(network, batch, names) for network in (plain, unshared))
    assert all(torch.equal(shared[name], apart[name]) for name in names)
    assert not torch.equal(shared["hidden.1"], shared["hidden.3"])


def test_pruned_heads_are_read_as_they_are():
    candidate, batch = model()
    with torch.no_grad():
        before = read_features(candidate.network, batch, ["query.0"])["query.0"]
        prune_heads(candidate.network, {0: [1, 3]})
        after = read_features(candidate.network, batch, ["query.0"])["query.0"]
    torch.testing.assert_close(after, before[:, [1, 3]])
    prune_heads(candidate.network, {0: []})
    with pytest.raises(TrialError, match="all heads of layer 0 are gone"):
        read_features(candidate.network, batch, ["scores.0"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("hidden.4", "counts from 0 to 3"), ("query.3", "counts from 0 to 2"), ("scores.7", "counts from 0 to 2")],
)
def test_layers_that_do_not_exist_are_refused(name, message):
    candidate, batch = model()
    with pytest.raises(TrialError, match=message):
        read_features(candidate.network, batch, [name])


@pytest.mark.parametrize("name", ["hidden", "hidden.", "hidden.-1", "logits.0", "attention.1", "", "pooled.2"])
def test_names_of_no_feature_are_refused(name):
    with pytest.raises(ValueError, match="no feature is called"):
        parse(name)


def test_a_network_that_is_not_called_gives_an_error_instead_of_nothing():
    candidate, _ = model()
    with pytest.raises(TrialError, match="computed 0 times"), recording(candidate.network, ["hidden.1"]):
        pass


def test_a_network_that_is_called_twice_gives_an_error_instead_of_one_of_the_two():
    candidate, batch = model()

    def twice():
        with recording(candidate.network, ["scores.1"]):
            forward(candidate.network, batch)
            forward(candidate.network, batch)

    with pytest.raises(TrialError, match="computed 2 times"):
        twice()


def test_no_hook_stays_behind():
    candidate, batch = model()
    with pytest.raises(RuntimeError, match="on purpose"), recording(candidate.network, ALL):
        raise RuntimeError("on purpose")
    read_features(candidate.network, batch, ALL)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in candidate.network.modules())


def test_padding_changes_no_feature_of_what_is_none():
    candidate, batch = model()
    pad = {"input_ids": candidate.tokenizer.pad_token_id}
    wider = {n: nn.functional.pad(t, (0, 5), value=pad.get(n, 0)) for n, t in inputs_of(batch).items()}
    length = batch["input_ids"].shape[1]
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        narrow, wide = (
            read_features(candidate.network, each, ["hidden.3", "probabilities.2"]) for each in (batch, wider)
        )
    torch.testing.assert_close(wide["hidden.3"][:, :length][real], narrow["hidden.3"][real], atol=1e-5, rtol=1e-5)
    rows = wide["probabilities.2"].transpose(1, 2)[:, :length][real]
    torch.testing.assert_close(
        rows[..., :length], narrow["probabilities.2"].transpose(1, 2)[real], atol=1e-5, rtol=1e-5
    )
    assert not rows[..., length:].any()


def test_probabilities_of_a_text_of_padding_alone_are_finite():
    scores = torch.randn(1, 2, 3, 3)
    assert masked_softmax(scores, torch.zeros(1, 3)).isfinite().all()


def test_every_kind_is_described_where_the_names_are():
    from compress_search.encoders import features

    assert features.__doc__
    assert all(f"``{kind}" in features.__doc__ for kind in KINDS)
