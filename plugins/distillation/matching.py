"""The losses of matches on what two networks computed, and the projections that are trained for them.

Knows nothing of where matches come from (:mod:`.matches` has their form) nor of when a method trains on them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress_search import ParameterGroup
from compress_search.encoders import feature_shape
from compress_search.losses import valid_tokens

from .comparable import Shapes, check_matches
from .matches import Match


class _Identity(nn.Linear):
    """A linear map that starts as the identity."""

    def reset_parameters(self) -> None:
        """Ones on the diagonal, no bias."""
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


@dataclass(frozen=True)
class Matching:
    """Matches with their projections: the loss of one student and one teacher.

    ``projections`` belongs to neither; give it to ``context.fit`` as ``beside``, and its :meth:`groups` among the
    parameters.
    """

    matches: tuple[Match, ...]
    projections: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    @classmethod
    def between(
        cls,
        matches: Sequence[Match],
        student: nn.Module,
        teacher: nn.Module,
        seed: int,
        language: nn.Module | None = None,
    ) -> Matching:
        """The matching of two networks, with new projections: weights N(0, 0.02²), no bias.

        ``language`` is learnt from in the teacher's place in the phase in general.

        Raises:
            TrialError: see :func:`check_matches`.
        """
        spoken = None if language is None else Shapes.read(language)
        check_matches(matches, Shapes.read(student), Shapes.read(teacher), spoken)
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, nn.Module] = {}
        for number, match in enumerate(matches):
            key = _key(number, match)
            if match.proj and key not in made:
                ours, theirs = feature_shape(student, match.student[0]), feature_shape(teacher, match.teacher[0])
                made[key] = _make(match.proj.kind, ours[0], theirs[0], generator)
        return cls(tuple(matches), nn.ModuleDict(made))

    def only(self, *phases: int | str) -> Matching:
        """The matches of these phases, with the same projections under their new numbers."""
        kept = [(n, match) for n, match in enumerate(self.matches) if match.phases & {*phases}]
        modules = {
            _key(new, match): self.projections[_key(old, match)]
            for new, (old, match) in enumerate(kept)
            if match.proj
        }
        return Matching(tuple(match for _, match in kept), nn.ModuleDict(modules))

    @property
    def student_features(self) -> list[str]:
        """What is to be read of the student, each name once."""
        return list(dict.fromkeys(name for match in self.matches for name in match.student))

    @property
    def teacher_features(self) -> list[str]:
        """What is to be read of the teacher, each name once."""
        return list(dict.fromkeys(name for match in self.matches for name in match.teacher))

    @property
    def sees_padding(self) -> bool:
        """Whether any match looks at positions that are padding."""
        return any(not match.mask or match.loss == "mse" for match in self.matches)

    def groups(self) -> list[ParameterGroup]:
        """The projections' parameters with their own learning rates."""
        rates = {_key(n, match): match.proj.lr for n, match in enumerate(self.matches) if match.proj}
        return [ParameterGroup(list(self.projections[key].parameters()), rate) for key, rate in rates.items()]

    def term(
        self,
        number: int,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        mask: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """One match's loss, unweighted.

        Args:
            number: the match's, from 0.
            student: features by name.
            teacher: features by name.
            mask: (B, S), 1 = no padding.
            labels: of token tasks, (B, S), where there are some; of other tasks they are not looked at.
        """
        match = self.matches[number]
        ours, theirs = [student[name] for name in match.student], [teacher[name] for name in match.teacher]
        if match.proj:
            ours = [self.projections[_key(number, match)](tensor) for tensor in ours]
        mask = _counted(match, mask, labels)
        if match.function.pair:
            return match.function((ours[0], ours[1]), (theirs[0], theirs[1]), mask)
        return match.function(ours[0], theirs[0], mask)

    def loss(self, terms: Mapping[int, Tensor], progress: float = 0.0) -> Tensor | float:
        """The weighted sum of terms, by the numbers of their matches; 0.0 for none."""
        return sum((self.matches[n].scheduled(progress) * term for n, term in terms.items()), 0.0)

    def __call__(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        mask: Tensor,
        progress: float = 0.0,
        chosen: Collection[int] | None = None,
    ) -> Tensor | float:
        """The weighted sum over the chosen matches, all by default; arguments as of :meth:`term`."""
        numbers = range(len(self.matches)) if chosen is None else chosen
        return self.loss({n: self.term(n, student, teacher, mask) for n in numbers}, progress)


def _counted(match: Match, mask: Tensor, labels: Tensor | None) -> Tensor:
    """Which positions count in a match, (B, S)."""
    if not match.mask:
        return torch.ones_like(mask)
    if match.kind != "logits" or labels is None or labels.ndim == 1:
        return mask
    return valid_tokens(labels, mask, match.token_scope)


def _key(number: int, match: Match) -> str:
    shared = match.proj and match.proj.shared
    return f"shared {shared}" if shared else str(number)


def _make(kind: str, ours: int, theirs: int, generator: torch.Generator) -> nn.Module:
    if kind == "identity":
        if ours == theirs:
            return _Identity(ours, theirs)
        kind = "linear"
    linear = nn.utils.skip_init(nn.Linear, ours, theirs)
    linear.weight.data = torch.randn(theirs, ours, generator=generator) * 0.02
    nn.init.zeros_(linear.bias)
    activation: dict[str, list[nn.Module]] = {"linear": [], "relu": [nn.ReLU()], "tanh": [nn.Tanh()]}
    return nn.Sequential(linear, *activation[kind])
