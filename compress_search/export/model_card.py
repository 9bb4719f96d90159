"""The model card: what an exported model is, how good and how fast it was measured to be, how to use it.

Owns the facts of a card and its wording (templates/model_card.md.j2). Knows nothing of files or databases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jinja2

from compress_search import formats
from compress_search.recipe import Recipe
from compress_search.tasks import Task

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Card:
    """Everything a card tells of one trial.

    ``metrics`` and ``intervals`` were measured on validation, ``teacher`` are the teacher's; ``test`` was scored
    once, at the end of the study. ``latency`` says how the latency among the metrics was taken, ``environment`` on
    what, and ``command`` what makes the directory again, if that is known.
    """

    study: str
    number: int
    seed: int
    recipe: Recipe
    task: Task
    max_length: int
    metrics: Metrics
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    teacher: Metrics = field(default_factory=dict)
    test: Metrics = field(default_factory=dict)
    latency: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for programs that read what people read in the card."""
        return {**asdict(self), "recipe": self.recipe.to_list(), "task": self.task.to_dict()}


@dataclass(frozen=True)
class Contents:
    """What lies beside the card: the folder of each form, which of them was measured, and their fresh scores.

    ``crf``: whether a CRF turns the logits into tags.
    """

    folders: Mapping[str, str]
    measured: str
    scores: Mapping[str, Metrics]
    crf: bool = False


def render(card: Card, contents: Contents) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("compress_search"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown for people and hubs, which escape HTML themselves
    )
    template = environment.get_template("model_card.md.j2")
    return template.render(card=card, contents=contents, rows=table(card), steps=steps(card), formats=formats)


def table(card: Card) -> list[tuple[str, str, str, str, str]]:
    """(heading, value, 95 % interval, teacher, test) of every metric that has a unit of its own."""
    return [
        (
            formats.style(name).heading,
            formats.number(name, value),
            _interval(name, card.intervals.get(name)),
            formats.number(name, card.teacher.get(name)),
            formats.number(name, card.test.get(name)),
        )
        for name, value in card.metrics.items()
        if formats.style(name).unit
    ]


def _interval(name: str, ends: tuple[float, float] | None) -> str:
    return " – ".join(formats.number(name, end) for end in ends) if ends else formats.number(name, None)


def steps(card: Card) -> list[tuple[str, str]]:
    """(method, its parameters as JSON) of each step of the recipe."""
    return [(step.method, json.dumps(step.params, sort_keys=True)) for step in card.recipe.steps]
