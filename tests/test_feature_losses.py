"""The exact properties of the losses between inner features, and how they relate to those of other libraries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compress_search import losses
from compress_search.losses import FEATURE_LOSSES, feature_loss

B, A, S, D = 3, 4, 6, 8
NAMES = [*FEATURE_LOSSES, "kd_ce", "kd_ce:4", "kd_kl", "kd_kl:4", "kd_mse", "kd_mse:4", "relation_kl:2"]
ENTROPIC = {"attention_ce", "attention_ce_mean", "kd_ce", "kd_ce:4"}
"""Cross-entropies: their least value is the teacher's entropy."""
OF_TOKENS = [name for name in NAMES if "logits" not in feature_loss(name).kinds]
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feature(kind: str, seed: int = 0, heads: int = A, size: int = D) -> Tensor:
    if kind in ("query", "key", "value"):
        return random(B, heads, S, size, seed=seed)
    if kind in ("scores", "values"):
        return random(B, heads, S, S, seed=seed)
    if kind == "probabilities":
        return losses.masked_softmax(random(B, heads, S, S, seed=seed), MASK)
    return random(B, S, heads * size, seed=seed) if kind == "hidden" else random(B, 5, seed=seed)


def arguments(name: str, seed: int = 0) -> object:
    loss = feature_loss(name)
    first = feature(loss.kinds[0], seed)
    return (first, feature(loss.kinds[0], seed + 100)) if loss.pair else first


def each(value: object, change) -> object:
    return tuple(map(change, value)) if isinstance(value, tuple) else change(value)


@pytest.mark.parametrize("name", NAMES)
def test_equal_features_give_zero_and_a_gradient_of_zero(name: str) -> None:
    loss, teacher = feature_loss(name), arguments(name)
    student = each(teacher, lambda tensor: tensor.clone().requires_grad_())
    value = loss(student, teacher, MASK)
    leaves = student if isinstance(student, tuple) else (student,)
    gradients = torch.autograd.grad(value, leaves)
    if name == "infonce":  # other texts of a batch are never entirely unlike
        assert value > 0
        return
    if name == "kl_probs":  # rows sum to one: what is the same for a whole row moves nothing
        gradients = tuple(g - (g.sum(-1) / (g != 0).sum(-1).clamp(min=1))[..., None] * (g != 0) for g in gradients)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)
    if name in ENTROPIC:
        worse = loss(arguments(name, seed=1), teacher, MASK)
        assert 0 < value < worse
    else:
        assert value.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_other_features_cost_something(name: str) -> None:
    loss, teacher = feature_loss(name), arguments(name)
    assert loss(arguments(name, seed=1), teacher, MASK) > 0.001


@pytest.mark.parametrize("wild", [1e4, -1e4])
@pytest.mark.parametrize("name", [name for name in OF_TOKENS if name != "mse"])
def test_what_lies_at_padding_changes_nothing(name: str, wild: float) -> None:
    loss = feature_loss(name)
    padding = ~MASK.bool()

    def spoil(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        if tensor.ndim == 3:
            spoilt[padding] = wild
        elif tensor.shape[-1] == S:
            spoilt.masked_fill_(padding[:, None, None, :] | padding[:, None, :, None], wild)
        else:
            spoilt.masked_fill_(padding[:, None, :, None], wild)
        return spoilt

    student, teacher = arguments(name, seed=1), arguments(name)
    clean, spoilt = loss(student, teacher, MASK), loss(each(student, spoil), each(teacher, spoil), MASK)
    torch.testing.assert_close(spoilt, clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in OF_TOKENS if name != "mse"])
