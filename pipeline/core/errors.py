"""Errors that are the user's to fix, told in one line; and the signal that a stage was asked to stop."""

from pipeline.core.urls import mask


class UserError(Exception):
    """A mistake that the user can fix. The command line prints it as one line, without a traceback.

    The message says what was expected, what was found, where, and what to do. It is one line, in which
    passwords in URLs are masked.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(mask(" ".join(line.strip() for line in message.splitlines())))


class StoppedOnRequest(Exception):
    """The stage was asked to stop, has saved what it had, and wants to be run again."""
