"""Every installed method, whoever wrote it, keeps the plugin contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compress_search.registry import Registry
from compress_search.testing import checks

REGISTRY = Registry()

EXPECTED_FAILURES: dict[tuple[str, str], str] = {}
"""(method, check) -> the reason why the method need not pass it."""


def _cases() -> list[object]:
    cases = []
    for method in REGISTRY:
        for name, check in checks(REGISTRY[method]):
            reason = EXPECTED_FAILURES.get((method, name))
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            cases.append(pytest.param(check, id=f"{method}-{name}", marks=marks))
    return cases


@pytest.mark.parametrize("check", _cases())
def test_contract(check: Callable[[], None]) -> None:
    check()
