"""What every request passes before the application sees it: host, origin, token, and a body that is bounded.

An ASGI application around another one. The body is read whole, within a bound of bytes and seconds, so that a slow or
endless client takes no place in the engine; what goes wrong behind it is logged, and answered without a traceback.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.core.loopback import LOOPBACK
from pipeline.serving.refusal import Refusal, broken

log = logging.getLogger(__name__)
LOCAL_NAMES = (LOOPBACK, "localhost", "::1")
_OPEN = ("/", "/app.js", "/style.css", "/health", "/ready")  # what nobody needs a token for: no images, no metrics
_READ_AND_DROPPED = 4  # times the limit: most clients read an answer only once they have sent all
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
Answered = Callable[[str, int, float], object]  # the route's path, status, seconds


class Guard:
    """Around `app`."""

    def __init__(
        self,
        app: ASGIApp,
        answered: Answered,
        token: str | None,
        only_local: bool,
        body_limit: int,
        body_timeout_s: float = 30.0,
    ) -> None:
        """`only_local`: the server listens to this machine alone, so other names in Host are a page's trick."""
        self._app, self._answered, self._token, self._only_local = app, answered, token, only_local
        self._body_limit, self._body_timeout_s = body_limit, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_SECURITY]
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replayed(body, receive), sent)
        except Refusal as refusal:
            await _answer(refusal, sent)
        except (_Gone, OSError):
            status = 499  # nobody is there to be answered
        except Exception:
            log.exception("a request failed")
            if not status:
                await _answer(broken(), sent)
        route = scope.get("route")
        self._answered(getattr(route, "path", "other"), status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self._only_local and _name(host) not in LOCAL_NAMES:
            message = "Host: expected this machine's loopback name: open the page as http://127.0.0.1:PORT"
            raise Refusal(403, message, "forbidden")
        origin = headers.get(b"origin")
        if origin is not None and _netloc(origin) != host:
            raise Refusal(403, "Origin: expected this server's own page, found another one", "forbidden")
        if self._token is None or scope["path"] in _OPEN or scope["path"].startswith("/v1/images/files/"):
            return
        given = headers.get(b"authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            raise Refusal(401, "Authorization: expected `Bearer` and the server's token", "invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        too_large = Refusal(413, f"body: expected at most {self._body_limit:,} bytes: send less", "too_large")
        for name, value in scope["headers"]:
            if (
                name.lower() == b"content-length"
                and value.isdigit()
                and int(value) > _READ_AND_DROPPED * self._body_limit
            ):
                raise too_large
        body, read = bytearray(), 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    read += len(message.get("body", b""))
                    if read <= self._body_limit:
                        body += message.get("body", b"")
                    ended = not message.get("more_body", False)
                    if read > _READ_AND_DROPPED * self._body_limit or (ended and read > self._body_limit):
                        raise too_large
                    if ended:
                        return bytes(body)
        except TimeoutError as error:
            message_ = f"body: expected all of it within {self._body_timeout_s:g} s"
            raise Refusal(408, message_, "timeout") from error


class _Gone(Exception):
    """The client is."""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, and after it what the client does."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(refusal: Refusal, send: Send) -> None:
    headers = {"content-type": "application/json", "connection": "close"} | refusal.headers
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": json.dumps(refusal.body).encode()})


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
