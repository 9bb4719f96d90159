"""Configurations of TextBrewer and KnowledgeDistillation, written for ``layer_match``, give these libraries' loss.

The losses are computed here a second time, text by text and without its padding, from what the networks themselves
say with eager attention; those of TextBrewer by TextBrewer too, where it is installed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from compress_search_plugins.distillation.matching import Matching
from compress_search_plugins.layer_match import LayerMatch, _matches, objectives
from torch.nn import functional as F

from compress_search.encoders import layers, set_attention
from compress_search.space import defaults, narrow
from compress_search.testing import tiny_batches, tiny_candidate, tiny_context

HALF = ["linear", 16, 32]
TEXTBREWER = [
    {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": HALF},
    {
        "layer_T": 4,
        "layer_S": 2,
        "feature": "hidden",
        "loss": "hidden_mse",
        "weight": 0.5,
        "proj": ["tanh", 16, 32, {"lr": 1e-3}],
    },
    {
        "layer_T": [0, 2],
        "layer_S": [0, 1],
        "feature": "hidden",
        "loss": "gram",
        "weight": 2,
        "proj": ["relu", 16, 32],
    },
    {"layer_T": 1, "layer_S": 0, "feature": "attention", "loss": "attention_mse", "weight": 0.25},
    {"layer_T": 3, "layer_S": 1, "feature": "attention", "loss": "attention_mse_sum", "weight": 0.125},
    {"layer_T": 2, "layer_S": 1, "feature": "attention", "loss": "attention_ce", "weight": 1},
    {"layer_T": 3, "layer_S": 1, "feature": "attention", "loss": "attention_ce_mean", "weight": 3},
    {"layer_T": 4, "layer_S": 2, "feature": "hidden", "loss": "cos", "weight": 1, "proj": HALF},
    {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "pkd", "weight": 1, "proj": HALF},
]
"""Matches in that library's words, for a student half as wide."""
SIMILARITIES = [
    {"layer_T": [0, 0], "layer_S": [0, 0], "feature": "hidden", "loss": "nst", "weight": 1},
    {"layer_T": [2, 4], "layer_S": [1, 2], "feature": "hidden", "loss": "mmd", "weight": 0.5},
]
"""What that library itself divides by the length it has padded to, against its documentation; here by the width."""
KNOWLEDGE_DISTILLATION = [
    {"feature": "embedding", "loss": "mse_with_mask", "weight": 2},
    {"teacher_layer": 4, "student_layer": 2, "feature": "hidden", "loss": "mse_with_mask"},
    {"teacher_layer": 3, "student_layer": 1, "feature": "attention_scores", "loss": "attention_mse_with_mask"},
    {"feature": "pooled", "loss": "mse", "weight": 0.5},
]
"""The four kinds of matches of the KnowledgeDistillation library's own example."""


@dataclass
class Said:
    """What a network says on a batch: hidden states, scores before their softmax, pooled states and logits."""

    hidden: list[torch.Tensor]
    scores: list[torch.Tensor]
    pooled: torch.Tensor
    logits: torch.Tensor


def said(network, batch):
    """Read by the library's own switches, and by hooks of this test on queries and keys."""
    set_attention(network, "eager")
    found, handles = {}, []
    for number, layer in enumerate(layers(network)):
        for name in ("query", "key"):
            module = getattr(layer.attention.self, name)
            place = (number, name)
            handles.append(module.register_forward_hook(lambda m, a, out, place=place: found.update({place: out})))
    pooler = network.bert.pooler.register_forward_hook(lambda m, a, out: found.update(pooled=out))
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    out = network(**inputs, output_hidden_states=True, output_attentions=True)
    for handle in (*handles, pooler):
        handle.remove()
    scores = []
    for number, probabilities in enumerate(out.attentions):
        query, key = (found[number, name].unflatten(-1, (4, -1)).transpose(1, 2) for name in ("query", "key"))
        scores.append(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]))
        hidden_keys = torch.where(batch["attention_mask"].bool(), 0.0, -1e9)[:, None, None]
        torch.testing.assert_close((scores[-1] + hidden_keys).softmax(-1), probabilities, atol=1e-6, rtol=1e-5)
    return Said(list(out.hidden_states), scores, found["pooled"], out.logits)


