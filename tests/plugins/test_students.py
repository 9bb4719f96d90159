"""Layer maps in closed form, and students that compute what their teacher does where they may."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from compress_search_plugins.distillation.layer_maps import align, anchors, layer_pairs, source_layers
from compress_search_plugins.distillation.students import (
    WIDTHS,
    cut_student,
    narrowed,
    sizes,
    student_subject,
    unfit,
    whole_width,
    widths,
)
from hypothesis import given
from hypothesis import strategies as st

from compress_search import Subject
from compress_search.encoders import FAMILIES, embeddings, layers, parts, stream, subject_of
from compress_search.testing import tiny_batches, tiny_candidate
from compress_search.training import forward

BERT = Subject("bert", "text-classification", 12, 12, 64, 768, 3072, 30522, 512, 2, 2)


@torch.no_grad()
def shuffled(network):
    """The same function with channels, neurons and the dimensions of each head in another order."""
    moved, generator = deepcopy(network), torch.Generator().manual_seed(1)
    everything = stream(moved)
    channels = torch.randperm(everything.width, generator=generator)
    for table in everything.tables:
        table.weight.copy_(table.weight[:, channels])
    for module in (*everything.norms, *everything.writers):
        module.weight.copy_(module.weight[channels])
        module.bias.copy_(module.bias[channels])
    for module in everything.readers:
        module.weight.copy_(module.weight[:, channels])
    for layer in map(parts, layers(moved)):
        for rows, columns in (
            ((layer.query, layer.key), ()),
            ((layer.value,), (layer.attention_output,)),
            ((layer.up,), (layer.down,)),
        ):
            count = rows[0].out_features
            size = count if rows[0] is layer.up else layer.head_dim
            order = torch.arange(count).view(-1, size)[:, torch.randperm(size, generator=generator)].flatten()
            for module in rows:
                module.weight.copy_(module.weight[order])
                module.bias.copy_(module.bias[order])
            for module in columns:
                module.weight.copy_(module.weight[:, order])
    return moved


class TestLayerMaps:
    @pytest.mark.parametrize(
        ("strategy", "student", "pairs"),
        [
            ("uniform", 4, [(1, 3), (2, 6), (3, 9), (4, 12)]),
            ("uniform", 6, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
            ("uniform", 5, [(1, 2), (2, 5), (3, 7), (4, 10), (5, 12)]),
            ("skip", 6, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),
            ("skip", 1, [(1, 12)]),
            ("last", 3, [(1, 10), (2, 11), (3, 12)]),
            ("first", 3, [(1, 1), (2, 2), (3, 3)]),
        ],
    )
    def test_of_twelve_layers(self, strategy, student, pairs):
        assert layer_pairs(strategy, student, 12) == pairs

    @given(st.sampled_from(["uniform", "skip", "last", "first"]), st.integers(1, 24), st.integers(0, 24))
    def test_rise_and_stay_inside(self, strategy, student, more):
        teacher = student + more
        below, above = zip(*layer_pairs(strategy, student, teacher), strict=True)
        assert list(above) == sorted(set(above))
        assert set(below) <= set(range(1, student + 1))
        assert set(above) <= set(range(1, teacher + 1))
        assert strategy != "uniform" or above[-1] == teacher

    def test_the_spread_is_the_one_distilbert_was_made_with(self):
        assert source_layers("spread", 6, 12) == [0, 2, 4, 7, 9, 11]
        assert source_layers("first", 3, 12) == [0, 1, 2]
        assert source_layers("last", 3, 12) == [9, 10, 11]
        assert source_layers("spread", 1, 12) == [0]

    def test_anchors_of_twelve_layers_are_every_third(self):
        assert anchors(6, 12) == [3, 6, 9, 12]
        assert anchors(2, 12) == [6, 12]

    def test_alignment_goes_from_the_top_down_and_rises(self):
        # both prefer column 1; the upper one chooses first, and the lower one takes what is left below
        assert align(torch.tensor([[5.0, 0.0, 1.0], [9.0, 0.0, 1.0]])) == [0, 1]
        assert align(torch.tensor([[0.0, 5.0, 5.0], [9.0, 9.0, 1.0]])) == [0, 2]
        assert align(torch.eye(3)) == [0, 1, 2]

    @given(st.integers(0, 1000), st.integers(1, 5), st.integers(0, 5))
    def test_an_alignment_rises_strictly(self, seed, rows, more):
        found = align(torch.rand(rows, rows + more, generator=torch.Generator().manual_seed(seed)))
        assert found == sorted(set(found))
        assert len(found) == rows
        assert found[-1] < rows + more


class TestStudents:
    def test_a_student_of_all_layers_is_its_teacher(self):
        teacher = tiny_candidate()
        student = cut_student(teacher, range(4), 1.0)
        batch = next(tiny_batches(teacher))
        assert torch.equal(forward(student.network, batch), forward(teacher.network, batch))
        assert student.network is not teacher.network

    @pytest.mark.parametrize("task", ["text-classification", "token-classification"])
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("width", [0.75, 0.5])
    def test_narrow_students_have_the_shapes_and_parameters_that_were_announced(self, family, task, width):
        teacher = tiny_candidate(family, task)
        student = cut_student(teacher, [0, 3], width)
        found = subject_of(student.network, task)
        assert found == student.subject.without("lossy")
        assert student.subject == student_subject(teacher.subject, 2, width)
        counted = sum(p.numel() for p in student.network.parameters())
        assert student.subject.parameters == counted
        assert forward(student.network, next(tiny_batches(teacher))).isfinite().all()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_all_the_width_is_the_network_itself(self, family):
        teacher = tiny_candidate(family, layers=2)
        copy = narrowed(teacher.network, 32, 64)
        batch = next(tiny_batches(teacher))
        torch.testing.assert_close(forward(copy, batch), forward(teacher.network, batch), atol=1e-6, rtol=1e-6)

    def test_electras_narrow_tables_stay_and_their_projection_is_cut(self):
        from transformers import AutoConfig, ElectraForSequenceClassification

        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
        config = AutoConfig.for_model("electra", vocab_size=90, embedding_size=16, **sizes)
        network = ElectraForSequenceClassification(config).eval()
        subject = subject_of(network, "text-classification")
        assert widths(subject) == [1.0, 0.75, 0.25]  # at half the width there would be no projection
        small = narrowed(network, 24, 48)
        table = embeddings(small).word_embeddings.weight
        assert torch.equal(table, embeddings(network).word_embeddings.weight)
        assert small.electra.embeddings_project.weight.shape == (24, 16)
        counted = sum(p.numel() for p in small.parameters())
        assert student_subject(subject, 2, 0.75).parameters == counted

    def test_what_is_kept_is_what_matters(self):
        teacher = tiny_candidate(layers=2)
        kept = list(range(8, 24))
        with torch.no_grad():
            embeddings(teacher.network).word_embeddings.weight[:, kept] *= 10
            layer = parts(layers(teacher.network)[0])
            layer.query.weight[[0, 1, 2, 3]] *= 100
            layer.up.weight[32:] *= 100
        small = narrowed(teacher.network, 16, 32)
        table = embeddings(teacher.network).word_embeddings.weight[:, kept]
        assert torch.equal(embeddings(small).word_embeddings.weight, table)
        cut = parts(layers(small)[0])
        assert torch.equal(cut.query.weight[:4], layer.query.weight[:4, kept])
        assert torch.equal(cut.key.weight[:4], layer.key.weight[:4, kept])
        assert torch.equal(cut.up.weight, layer.up.weight[32:, kept])

    @pytest.mark.parametrize("task", ["text-classification", "token-classification"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_is_kept_does_not_depend_on_where_it_stands(self, family, task):
        teacher = tiny_candidate(family, task, layers=2)
        batch = next(tiny_batches(teacher))
        for number, parameter in enumerate(teacher.network.parameters()):
            if parameter.ndim == 1:  # biases and norms as they are after some training
                generator = torch.Generator().manual_seed(number)
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        moved = shuffled(teacher.network)
        torch.testing.assert_close(forward(moved, batch), forward(teacher.network, batch), rtol=1e-3, atol=1e-3)
        ours, theirs = (forward(narrowed(network, 16, 32), batch) for network in (teacher.network, moved))
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
        assert ours.std() > 0.1

    def test_widths_leave_heads_of_even_size(self):
        assert widths(BERT) == list(WIDTHS)
        assert widths(BERT.having(hidden=312, head_dim=26)) == [1.0]

    def test_no_width_is_that_of_projected_tables(self):
        subject = BERT.having(embedding_size=384)
        assert 384 not in sizes(subject)
        assert 0.5 not in widths(subject)
        assert whole_width(subject, 0.5) * 768 in (372, 396)

    def test_what_no_student_is_made_of(self):
        assert unfit(BERT) is None
        assert "at least 2" in str(unfit(BERT.having(layers=1)))
        assert "share" in str(unfit(BERT.having("shared")))
        assert "differ in shape" in str(unfit(BERT.having("non-uniform")))