def test_more_padding_changes_nothing(name: str) -> None:
    loss = feature_loss(name)

    def wider(tensor: Tensor) -> Tensor:
        if tensor.ndim == 3:
            return F.pad(tensor, (0, 0, 0, 3), value=7.0)
        return F.pad(tensor, (0, 3 if tensor.shape[-1] == S else 0, 0, 3), value=0.0)

    student, teacher = arguments(name, seed=1), arguments(name)
    widened = loss(each(student, wider), each(teacher, wider), F.pad(MASK, (0, 3)))
    torch.testing.assert_close(widened, loss(student, teacher, MASK), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_padding_alone_gives_a_finite_value_and_gradient(name: str) -> None:
    student = each(arguments(name, seed=1), lambda tensor: tensor.float().requires_grad_())
    teacher = each(arguments(name), Tensor.float)
    value = feature_loss(name)(student, teacher, torch.zeros_like(MASK))
    leaves = student if isinstance(student, tuple) else (student,)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, leaves))


def test_the_reductions_in_closed_form() -> None:
    student, teacher = feature("hidden", 1), feature("hidden")
    squared, real = (student - teacher) ** 2, MASK.bool()
    expected = squared[real].sum() / (MASK.sum() * A * D)
    torch.testing.assert_close(losses.hidden_mse(student, teacher, MASK), expected)
    ours, theirs = feature("scores", 1), feature("scores")
    pairs = MASK[:, None, :, None] * MASK[:, None, None, :]
    expected = ((ours - theirs) ** 2 * pairs).sum() / (A * (MASK.sum(1) ** 2).sum())
    torch.testing.assert_close(losses.attention_mse(ours, theirs, MASK), expected)
    torch.testing.assert_close(losses.mse(ours, theirs), F.mse_loss(ours, theirs))
    cosine = 1 - F.cosine_similarity(student, teacher, dim=-1)[real].mean()
    torch.testing.assert_close(losses.cos(student, teacher, MASK), cosine)


def test_attention_ce_is_the_kl_plus_the_teachers_entropy() -> None:
    ours, theirs = feature("scores", 1), feature("scores")
    p = losses.masked_softmax(theirs, MASK)
    entropy = -torch.special.xlogy(p, p).sum(-1).transpose(1, 2)[MASK.bool()].mean()
    difference = losses.attention_ce(ours, theirs, MASK) - losses.relation_kl_rows(ours, theirs, MASK)
    torch.testing.assert_close(difference, entropy)
    probabilities = (losses.masked_softmax(scores, MASK) for scores in (ours, theirs))
    torch.testing.assert_close(
        losses.kl_probs(*probabilities, MASK), losses.relation_kl_rows(ours, theirs, MASK), rtol=1e-9, atol=1e-9
    )


def test_cosine_is_0_for_parallel_and_2_for_opposite_states_whatever_their_size() -> None:
    states = feature("hidden")
    assert losses.cos(3 * states, states, MASK).item() == pytest.approx(0, abs=1e-12)
    assert losses.cos(-0.5 * states, states, MASK).item() == pytest.approx(2)


@given(st.integers(0, 100))
def test_a_value_relation_is_invariant_under_rotations_within_a_head(seed: int) -> None:
    value = feature("value", seed)
    rotation = torch.linalg.qr(random(D, D, seed=seed + 1))[0]
    before, after = (losses.relation(v, v) for v in (value, value @ rotation))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_rows_of_relations_sum_to_one() -> None:
    rows = losses.masked_softmax(losses.relation(feature("value"), feature("value")), MASK).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_relations_of_as_many_heads_as_there_are_need_no_new_split() -> None:
    ours, theirs = feature("query", 1), feature("query")
    direct = losses.relation_kl_rows(losses.relation(ours, ours), losses.relation(theirs, theirs), MASK)
    torch.testing.assert_close(losses.relation_kl(ours, theirs, MASK, heads=A), direct)


@pytest.mark.parametrize("name", ["attention_mse_sum", "attention_ce_mean", "relation_kl:2", "nst"])
def test_some_losses_take_models_of_other_heads_and_widths(name: str) -> None:
    loss = feature_loss(name)
    assert loss.any_heads or loss.pair
    kind = loss.kinds[0]
    student = feature(kind, 1, heads=2, size=6)
    value = (
        loss((student, student), (feature(kind), feature(kind)), MASK)
        if loss.pair
        else loss(student, feature(kind), MASK)
    )
    assert value.isfinite()
    assert value > 0


