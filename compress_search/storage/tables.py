"""The ``cs_*`` tables that stand beside Optuna's in the same database.

Owns their columns. Knows nothing of how they are read or written, or of how a database gets to this version.
No foreign key leads into Optuna's tables, so that Optuna can be upgraded and its studies deleted without us; rows
are joined on the study's name and the trial's number.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, Double, ForeignKey, MetaData, String, Text, UniqueConstraint, column, table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

PREFIX = "cs_"
VERSION_TABLE = "cs_alembic_version"

OPTUNA_STUDIES = table("studies", column("study_id"), column("study_name"))
OPTUNA_TRIALS = table("trials", column("study_id"), column("number"), column("state"))
"""What we read of Optuna's own tables; ``state`` is the name of an ``optuna.trial.TrialState``."""


def now() -> datetime:
    """The time in UTC without its zone, as every table stores it."""
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    """The tables' base; every constraint has a name, so that a migration can find it."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        }
    )


class StudyRow(Base):
    """A study: what it is, what is frozen for it, who drives it.

    ``definition`` is the study as it was last run, without its storage; ``identity`` what no later run may change.
    ``reference`` holds the teacher's metrics and whatever else is frozen. ``seconds`` sum over sessions.
    """

    __tablename__ = "cs_study"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)
    definition: Mapped[dict[str, Any]] = mapped_column(JSON)
    identity: Mapped[dict[str, Any]] = mapped_column(JSON)
    space_hash: Mapped[str] = mapped_column(String(64))
    subject: Mapped[dict[str, Any]] = mapped_column(JSON)
    reference: Mapped[dict[str, Any]] = mapped_column(JSON)
    environment: Mapped[dict[str, Any]] = mapped_column(JSON)
    driver: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    seconds: Mapped[float] = mapped_column(Double)
    created: Mapped[datetime]


class AttemptRow(Base):
    """One attempt at a trial, from hand-out to its end.

    ``state`` is a trial's state, or "died" for an attempt whose worker died, "lost" for one whose driver did, and
    "released" for one that an interrupt took back: none of these ends a trial.
    """

    __tablename__ = "cs_attempt"
    __table_args__ = (UniqueConstraint("study_id", "trial", "attempt"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("cs_study.id", ondelete="CASCADE"))
    trial: Mapped[int]
    attempt: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    baseline: Mapped[str | None] = mapped_column(String(64))
    recipe: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    recipe_key: Mapped[str] = mapped_column(String(64))
    seed: Mapped[int]
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    intervals: Mapped[dict[str, Any]] = mapped_column(JSON)
    seconds: Mapped[dict[str, Any]] = mapped_column(JSON)
    artifact: Mapped[str | None] = mapped_column(Text)
    failure: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    environment: Mapped[dict[str, Any]] = mapped_column(JSON)
    provisional: Mapped[bool]
    started: Mapped[datetime]
    ended: Mapped[datetime | None]


class ReportRow(Base):
    """A trial's metrics at a rung and what was decided; one row for each rung, whichever attempt came first."""

    __tablename__ = "cs_report"
    __table_args__ = (UniqueConstraint("study_id", "trial", "rung"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("cs_study.id", ondelete="CASCADE"))
    trial: Mapped[int]
    attempt: Mapped[int]
    rung: Mapped[int]
    peer_group: Mapped[str] = mapped_column(String(64))
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    kept: Mapped[bool]
    at: Mapped[datetime]


class MeasurementRow(Base):
    """Raw samples of one kind, such as ``latency``; the newest of a kind stands."""

    __tablename__ = "cs_measurement"
    __table_args__ = (UniqueConstraint("study_id", "trial", "kind"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("cs_study.id", ondelete="CASCADE"))
    trial: Mapped[int]
    attempt: Mapped[int]
    kind: Mapped[str] = mapped_column(String(64))
    data: Mapped[Any] = mapped_column(JSON)
    at: Mapped[datetime]
