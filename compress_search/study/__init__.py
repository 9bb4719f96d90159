"""study.yaml as validated, immutable data: what to compress, towards what, with which methods and what budget.

Owns the top level of the file, and with it every check that needs no model and no data. Knows nothing of torch,
of which methods exist or of how anything is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from compress_search.errors import StudyError
from compress_search.study.complaints import Fault, complain, show
from compress_search.study.document import Document, override, read
from compress_search.study.goals import (
    METRICS,
    TIMED,
    Constraint,
    Direction,
    TaskName,
    as_written,
    direction,
    parse_constraints,
    parse_objectives,
    plain_objective,
)
from compress_search.study.methods import parse_methods
from compress_search.study.sections import (
    Architecture,
    ArtifactsConfig,
    AuxiliaryConfig,
    ClusterConfig,
    DataConfig,
    Defaults,
    FineTune,
    MeasureConfig,
    SearchConfig,
    Section,
    TeacherConfig,
    TrainingConfig,
    derived,
    located,
)
from compress_search.study.sources import database_url, hide_passwords, output_directory, plugin_files

if TYPE_CHECKING:
    from compress_search.space import Narrowing
else:
    Narrowing = Any  # importing space imports Optuna, which takes longer than ``--help`` may

__all__ = [
    "MAY_CHANGE",
    "METRICS",
    "Architecture",
    "ArtifactsConfig",
    "AuxiliaryConfig",
    "ClusterConfig",
    "Constraint",
    "DataConfig",
    "Direction",
    "FineTune",
    "MeasureConfig",
    "SearchConfig",
    "Study",
    "TeacherConfig",
    "TrainingConfig",
    "direction",
    "hide_passwords",
    "load_study",
    "objectives_for",
]


MAY_CHANGE = ("name", "storage", "output", "artifacts", "cluster", "search", "training.teacher_cache_gb")
"""Keys that a later run of a study may change, budgets, resources and places; of ``search`` all but the seed."""


def _plain_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w .-]*", text):  # it also names a directory
        raise ValueError(f"expected letters, digits, spaces and any of . _ -, got {show(text)}")
    return text


def _plain_keys(value: Any) -> Any:
    """Names of an author's own become parts of dotted keys."""
    for name in value if isinstance(value, Mapping) else ():
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise ValueError(f"expected names of letters, digits, _ and -, got {show(name)}")
    return value


def _objectives(items: Any, info: ValidationInfo) -> tuple[str, ...]:
    # without a task nothing can be said about metrics, and the study is refused for that already
    return parse_objectives(items, info.data["task"]) if "task" in info.data else ()


def _constraints(items: Any, info: ValidationInfo) -> Mapping[str, Constraint]:
    return parse_constraints(items, info.data["task"]) if "task" in info.data else {}