def test_relation_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5 relation heads do not divide a width of 32"):
        losses.relation_kl(feature("query"), feature("query"), MASK, heads=5)


@pytest.mark.parametrize(
    "name", ["hidden", "", "relation_kl", "relation_kl:0", "kd_ce:x", "kd_mse:-1", "relation_kl:2.5"]
)
def test_names_of_no_loss_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        feature_loss(name)


def test_temperatures_of_logit_losses() -> None:
    student, teacher = random(B, 5, seed=1), random(B, 5)
    ours = feature_loss("kd_ce:4")(student, teacher, MASK)
    torch.testing.assert_close(ours, losses.soft_cross_entropy(student, teacher, 4.0))
    torch.testing.assert_close(
        feature_loss("kd_mse:4")(student, teacher, MASK), F.mse_loss(student / 4, teacher / 4)
    )


class TestTextBrewer:
    """Where the same names mean the same number, and where a defect of that library is not ours.

    Its losses import without the rest of it; it is no dependency, so this is skipped where it is not installed.
    """

    @pytest.fixture
    def theirs(self):
        return pytest.importorskip(
            "textbrewer.losses", reason="textbrewer is not installed: nothing to compare with"
        )

    @pytest.mark.parametrize(
        ("name", "function"),
        [
            ("attention_mse", "att_mse_loss"),
            ("attention_mse_sum", "att_mse_sum_loss"),
            ("hidden_mse", "hid_mse_loss"),
            ("cos", "cos_loss"),
            ("pkd", "pkd_loss"),
            ("fsp", "fsp_loss"),
        ],
    )
    def test_equal_under_a_mask(self, theirs, name: str, function: str) -> None:
        student, teacher = arguments(name, seed=1), arguments(name)
        expected = getattr(theirs, function)(student, teacher, MASK.double())
        torch.testing.assert_close(feature_loss(name)(student, teacher, MASK), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("name", "function"), [("attention_ce", "att_ce_loss"), ("attention_ce_mean", "att_ce_mean_loss")]
    )
    def test_theirs_does_not_renormalise_over_the_keys_that_are_left(
        self, theirs, name: str, function: str
    ) -> None:
        student, teacher, everything = arguments(name, seed=1), arguments(name), torch.ones_like(MASK)
        expected = getattr(theirs, function)(student, teacher, everything.double())
        torch.testing.assert_close(feature_loss(name)(student, teacher, everything), expected)
        expected = getattr(theirs, function)(student, teacher, MASK.double())
        assert (feature_loss(name)(student, teacher, MASK) - expected).abs() > 0.01

    def test_theirs_scales_nst_by_the_padded_length(self, theirs) -> None:
        student, teacher = arguments("nst", seed=1), arguments("nst")
        theirs_value = theirs.mmd_loss(student, teacher, MASK.double())
        ours = feature_loss("nst")(student, teacher, MASK)
        torch.testing.assert_close(ours, theirs_value * (S / (A * D)) ** 2)

    def test_theirs_erases_negative_scores_without_a_mask(self, theirs) -> None:
        student, teacher = -feature("scores", 1).abs() - 1, -feature("scores").abs() - 1
        assert theirs.att_mse_loss(student, teacher) == 0
        assert losses.attention_mse(student, teacher, torch.ones_like(MASK)) > 0.1

    @pytest.mark.parametrize("tau", [1.0, 4.0])
    def test_theirs_has_no_tau_squared(self, theirs, tau: float) -> None:
        student, teacher = random(B, 5, seed=1), random(B, 5)
        torch.testing.assert_close(
            losses.soft_cross_entropy(student, teacher, tau), tau**2 * theirs.kd_ce_loss(student, teacher, tau)
        )
        torch.testing.assert_close(
            feature_loss(f"kd_mse:{tau}")(student, teacher, MASK), theirs.kd_mse_loss(student, teacher, tau)
        )


def test_infonce_is_the_logarithm_of_the_batch_for_equal_states() -> None:
    same = torch.ones(4, 7)
    assert losses.infonce(same, same).item() == pytest.approx(math.log(4))
