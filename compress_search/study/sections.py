"""The sections of a study file: their keys, defaults and ranges. Knows nothing of the file they stand in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compress_search.study.complaints import Fault, show
from compress_search.study.goals import TaskName
from compress_search.study.sources import data_source, data_sources, model_source, model_sources, vocabulary_source


class Section(BaseModel):
    """A mapping of known keys, immutable once read; values are never converted from another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _empty_section(value: Any) -> Any:
    """A section whose keys are all commented out is the section with its defaults."""
    return {} if value is None else value


Defaults = BeforeValidator(_empty_section)


def located(check: Callable[[Any, Path | None], Any]) -> Callable[[Any, ValidationInfo], Any]:
    """A validator from a check that resolves paths against the folder of the file being loaded, if one is."""
    return lambda value, info: check(value, info.context["folder"] if info.context else None)


def derived(text: str) -> dict[str, Any]:
    """Says in the schema, in words, what a key is when it is left out."""
    return {"derived": text}


class Architecture(Section):
    """The shape of a small encoder to train from scratch."""

    family: Literal["bert"] = Field(default="bert", description="the kind of encoder")
    layers: int = Field(default=4, ge=1, description="transformer layers")
    hidden: int = Field(default=256, ge=8, description="width of a token's representation")
    heads: int = Field(default=4, ge=1, description="attention heads of a layer; divides `hidden`")
    intermediate: int = Field(
        default_factory=lambda data: 4 * data["hidden"],
        ge=1,
        json_schema_extra=derived("4 × `hidden`"),
        description="neurons of a layer's feed-forward part",
    )
    vocabulary: Annotated[
        int | Path, PlainValidator(located(vocabulary_source), json_schema_input_type=int | str)
    ] = Field(
        default=4000,
        description="size of a WordPiece vocabulary trained on the training text, or the path of a vocab.txt",
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Architecture:
        if self.hidden % self.heads:
            raise Fault("heads", f"expected a divisor of hidden ({self.hidden}), got {self.heads}")
        return self


class FineTune(Section):
    """How the teacher is trained on the task before it is compressed."""

    epochs: float = Field(default=3.0, gt=0, description="passes over the training data")
    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="the peak, after warm-up")
    batch_size: int = Field(default=32, ge=1, description="examples in a training step")
    layer_drop: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="chance that a step skips a layer (LayerDrop), so that layers can be left out later without "
        "training again; to keep r of N layers, 1 − r/N",
    )
    crf: bool = Field(
        default=False,
        description="put a conditional random field on the logits, so that tags are predicted as a sequence; for "
        "token-classification",
    )
    crf_multiplier: float = Field(
        default=2.0, gt=0, description="the field's learning rate as a multiple of `learning_rate`"
    )

    def identity(self) -> dict[str, Any]:
        """What of these decides the teacher; keys that came later count where they are used."""
        plain = self.model_dump(mode="json")
        if not self.crf:
            del plain["crf"], plain["crf_multiplier"]
        return plain


class TeacherConfig(Section):
    """The model to compress: either `model` or `architecture`."""

    model: Annotated[str, AfterValidator(located(model_source))] | None = Field(
        default=None, description="directory in Hugging Face's format, or hub id"
    )
    architecture: Architecture | None = Field(
        default=None, description="train a small model from scratch instead; needs `fine_tune`"
    )
    fine_tune: FineTune | None = Field(
        default=None, description="train the model on the task first; leave out when it already is fine-tuned"
    )
    ensemble: Annotated[
        tuple[str, ...],
        PlainValidator(located(model_sources), json_schema_input_type=list[str]),
        PlainSerializer(list),
    ] = Field(
        default=(),
        description="further teachers, fine-tuned on the task and of the same vocabulary: students learn from the "
        "average of all, while what is compressed, and compared with, is this model alone",
    )
    average: Literal["logits", "probabilities"] = Field(
        default="logits", description="what of several teachers is averaged"
    )
    masked_lm: Annotated[str, AfterValidator(located(model_source))] | None = Field(
        default=None,
        description="a masked language model of the same vocabulary, such as the teacher before it was fine-tuned: "
        "a directory or hub id; for methods that learn from one, or write further examples with it",
    )
    student_start: Annotated[str, AfterValidator(located(model_source))] | None = Field(
        default=None,
        description="a small pretrained encoder of the same vocabulary and family, such as RBT3 or a general "
        "TinyBERT: a directory or hub id; for methods whose students can start from one (`start: checkpoint`)",
    )

    @field_validator("fine_tune", mode="before")
    @classmethod
    def _say_which(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("expected a mapping, {} for the defaults; leave the key out for a fine-tuned model")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.model is None) == (self.architecture is None):
            raise ValueError(
                f"expected either model or architecture, got {'neither' if self.model is None else 'both'}"
            )
        if self.architecture and not self.fine_tune:
            raise Fault("architecture", "a model trained from scratch needs teacher.fine_tune")
        return self


