"""Why a request gets no images: a status of HTTP and a message in OpenAI's shape, which names no path."""

from __future__ import annotations

import math

from pydantic import BaseModel


class ErrorFacts(BaseModel):
    """Of an error, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None  # the field that is wrong
    code: str


class ErrorBody(BaseModel):
    """The answer to a request that gets no images."""

    error: ErrorFacts


class Refusal(Exception):
    """The request is answered with `status` and `message`."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, object]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        facts = ErrorFacts(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorBody(error=facts).model_dump()

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(max(math.ceil(self.retry_after_s), 1))}


def busy(retry_after_s: float) -> Refusal:
    """The queue is full."""
    message = "expected a free place in the queue, found it full: try again later"
    return Refusal(429, message, "rate_limit_exceeded", retry_after_s=retry_after_s)


def stopping() -> Refusal:
    """The server ends."""
    message = "the server ends and takes nothing new: try another one, or later"
    return Refusal(503, message, "stopping", retry_after_s=10)


def too_slow(timeout_s: float) -> Refusal:
    """It was not done in time."""
    message = f"expected to be done within {timeout_s:g} s, found the server busy: ask for fewer images, or later"
    return Refusal(503, message, "timeout", retry_after_s=timeout_s)


def broken() -> Refusal:
    """A mistake of the server's own; the log says which."""
    return Refusal(500, "the server made a mistake, its log says which one", "internal_error")
