"""Where a network starts that is to be trained anew: with the weights that the teacher once started with.

Trains nothing and chooses no shape.
"""

from __future__ import annotations

from torch import nn

from compress_search import Candidate, Context, Subject, TrialError

CAME_TRAINED = (
    "the teacher came trained, so that nothing is known of its start: have it trained by teacher.fine_tune"
)


def startless(subject: Subject) -> str | None:
    """Why nothing can start where the teacher did; None where it can."""
    return CAME_TRAINED if "came-trained" in subject.traits else None


def beginning(context: Context) -> nn.Module:
    """The network that the teacher was before it was trained on the task.

    Raises:
        TrialError: it came trained.
    """
    start = context.untrained()
    if start is None:
        raise TrialError(CAME_TRAINED)
    return start


def started_anew(candidate: Candidate, start: nn.Module | None) -> nn.Module:
    """A copy of the candidate's network with the weights of ``start``.

    A tensor whose shape an earlier step changed stays as that step left it; without a start all do.
    """
    network = candidate.copy().network
    if start is not None:
        fresh, own = start.state_dict(), network.state_dict()
        fitting = {name: fresh[name] for name, value in own.items() if fresh[name].shape == value.shape}
        network.load_state_dict({**own, **fitting})
    return network