def through(projection, states):
    """A linear map and what may follow it, by its weights."""
    linear, *activation = projection
    mapped = F.linear(states, linear.weight, linear.bias)
    return {"": mapped, "ReLU": mapped.clamp(min=0), "Tanh": mapped.tanh()}[
        type(activation[0]).__name__ if activation else ""
    ]


class Formulas:
    """The losses as their definitions say, a text at a time and only of its own tokens."""

    def __init__(self, mask):
        self.lengths = mask.sum(1).tolist()
        self.tokens, self.pairs = sum(self.lengths), sum(n * n for n in self.lengths)

    def texts(self, *tensors):
        for text, length in enumerate(self.lengths):
            yield [t[text, :, :length, :length] if t.ndim == 4 else t[text, :length] for t in tensors]

    def hidden_mse(self, ours, theirs):
        squares = sum(((a - b) ** 2).sum() for a, b in self.texts(ours, theirs))
        return squares / (self.tokens * theirs.shape[-1])

    def attention_mse(self, ours, theirs):
        squares = sum(((a - b) ** 2).sum() for a, b in self.texts(ours, theirs))
        return squares / (ours.shape[1] * self.pairs)

    def attention_mse_sum(self, ours, theirs):
        squares = sum(((a.sum(0) - b.sum(0)) ** 2).sum() for a, b in self.texts(ours, theirs))
        return squares / self.pairs

    def attention_ce(self, ours, theirs):
        rows = sum(-(b.softmax(-1) * a.softmax(-1).log()).sum() for a, b in self.texts(ours, theirs))
        return rows / (ours.shape[1] * self.tokens)

    def attention_ce_mean(self, ours, theirs):
        return self.attention_ce(ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True))

    def cos(self, ours, theirs):
        angles = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in self.texts(ours, theirs))
        return sum((1 - angle).sum() for angle in angles) / self.tokens

    def pkd(self, ours, theirs):
        firsts = [states[:, 0] / states[:, 0].norm(dim=-1, keepdim=True) for states in (ours, theirs)]
        return ((firsts[0] - firsts[1]) ** 2).sum(-1).mean()

    def gram(self, ours, theirs):
        grams = [[a.T @ b / len(a) for a, b in self.texts(*pair)] for pair in (ours, theirs)]
        return torch.stack([((a - b) ** 2).mean() for a, b in zip(*grams, strict=True)]).mean()

    def nst(self, ours, theirs):
        grams = [[a @ b.T / a.shape[-1] for a, b in self.texts(*pair)] for pair in (ours, theirs)]
        return sum(((a - b) ** 2).sum() for a, b in zip(*grams, strict=True)) / self.pairs

    mmd, mse_with_mask, attention_mse_with_mask = nst, hidden_mse, attention_mse

    def mse(self, ours, theirs):
        return ((ours - theirs) ** 2).sum() / ours.numel()

    def kd_ce(self, ours, theirs, temperature):
        p, q = ((logits / temperature).softmax(-1) for logits in (theirs, ours))
        return temperature**2 * -(p * q.log()).sum() / len(ours)

    def kd_mse(self, ours, theirs, temperature):
        return ((ours / temperature - theirs / temperature) ** 2).sum() / ours.numel()


class Case:
    """A student of two layers under a teacher of four, a batch, and what both say on it."""

    def __init__(self, width):
        self.teacher = tiny_candidate()
        self.student = tiny_candidate(layers=2, hidden=width, intermediate=2 * width, seed=1)
        self.context, self.batch = tiny_context(self.teacher), next(tiny_batches(self.teacher))
        assert (self.batch["attention_mask"] == 0).any()
        self.width = width / 32

    def objective(self, matches, hard):
        """The only phase of a study that writes these matches, without the method's own term of logits."""
        method, subject = LayerMatch(), self.teacher.subject
        space = method.search_space(subject)
        written = {"matches": json.dumps(matches), "layers": 2, "width": self.width, "phases": "joint"}
        written |= {"logit_weight": 0.0, "hard_weight": hard}
        fixed = {name: narrow(dim, written[name]) if name in written else dim for name, dim in space.items()}
        params = method.effective(subject, defaults(fixed))
        matching = Matching.between(_matches(params, 4, 2), self.student.network, self.teacher.network, seed=0)
        [phase] = objectives(self.student, matching, params, self.context)
        return phase

    def said(self):
        with torch.no_grad():
            theirs = said(self.teacher.network, self.batch)
        return said(self.student.network, self.batch), theirs

    def expected(self, matching, items, hard):
        """The weighted sum, match by match."""
        ours, theirs = self.said()
        formulas, total = Formulas(self.batch["attention_mask"]), 0.0
        for number, item in enumerate(items):
            mine, other = (self.picked(one, item, side) for one, side in ((ours, "student"), (theirs, "teacher")))
            if "proj" in item:
                projection = matching.projections[str(number)]
                mine = [through(projection, each) for each in mine]
            name, _, temperature = item["loss"].partition(":")
            pair = (mine, other) if len(mine) == 2 else (mine[0], other[0])
            term = getattr(formulas, name)(*pair, *([float(temperature)] if temperature else []))
            total = total + item.get("weight", 1) * term
        labels = self.batch["labels"]
        wrong = -ours.logits.softmax(-1).log()[torch.arange(len(labels)), labels].mean()
        return total + hard * wrong

    @staticmethod
    def picked(one, item, side):
        layer = item.get(f"{side}_layer", item.get(f"layer_{side[0].upper()}", 0))
        found = {"hidden": one.hidden, "embedding": one.hidden, "pooled": [one.pooled], "logits": [one.logits]}
        source = found.get(item["feature"], one.scores)
        return [source[number] for number in (layer if isinstance(layer, list) else [layer])]


