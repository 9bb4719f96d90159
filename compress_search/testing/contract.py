"""The plugin contract: what every method must keep, ours or a stranger's, as named checks.

A check is a function of a :class:`Rehearsal`, the method with tiny models to try it on; it raises
:class:`ContractBroken` with one line that says what was found and what was expected. Owns the list of checks.
Knows no method by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from compress_search.method import Method
from compress_search.testing.checks import CHECKS, Check
from compress_search.testing.rehearsal import ContractBroken, Rehearsal


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check; ``expected`` is the author's reason why the method need not pass it."""

    name: str
    passed: bool
    message: str = ""
    expected: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether all is as it should be: passed, or failed as the author said it would."""
        return self.passed == (self.expected is None)


def checks(method: Method) -> Iterator[tuple[str, Callable[[], None]]]:
    """The contract for one method: names, and functions that raise ContractBroken."""
    rehearsal = Rehearsal(method)
    for name, check in CHECKS.items():
        yield name, partial(_on_one_thread, check, rehearsal)


def _on_one_thread(check: Check, rehearsal: Rehearsal) -> None:
    """Run a check; tiny matrices lose far more by waiting for other threads than they gain by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check(rehearsal)
    finally:
        torch.set_num_threads(threads)


def check_method(method: Method, expected_failures: Mapping[str, str] | None = None) -> list[CheckResult]:
    """Run the whole contract; whatever a check raises is its failure.

    Args:
        method: an instance, as the registry hands it out.
        expected_failures: check name -> reason; such a check must fail, so that no exception outlives its cause.

    Raises:
        ValueError: a name that is no check.
    """
    reasons = dict(expected_failures or {})
    if unknown := sorted(set(reasons) - set(CHECKS)):
        raise ValueError(f"no such check: {', '.join(unknown)}; there are: {', '.join(CHECKS)}")
    return [_result(name, check, reasons.get(name)) for name, check in checks(method)]


def _result(name: str, check: Callable[[], None], expected: str | None) -> CheckResult:
    started, message = time.perf_counter(), ""
    try:
        check()
    except ContractBroken as broken:
        message = str(broken)
    except Exception as error:  # a stranger's method may raise anything
        message = f"{type(error).__name__}: {error}"
    passed = not message
    if passed and expected:
        message = f"passes, though it was expected to fail: {expected}"
    return CheckResult(name, passed, message, expected, time.perf_counter() - started)


class MethodContract:
    """The contract as a pytest class; subclass it with the method in place.

    ::

        class TestMine(MethodContract):
            method = Mine()
    """

    method: ClassVar[Method]
    expected_failures: ClassVar[Mapping[str, str]] = {}
    """Check name -> the reason why this method need not pass it; it must then fail."""

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """One test for each check."""
        if "contract_check" in metafunc.fixturenames:
            metafunc.parametrize(("contract_check", "expected"), cls._cases(), ids=list(CHECKS))

    @classmethod
    def _cases(cls) -> list[tuple[Any, str | None]]:
        return [
            (partial(_result, name, check), cls.expected_failures.get(name)) for name, check in checks(cls.method)
        ]

    def test_contract(self, contract_check: Callable[[str | None], CheckResult], expected: str | None) -> None:
        """The check passes, or fails as expected."""
        result = contract_check(expected)
        if not result.ok:
            raise ContractBroken(result.message)
