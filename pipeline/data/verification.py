"""Checks that run in a thread, while their subject is in use already.

verification = Verification(checks)     # each raises UserError where something is wrong
verification.raise_fault()              # what was found by now
verification.result()                   # waits for all
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from pipeline.core.errors import UserError


class Verification:
    """Goes through `checks` until one of them raises UserError. The thread ends with the process."""

    def __init__(self, checks: Iterable[Callable[[], None]]) -> None:
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(checks,), name="verify", daemon=True)
        self._thread.start()

    def _run(self, checks: Iterable[Callable[[], None]]) -> None:
        try:
            for check in checks:
                check()
        except Exception as error:  # told to who asks
            self._fault = error

    def raise_fault(self) -> None:
        """Raises what a check raised, if one has by now; waits for nothing."""
        if self._fault is not None:
            raise self._fault

    def result(self) -> UserError | None:
        """Wait for all checks: the mistake that one found. Raises any other error."""
        self._thread.join()
        if self._fault is not None and not isinstance(self._fault, UserError):
            raise self._fault
        return self._fault
