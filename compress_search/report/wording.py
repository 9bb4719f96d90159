"""A report in words: the sentences, names and marks that the terminal's tables and the page share.

Knows nothing of terminals or markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from compress_search import formats
from compress_search.errors import CompressSearchError, NothingFeasible
from compress_search.recipe import Step
from compress_search.report import Aims, Entry, Report, candidates, violations
from compress_search.study import goals

CLOSEST = 3
"""How many recipes are named where none meets the constraints."""


def require_result(report: Report) -> None:
    """Stop with the exit code for it when a finished study has nothing to show.

    Raises:
        NothingFeasible: recipes completed or were rejected by their shapes, and none meets the constraints.
        CompressSearchError: no trial but the baselines completed.
    """
    if all(entry.baseline for entry in _measured(report)):
        raise CompressSearchError("no trial completed: see the failures above")
    if missed := shortfall(report):
        raise NothingFeasible(missed)


def shortfall(report: Report) -> str | None:
    """What comes closest to the constraints where no recipe meets them; None where one does, or none was measured.

    A recipe that shapes ruled out has no scores, so the complete ones go first.
    """
    measured = _measured(report)
    done = [entry for entry in measured if entry.state == "complete"]
    if not measured or not all(violations(entry.metrics, report) for entry in done):
        return None
    ranked = sorted(measured, key=lambda entry: (entry.state != "complete", sum(_missed(entry, report).values())))
    each = "; ".join(_distance(entry, report) for entry in ranked[:CLOSEST])
    but = " but the teacher" if report.front else ""
    return f"Nothing{but} meets the constraints; the closest: {each}."


def _measured(report: Report) -> list[Entry]:
    """What compresses and was measured: complete trials, baselines among them, and those their shapes ruled out."""
    rejected = [entry for entry in report.trials if entry.state == "infeasible"]
    return [entry for entry in [*candidates(report.trials, report), *rejected] if entry.recipe]


def _missed(entry: Entry, report: Report) -> dict[str, float]:
    """By how much each constraint is missed; what was not measured says nothing."""
    return {name: by for name, by in violations(entry.metrics, report).items() if name in entry.metrics}


def _distance(entry: Entry, report: Report) -> str:
    values = (
        f"{formats.number(name, entry.metrics[name], unit=True)} against {bounds(report, name)}"
        for name in _missed(entry, report)
    )
    return f"trial {entry.number}, {short(entry, report)}: {', '.join(values)}"


def headliners(report: Report) -> list[Entry]:
    """The trials a reader compares: the teacher, the baselines, then the rest of the front in its order."""
    complete = [entry for entry in report.trials if entry.state == "complete"]
    references = sorted((e for e in complete if e.baseline), key=lambda e: (bool(e.recipe), e.number))
    return references + [entry for entry in report.members if entry not in references]


def failures(report: Report) -> list[tuple[str, list[int]]]:
    """(reason, numbers) of the failed trials, most frequent first."""
    groups: dict[str, list[int]] = {}
    for entry in report.trials:
        if entry.state == "failed":
            groups.setdefault(entry.error or "unknown", []).append(entry.number)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[1]))


def counts(report: Report) -> dict[str, int]:
    """How many trials are in each state, baselines aside."""
    found: dict[str, int] = {}
    for entry in report.trials:
        if entry.baseline is None:
            found[entry.state] = found.get(entry.state, 0) + 1
    return found


def recommendation(report: Report) -> str:
    """The recommendation in one sentence, or why there is none."""
    if report.recommended is not None:
        chosen = report.trial(report.recommended)
        return f"Choose trial {chosen.number}: {', '.join(_gains(chosen, report)) or chosen.text}."
    if missed := shortfall(report):
        return missed
    return "Nothing on the front improves on the teacher." if _measured(report) else "Nothing has completed yet."


def _gains(entry: Entry, report: Report) -> list[str]:
    """What a trial gains and loses against the teacher, in words."""
    words, teacher = [], report.teacher
    speedup = entry.metrics.get("speedup")
    if speedup:
        words.append(f"{speedup:.1f}× faster" if speedup >= 1 else f"{1 / speedup:.1f}× slower")
    score = next((name for name, way in report.objectives.items() if way == "maximize" and name in teacher), None)
    if score in entry.metrics and formats.style(score).scale == 100:
        words.append(f"{formats.points(entry.metrics[score] - teacher[score])} {formats.style(score).label}")
        if lost := entry.intervals.get(f"{score}_drop"):
            low, high = (formats.points(-bound).split()[0] for bound in reversed(lost))
            words[-1] += f" (95 % CI {low} … {high})"
    if "size_mb" in entry.metrics and teacher.get("size_mb"):
        words.append(
            f"{formats.number('size_mb', entry.metrics['size_mb'])} MB instead of "
            f"{formats.number('size_mb', teacher['size_mb'])} MB"
        )
    return words


def run_on(report: Report) -> str:
    """Which kernels were real, what the front runs on, and whose arithmetic was only simulated; maybe nothing."""
    found = [f"Real kernels: {', '.join(report.kernels)}."] if report.kernels else []
    engines = Counter(entry.engine for entry in report.members if entry.engine)
    if engines:
        each = ", ".join(f"{engine} ({count})" for engine, count in sorted(engines.items()))
        found.append(f"The front runs on {each}.")
    simulated = [str(entry.number) for entry in report.trials if "simulated" in entry.marks]
    if simulated:
        found.append(f"Simulated, so that their times mean nothing: {', '.join(simulated)}.")
    return " ".join(found)


def key_metrics(report: Report) -> list[str]:
    """Objectives first, then latency, speed-up and size where they were measured, then what is constrained.

    A loss against the teacher is left out where its score is there: it is shown as that score's change.
    """
    measured = {name for entry in report.trials for name in entry.metrics}
    usual = [name for name in ("latency_ms", "speedup", "size_mb") if name in measured]
    wanted = dict.fromkeys([*report.objectives, *usual, *report.constraints])
    told = {f"{name}_drop" for name in wanted} - set(report.objectives)
    return [name for name in wanted if name not in told]


def change(entry: Entry, metric: str, teacher: Mapping[str, float]) -> str:
    """The change against the teacher: points for scores, percent for costs; empty where it says nothing."""
    value, base = entry.metrics.get(metric), teacher.get(metric)
    unit = formats.style(metric).unit
    if value is None or not base or not entry.recipe or unit in ("", "×", "points"):
        return ""
    if unit in ("%", "×100"):
        return formats.points(value - base).split()[0]
    return formats.percent(value / base)


def steps(entry: Entry, report: Report) -> list[str]:
    """The recipe's steps with those parameters that the study searched; with all where that is not known."""
    shown = []
    for step in entry.steps:
        params = {
            k: v for k, v in step.params.items() if not report.searched or f"{step.method}.{k}" in report.searched
        }
        shown.append(str(Step.of(step.method, params)).removesuffix("()"))
    return shown


def short(entry: Entry, report: Report) -> str:
    """The same on one line."""
    return " + ".join(steps(entry, report)) or "teacher"


def notes(entry: Entry) -> list[str]:
    """Marks of the measurement, and the trials that this one cannot be told apart from."""
    same = ", ".join(map(str, entry.alike))
    return [*entry.marks, *([f"cannot be told apart from {same}"] if same else [])]


def bounds(aims: Aims, metric: str) -> str:
    """A constraint's bounds in the metric's unit, for example ``≤ 3.0 points``."""
    limit = goals.parse_constraint(metric, aims.constraints[metric], aims.task)
    limits = [limit, *([limit.also] if limit.also else [])]
    return " and ".join(
        f"{'≤' if one.op == '<=' else '≥'} {formats.number(metric, one.bound, unit=True)}" for one in limits
    )