def logits(name, temperature, weight):
    return {"feature": "logits", "loss": f"{name}:{temperature}", "weight": weight}


@pytest.mark.parametrize("hard", [0.0, 0.5])
@pytest.mark.parametrize(
    ("items", "width"),
    [
        ([*TEXTBREWER, *SIMILARITIES, logits("kd_ce", 8, 1)], 16),
        ([*TEXTBREWER[3:7], logits("kd_mse", 4, 2)], 16),
        ([logits("kd_ce", 8, 1)], 16),
        ([*KNOWLEDGE_DISTILLATION, logits("kd_ce", 1, 0.7)], 32),
    ],
    ids=["textbrewer", "textbrewer of attention", "textbrewer without matches", "knowledge distillation"],
)
def test_a_whole_configuration_has_the_loss_of_its_formulas(items, width, hard):
    case = Case(width)
    objective = case.objective(items, hard)
    expected = case.expected(objective.matching, items, hard)
    torch.testing.assert_close(objective(case.student.network, case.batch), expected, atol=1e-5, rtol=1e-5)
    # and so have all its gradients
    parameters = [*case.student.network.parameters(), *objective.matching.projections.parameters()]
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    found = torch.autograd.grad(objective(case.student.network, case.batch), parameters, allow_unused=True)
    for mine, other in zip(found, wanted, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_textbrewers_own_distiller_says_the_same_of_the_same_batch(hard, tmp_path):
    textbrewer = pytest.importorskip("textbrewer", reason="textbrewer is not installed: nothing to compare with")
    case = Case(16)
    # its cross-entropy lacks the square of the temperature
    objective = case.objective([*TEXTBREWER, logits("kd_ce", 8, 0.3)], hard)
    distiller = textbrewer.GeneralDistiller(
        textbrewer.TrainingConfig(device="cpu", output_dir=str(tmp_path)),
        textbrewer.DistillationConfig(
            temperature=8,
            kd_loss_type="ce",
            kd_loss_weight=0.3 * 8**2,
            hard_label_weight=hard,
            intermediate_matches=[dict(match) for match in TEXTBREWER],
        ),
        case.teacher.network,
        case.student.network,
        None,
        None,
    )
    for number, projection in enumerate(distiller.projs):
        if projection is not None:
            ours = objective.matching.projections[str(number)]
            target = next(m for m in projection.modules() if isinstance(m, torch.nn.Linear))
            target.load_state_dict(ours[0].state_dict())
    mask = case.batch["attention_mask"]
    hidden_keys = torch.where(mask.bool(), 0.0, -1e4)[:, None, None]  # as the models it was written for do

    def adapted(one):
        scores = [each + hidden_keys for each in one.scores]
        return {"logits": [one.logits], "hidden": one.hidden, "attention": scores, "inputs_mask": mask}

    ours, theirs = case.said()
    results = {**adapted(ours), "losses": [F.cross_entropy(ours.logits, case.batch["labels"])]}
    expected, terms = distiller.compute_loss(results, adapted(theirs))
    assert len(terms) == len(TEXTBREWER) + 2
    torch.testing.assert_close(objective(case.student.network, case.batch), expected, atol=1e-5, rtol=1e-5)
