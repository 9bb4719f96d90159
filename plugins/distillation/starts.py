"""Where a network starts that is to be trained anew: with the weights that the teacher once started with.

Trains nothing and chooses no shape.
"""

from __future__ import annotations

from torch import nn

from compress_search import Candidate


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