_DataSource = Annotated[str, AfterValidator(located(data_source))]


class DataConfig(Section):
    """The examples, as files with one example a row, or hub data sets."""

    train: _DataSource = Field(description="training data: jsonl, csv, tsv or parquet file, or hub id")
    validation: _DataSource | None = Field(
        default=None,
        json_schema_extra=derived("a tenth of the training data"),
        description="what the search selects on",
    )
    test: _DataSource | None = Field(default=None, description="scored once, for the front")
    unlabeled: Annotated[
        tuple[str, ...],
        PlainValidator(located(data_sources), json_schema_input_type=str | list[str]),
        PlainSerializer(list),
    ] = Field(
        default=(),
        description="text without labels, one such source or a list; for methods that can learn from the teacher "
        "alone",
    )
    max_length: int = Field(default=128, ge=4, description="word pieces of an example; longer ones are cut")
    text: str = Field(default="text", min_length=1, description="column with the text")
    text_pair: str | None = Field(
        default=None,
        min_length=1,
        json_schema_extra=derived("`text_pair`, where there is one"),
        description="column with a second text",
    )
    label: str = Field(default="label", min_length=1, description="column with the class, or the number to predict")
    tokens: str = Field(default="tokens", min_length=1, description="column with the list of words (token tasks)")
    tags: str = Field(default="tags", min_length=1, description="column with one tag for each word (token tasks)")


class AuxiliaryConfig(Section):
    """A further task for students to learn by turns with the study's own, of which nothing is left in the end."""

    task: TaskName = Field(description="what is learnt")
    teacher: Annotated[TeacherConfig, Defaults] = Field(
        description="who teaches it, written as the study's `teacher`: `model`, of its vocabulary, and `fine_tune`"
    )
    data: Annotated[DataConfig, Defaults] = Field(
        description="its examples, written as the study's `data`: `train`, the columns and `max_length`, of which "
        "no more than the study's counts"
    )

    @model_validator(mode="after")
    def _only_what_is_read(self) -> AuxiliaryConfig:
        unread = {
            "teacher": ("architecture", "ensemble", "average", "masked_lm", "student_start"),
            "data": ("validation", "test", "unlabeled"),
        }
        for section, keys in unread.items():
            part = getattr(self, section)
            for key in keys:
                if getattr(part, key) != type(part).model_fields[key].default:
                    raise Fault(f"{section}.{key}", "nothing reads this of an auxiliary task: leave it out")
        if self.teacher.fine_tune and self.teacher.fine_tune.crf:
            raise Fault("teacher.fine_tune.crf", "expected false: of an auxiliary task logits alone are learnt")
        return self


