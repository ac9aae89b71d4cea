"""Campaigns of injected faults, which count what was tried and what was borne."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MOST_SHOWN = 5


class Campaign:
    """The injections of one test.

    Attributes
    ----------
    kind
        What the table at the end of a run calls them.
    long
        Whether this is ``pytest -m faults``; a test does less where it is not.
    tried, failures
        How many there were, and what each failure said.
    """

    def __init__(self, kind: str, long: bool):
        self.kind, self.long = kind, long
        self.tried, self.failures = 0, list[str]()

    def attempt(self, what: Any, check: Callable[..., Any], *arguments: Any) -> None:
        """Count one injection, which ``check`` does and judges; it raises if the
        library did not bear it. The campaign goes on; it fails at its end."""
        self.tried += 1
        try:
            check(*arguments)
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")

    def close(self) -> None:
        if not self.tried:
            raise AssertionError(f"{self.kind}: nothing was tried")
        if self.failures:
            shown = "\n".join(self.failures[:MOST_SHOWN])
            raise AssertionError(
                f"{self.kind}: {len(self.failures)} of {self.tried} failed:\n{shown}"
            )
