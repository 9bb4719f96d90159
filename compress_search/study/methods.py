"""What a study writes for its methods: their names and the values that narrow their spaces.

Owns the form only; whether there is such a method or dimension is found when the study meets its plugins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from compress_search.study.complaints import Fault, show, unknown

if TYPE_CHECKING:
    from compress_search.space import Narrowing


def parse_methods(items: Any) -> Mapping[str, Mapping[str, Narrowing]] | Literal["all"]:
    """Methods by name with what narrows their dimensions; ``{}`` where nothing does.

    Raises:
        ValueError: it is neither ``all``, a list of names nor a mapping of names to mappings, or a value cannot
            narrow anything, whatever the method.
    """
    if items == "all":
        return "all"
    if not isinstance(items, list | dict) or not items:
        raise ValueError(f"expected all, a list of methods or a mapping of methods to values, got {show(items)}")
    if isinstance(items, dict):
        return {name: _narrowings(name, values) for name, values in items.items()}
    for number, name in enumerate(items):
        if not isinstance(name, str):
            raise Fault(number, f"expected the name of a method, got {show(name)}")
        if name in items[:number]:
            raise Fault(number, f"{name} is named twice")
    return {name: {} for name in items}


def _narrowings(method: str, values: Any) -> dict[str, Narrowing]:
    if not isinstance(values, dict | None):
        raise Fault(method, f"expected a mapping of dimensions to values, got {show(values)}")
    for name, value in (values or {}).items():
        if fault := _narrowing_fault(name, value):
            raise Fault(f"{method}.{name}", fault)
    return dict(values or {})


def _narrowing_fault(name: str, value: Any) -> str | None:
    """What is wrong with what a study wrote for one dimension, as far as can be told without the method."""
    if name == "use":
        return None if isinstance(value, bool) else f"expected true or false, got {show(value)}"
    if isinstance(value, dict):
        return _range_fault(value)
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, bool | int | float | str) or (isinstance(item, float) and not math.isfinite(item)):
            hint = "; mappings in a list are written as text, after |" if isinstance(item, dict) else ""
            return f"expected a value, a list of values or {{low: …, high: …}}, got {show(value)}{hint}"
    return "expected at least one value, got []" if value == [] else None


def _range_fault(bounds: dict[str, Any]) -> str | None:
    for name, bound in bounds.items():
        if name not in ("low", "high"):
            return unknown(f"key {name} in a range", name, ("low", "high"))
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
            return f"expected a finite number for {name}, got {show(bound)}"
    if len(bounds) != 2:
        return f"a range has both low and high, got {show(bounds)}"
    low, high = bounds["low"], bounds["high"]
    return f"the range is empty: low {low:g} is above high {high:g}" if low > high else None