class SearchConfig(Section):
    """How long and how to search."""

    trials: int = Field(
        default=40, ge=1, description="trials to run; complete, stopped and failed ones count, duplicates do not"
    )
    hours: float | None = Field(default=None, gt=0, description="start no more trials after this time")
    sampler: Literal["auto", "random", "tpe", "gp", "nsga2"] = Field(
        default="auto", description="what proposes recipes; `auto` changes with the number of trials"
    )
    early_stop: Literal["moasha", "none"] = Field(
        default="moasha", description="stop trials that many others dominate at the same point of their training"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of all randomness")
    concurrency: int = Field(
        default=1,
        ge=1,
        description="trials at the same time; on one machine, times `cluster.cpus_per_trial`, at most its cores",
    )
    retries: int = Field(default=2, ge=0, description="further attempts at a trial whose worker died")
    trial_minutes: float | None = Field(default=None, gt=0, description="wall-clock limit of one attempt")


class TrainingConfig(Section):
    """A trial's whole training budget, split over its training steps."""

    epochs: float = Field(default=3.0, gt=0, description="passes over the training data")
    batch_size: int = Field(default=32, ge=1, description="examples in a training step")
    learning_rate: float = Field(
        default=5e-5, gt=0, le=1, description="the peak, where a method does not search its own"
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="part of the steps in which the learning rate rises")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's decoupled weight decay")
    crf_multiplier: float = Field(
        default=1.0,
        gt=0,
        description="the learning rate of a CRF on the logits as a multiple of that of all else, whatever method "
        "trains it",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="fp32",
        description="of forward passes in training, the teacher's own included: `bf16` is much faster where "
        "`compress-search doctor` finds its kernels real, and much slower elsewhere; `auto` is `bf16` where they "
        "are real when the study begins; scores are always computed in 32 bits",
    )
    teacher_cache_gb: float = Field(
        default=4.0,
        ge=0,
        description="GB (10⁹ bytes) of disk for teachers' hidden states and attention on training data, this "
        "study's and those that earlier ones left, of which the oldest go unless somebody reads them; what has no "
        "room is computed again at each step, as is what a GPU computes sooner than it is read",
    )

    def settled(self, *, bf16: bool) -> TrainingConfig:
        """With what ``auto`` comes to where bfloat16 has kernels, or where it has none."""
        if self.precision != "auto":
            return self
        return self.model_copy(update={"precision": "bf16" if bf16 else "fp32"})

    @property
    def computes_in(self) -> Literal["fp32", "bf16"]:
        """The precision of forward passes, of a study that has begun."""
        assert self.precision != "auto", "settled when a study is prepared"
        return self.precision

    def identity(self) -> dict[str, Any]:
        """What of these decides the result of a trial."""
        plain = self.model_dump(mode="json", exclude={"teacher_cache_gb"})
        for key, usual in (("precision", "fp32"), ("crf_multiplier", 1.0)):
            if plain[key] == usual:  # keys that came later count where they are used
                del plain[key]
        return plain


class MeasureConfig(Section):
    """How latency is measured."""

    batch_size: int = Field(default=1, ge=1, description="examples in a measured batch")
    threads: int = Field(
        default=1, ge=1, description="threads of the measured runtime; at most `cluster.cpus_per_trial`"
    )
    repeats: int = Field(
        default=50,
        ge=2,
        description="timed runs of the candidate, each beside one of the teacher; they are shared out over about "
        "five lengths of text, and each of these gets 6 at least, which a 95 % interval takes",
    )


class ArtifactsConfig(Section):
    """Which models stay on the disk."""

    keep_gb: float = Field(
        default=5.0,
        ge=0,
        description="GB (10⁹ bytes) of disk for models beside those of the front and the baselines, which always "
        "stay; the oldest go when the study ends, and `compress-search export` makes one that went again",
    )


def _cluster_address(text: str) -> str:
    if not re.fullmatch(r"local|auto|([\w.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}", text):
        raise ValueError(f"expected local, auto or host:port, got {show(text)}")
    return text


class ClusterConfig(Section):
    """Where trials run."""

    address: Annotated[str, AfterValidator(_cluster_address)] = Field(
        default="local",
        description="`local`, `auto` (the Ray cluster found from here) or `host:port`",
    )
    cpus_per_trial: int = Field(default=1, ge=1, description="CPU cores of a trial")
    gpus_per_trial: float = Field(default=0, ge=0, description="GPUs of a trial; fractions share one")