class Study(Section):
    """A whole study; :func:`load_study` makes one from a file, with every path absolute."""

    name: Annotated[str, AfterValidator(_plain_name)] = Field(
        max_length=100, json_schema_extra=derived("the file's stem"), description="what reports call it"
    )
    task: TaskName = Field(description="what the model does")
    teacher: Annotated[TeacherConfig, Defaults] = Field(description="the model to compress")
    data: Annotated[DataConfig, Defaults] = Field(description="the examples to train, select and report on")
    auxiliary: Annotated[Mapping[str, AuxiliaryConfig], BeforeValidator(_plain_keys), Defaults] = Field(
        default={},
        description="further tasks by names of your own, for methods that have students learn them by turns with "
        "this one",
    )
    objectives: Annotated[
        tuple[str, ...],
        PlainValidator(_objectives, json_schema_input_type=list[str | dict[str, Direction]]),
        PlainSerializer(lambda names: [plain_objective(name) for name in names]),
    ] = Field(
        default=(),
        json_schema_extra=derived("the task's first metric and latency_ms"),
        description="what the front trades off: the task's metrics, latency_ms, speedup, throughput, size_mb, "
        "memory_mb, or a method's own metric with its direction, {my_method.key: minimize}",
    )
    constraints: Annotated[
        Mapping[str, Constraint],
        PlainValidator(_constraints, json_schema_input_type=dict[str, str | list[str]]),
        PlainSerializer(lambda items: {name: as_written(item) for name, item in items.items()}),
    ] = Field(
        default={},
        description='bounds on metrics, "<= 40" or ">= 0.9", or a list of one of each; '
        "beside the objectives there is <metric>_drop for each of the task's metrics: the absolute loss against "
        "the teacher",
    )
    methods: Annotated[
        Mapping[str, Mapping[str, Narrowing]] | Literal["all"],
        PlainValidator(parse_methods, json_schema_input_type=Literal["all"] | list[str] | dict[str, Any]),
        PlainSerializer(lambda items: items),
    ] = Field(
        description="`all`, a list of names, or names with values that narrow their dimensions: a scalar fixes "
        "one, a list gives the choices, {low: …, high: …} a range; {use: true} has every recipe use the method",
    )
    plugins: Annotated[
        tuple[Path, ...],
        PlainValidator(located(plugin_files), json_schema_input_type=list[str]),
        PlainSerializer(lambda paths: [str(path) for path in paths]),
    ] = Field(default=(), description="Python files with further methods, each named after its file")
    search: Annotated[SearchConfig, Defaults] = Field(
        default=SearchConfig(), description="how long and how to search"
    )
    training: Annotated[TrainingConfig, Defaults] = Field(TrainingConfig(), description="a trial's training budget")
    measure: Annotated[MeasureConfig, Defaults] = Field(
        default=MeasureConfig(), description="how latency is measured"
    )
    cluster: Annotated[ClusterConfig, Defaults] = Field(default=ClusterConfig(), description="where trials run")
    artifacts: Annotated[ArtifactsConfig, Defaults] = Field(
        default=ArtifactsConfig(), description="which models stay on the disk"
    )
    output: Annotated[Path, PlainValidator(located(output_directory), json_schema_input_type=str)] = Field(
        json_schema_extra=derived("runs/<name>"), description="directory for artefacts"
    )
    storage: Annotated[str, PlainValidator(located(database_url), json_schema_input_type=str)] = Field(
        default_factory=lambda data: f"sqlite:///{data['output'] / 'study.db'}",
        repr=False,
        json_schema_extra=derived("sqlite:///<output>/study.db"),
        description="SQLAlchemy URL of the database; environment variables ($NAME, ${NAME}) expand, passwords "
        "are never printed or stored",
    )
    _document: Document | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _metrics_have_methods(self) -> Study:
        """A method's metric needs the method to be searched."""
        for key, metric in self.aims():
            method, dot, _ = metric.partition(".")
            if dot and self.methods != "all" and method not in self.methods:
                raise Fault(key, f"{metric} needs {method} among the methods")
        return self

    @model_validator(mode="after")
    def _only_tags_form_a_chain(self) -> Study:
        if self.teacher.fine_tune and self.teacher.fine_tune.crf and self.task != "token-classification":
            raise Fault("teacher.fine_tune.crf", f"expected false for {self.task}: only tags form a sequence")
        return self

    @model_validator(mode="after")
    def _threads_have_cores(self) -> Study:
        threads, cores = self.measure.threads, self.cluster.cpus_per_trial
        if threads > cores:
            raise Fault("measure.threads", f"expected at most cluster.cpus_per_trial ({cores}), got {threads}")
        return self

    def aims(self) -> list[tuple[str, str]]:
        """The metrics of objectives and constraints, each after the dotted key that names it."""
        objectives = [(f"objectives.{number}", str(name)) for number, name in enumerate(self.objectives)]
        return [*objectives, *((f"constraints.{name}", name) for name in self.constraints)]

    @property
    def directions(self) -> dict[str, Direction]:
        """Objectives with their directions; where none are named, the task's first metric and latency_ms."""
        return objectives_for(self, METRICS[self.task][0])

    @property
    def timed(self) -> bool:
        """Whether an objective or a constraint depends on running time."""
        return any(name in TIMED for name in (*self.directions, *self.constraints))

    @property
    def sized(self) -> bool:
        """Whether an objective or a constraint depends on the stored size."""
        return "size_mb" in {*self.directions, *self.constraints}

    def error(self, key: str, message: str) -> StudyError:
        """An error that names the dotted key with its file and line, or those of its nearest ancestor."""
        if self._document is None:
            return StudyError(message, key=key)
        return self._document.error(key, message)

    @contextmanager
    def blamed(self, key: str, *, below: bool = False) -> Iterator[None]:
        """What is wrong with a study made of parts of this one stands at this key of it.

        With ``below`` it stands at the key under this one that the other study names.
        """
        try:
            yield
        except StudyError as error:
            place = f"{key}.{error.key}" if below and error.key else key
            raise self.error(place, error.message) from error

    def method_key(self, name: str) -> str:
        """The dotted key at which the study names a method: by its number where the methods are a list."""
        written = self._document.data["methods"] if self._document else self.methods
        return f"methods.{written.index(name)}" if isinstance(written, list) else f"methods.{name}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data for workers: paths absolute, without the storage, which only the driver opens."""
        return self.model_dump(mode="json", exclude={"storage"}, exclude_none=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """The inverse of :meth:`to_dict`; touches no files."""
        return cls.model_validate(dict(data))

    def identity(self, *, defaults: bool = True) -> dict[str, Any]:
        """What must not change between two runs of a study, as plain JSON data: all that decides its results.

        Without ``defaults`` only what differs from them, and what has none.
        """
        excluded = {key: True for key in MAY_CHANGE if "." not in key}
        inner = {section: {name} for section, _, name in (key.partition(".") for key in MAY_CHANGE) if name}
        plain = self.model_dump(
            mode="json", exclude={**excluded, **inner}, exclude_none=True, exclude_defaults=not defaults
        )
        return {**plain, "objectives": self.directions, "search": {"seed": self.search.seed}}


def objectives_for(study: Study, primary: str) -> dict[str, Direction]:
    """The study's objectives with their directions; where it names none, ``primary`` and latency_ms."""
    if not study.objectives:
        return {primary: direction(primary), "latency_ms": direction("latency_ms")}
    return {str(name): getattr(name, "direction", None) or direction(name) for name in study.objectives}


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study file; nothing is created.

    Args:
        path: the YAML file; the paths in it are relative to its folder.
        overrides: ``a.b.c=VALUE`` each, applied in order, VALUE being YAML.

    Raises:
        StudyError: the first thing wrong with it, with file, line and key.
    """
    document = read(path)
    if document.data is None:
        raise StudyError("the file is empty; expected the keys task, teacher, data and methods", file=path)
    if not isinstance(document.data, dict):
        raise StudyError(f"expected a mapping of keys to values, got {show(document.data)}", file=path)
    for assignment in overrides:
        document = override(document, assignment)
    data = {"name": path.stem, **document.data}
    data.setdefault("output", f"runs/{data['name']}")
    folder = path.absolute().parent
    try:
        study = Study.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise _first_error(error, document) from None
    study._document = document
    return study


def _first_error(error: ValidationError, document: Document) -> StudyError:
    """The error that stands first in the file; what is missing comes after all there is in its section."""

    def position(item: tuple[str, str, bool]) -> float:
        key, _, missing = item
        line = document.end(key.rpartition(".")[0]) if missing else document.place(key).line
        return math.inf if line is None else line + 0.5 * missing

    complaints = [
        (*complain(Study, fault), fault["type"] == "missing")
        for fault in error.errors(include_url=False)
        if fault["type"] != "default_factory_not_called"  # another field's error comes with it
    ]
    key, message, _ = min(complaints, key=position)
    return document.error(key, message)
