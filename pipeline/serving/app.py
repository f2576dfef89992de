"""The addresses of the server: OpenAI's images API, health, metrics, and the page.

Shape of requests and answers: https://platform.openai.com/docs/api-reference/images
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.core.errors import UserError
from pipeline.core.version import VERSION
from pipeline.sampling.image_prompt import ImagePrompt
from pipeline.sampling.pipeline import Pipeline
from pipeline.serving.answers import Answers, Files, base64_of, error_event
from pipeline.serving.asked import Asked, AskedOfImage, invalid
from pipeline.serving.counts import CONTENT_TYPE, Counts
from pipeline.serving.engine import Engine
from pipeline.serving.nearest import NearestImages
from pipeline.serving.order import Event, Failed, Finished, Order, Partial
from pipeline.serving.refusal import ErrorBody, Refusal
from pipeline.serving.uploads import mask_of, upload

_PAGE = Path(__file__).parent / "page"
_CSP = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_NEIGHBOURS = 4
_UPLOAD = {"type": "string", "format": "binary"}


@dataclass(frozen=True)
class Served:
    """A model with what serves it."""

    name: str
    pipeline: Pipeline
    engine: Engine
    counts: Counts
    timeout_s: float
    started: int  # seconds since the epoch
    nearest: NearestImages | None = None  # None: the run does not say what it was trained with


def build_app(served: Served) -> FastAPI:
    """The application; `Guard` belongs around it."""
    app = FastAPI(
        title="Smalti",
        version=VERSION,
        description=f"Images by {served.name}.",
        docs_url=None,
        redoc_url=None,
        responses={
            "4XX": {"description": "What was expected, and found, in one line", "model": ErrorBody},
            "5XX": {"description": "It was too busy, failed, or was asked to stop", "model": ErrorBody},
        },
    )
    _add_errors(app)
    _add_images(app, served)
    _add_nearest(app, served)
    _add_state(app, served)
    _add_page(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")[:100]
        return await refused(
            request, Refusal(400, f"{where or 'body'}: {first['msg']}", "invalid_value", where or None)
        )

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        answer = await refused(request, Refusal(error.status_code, error.detail, "invalid_request"))
        answer.headers.update(error.headers or {})
        return answer


def _add_images(app: FastAPI, served: Served) -> None:
    files, engine = Files(), served.engine

    @app.post("/v1/images/generations")
    async def generations(asked: Asked, request: Request) -> Response:
        """Generate images of a prompt."""
        sampling = asked.sampling_for(served.pipeline, served.name, engine.slots)
        return await _answer(served, files, request, asked, sampling, None, {}, "image_generation")

    @app.post("/v1/images/edits", openapi_extra={"requestBody": _edit_body()})
    async def edits(request: Request) -> Response:
        """Generate a part of an image anew: where the mask is transparent (or white), or what our rules leave."""
        async with request.form(max_files=2, max_fields=40) as form:
            images = [value for name in ("image", "image[]") for value in form.getlist(name)]
            mask = form.get("mask")
            fields = {name: value for name, value in form.items() if name not in ("image", "image[]", "mask")}
            try:
                asked = AskedOfImage.model_validate(fields)
            except ValidationError as error:
                raise invalid(error) from error
            if len(images) != 1 or not isinstance(images[0], UploadFile):
                raise Refusal(400, f"image: expected one file, found {len(images)}", "invalid_value", "image")
            if mask is not None and not isinstance(mask, UploadFile):
                raise Refusal(400, "mask: expected a file", "invalid_value", "mask")
            content = await images[0].read(), await mask.read() if mask is not None else None
        sampling = asked.sampling_for(served.pipeline, served.name, engine.slots)
        known, rule = await asyncio.to_thread(_known, served, asked, *content)
        return await _answer(served, files, request, asked, sampling, known, rule, "image_edit")

    @app.get("/v1/images/files/{name}")
    async def file(name: str) -> Response:
        """An image that was answered as its address."""
        png = files.get(name)
        if png is None:
            raise Refusal(404, "expected an image of this name, found none: old ones are forgotten", "not_found")
        return Response(png, media_type="image/png")


def _add_nearest(app: FastAPI, served: Served) -> None:
    schema = {"type": "object", "properties": {"image": _UPLOAD}, "required": ["image"]}
    body = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}

    @app.post("/v1/images/nearest", openapi_extra=body)
    async def nearest(request: Request) -> Response:
        """The training images that look most like an image, nearest first, where the run has them."""
        if served.nearest is None:
            raise Refusal(404, "expected a run that was evaluated, found none here", "not_found")
        async with request.form(max_files=1, max_fields=1) as form:
            image = form.get("image")
            if not isinstance(image, UploadFile):
                raise Refusal(400, "image: expected a file", "invalid_value", "image")
            content = await image.read()
        asked = upload(content, "image", served.pipeline.image_tokenizer.image_size)
        found = await asyncio.to_thread(served.nearest, asked, _NEIGHBOURS)
        data = [{"caption": one.caption, "distance": one.distance, "b64_json": base64_of(one.png)} for one in found]
        return JSONResponse({"data": data})


def _edit_body() -> dict[str, object]:
    schema = AskedOfImage.model_json_schema()
    schema["properties"] |= {"image": _UPLOAD, "mask": _UPLOAD}
    schema["required"] = [*schema["required"], "image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _known(served: Served, asked: AskedOfImage, image: bytes, mask: bytes | None) -> tuple[Tensor, dict[str, str]]:
    """The codes that stay, and the rule that says so. Raises Refusal."""
    size = served.pipeline.image_tokenizer.image_size
    rules = {"keep_rows": asked.keep_rows, "keep_levels": asked.keep_levels, "mask": "mask" if mask else None}
    try:
        prompt = ImagePrompt(
            upload(image, "image", size),
            asked.keep_rows,
            asked.keep_levels,
            None if mask is None else mask_of(mask, size),
        )
        known = served.engine.finisher.known_codes(prompt).result()
    except UserError as error:
        raise Refusal(400, str(error), "invalid_value") from error
    return known, {"image": "image"} | {name: str(value) for name, value in rules.items() if value is not None}


async def _answer(
    served: Served,
    files: Files,
    request: Request,
    asked: Asked,
    sampling: SamplingConfig,
    known: Tensor | None,
    image_prompt: dict[str, str],
    kind: str,
) -> Response:
    """Submit it, and wait for it or stream it."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
    prompt = asked.checked_prompt()

    def emit(event: Event) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(events.put_nowait, event)

    order = Order(
        prompt,
        served.pipeline.text_tokenizer.encode([prompt])[0],
        asked.n,
        asked.chosen_seed(),
        sampling,
        emit,
        time.monotonic() + served.timeout_s,
        known=known,
        partial_images=asked.partial_images if asked.stream else 0,
        ranked=asked.rank,
        image_prompt=image_prompt,
    )
    as_url = asked.response_format == "url"
    answers = Answers(served.pipeline, order, files, str(request.base_url), as_url, asked.codes)
    served.engine.submit(order)
    happening = _until_done(order, events, request)
    if asked.stream:
        headers = {"cache-control": "no-store"}
        lines = _lines(served, answers, happening, kind)
        return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
    async for event in happening:
        if isinstance(event, Failed):
            raise event.refusal
        if isinstance(event, Finished):
            served.counts.generated(len(event.images))
            return JSONResponse(answers.whole(event))
    return Response(status_code=499)  # the client is gone


async def _lines(served: Served, answers: Answers, happening: AsyncIterator[Event], kind: str) -> AsyncIterator[str]:
    async for event in happening:
        if isinstance(event, Failed):
            yield error_event(event.refusal.body)
        elif isinstance(event, Partial):
            yield answers.partial(event, kind)
        else:
            served.counts.generated(len(event.images))
            yield answers.completed(event, kind)


async def _until_done(order: Order, events: asyncio.Queue[Event | None], request: Request) -> AsyncIterator[Event]:
    """What happens to an order, to its end or to that of its client, which is None among the events."""

    async def gone() -> None:
        try:
            while (await request.receive())["type"] != "http.disconnect":
                pass
        finally:
            events.put_nowait(None)

    leaving = asyncio.create_task(gone())
    try:
        while (event := await events.get()) is not None:
            yield event
            if not isinstance(event, Partial):
                return
    finally:
        order.cancel()  # has no effect on what is finished
        leaving.cancel()


def _add_state(app: FastAPI, served: Served) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        """The one model, with what our own fields may be."""
        return {"object": "list", "data": [_model(served)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, object]:
        if name != served.name:
            raise Refusal(404, f"model: expected {served.name}, the one that is served here", "model_not_found")
        return _model(served)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """It takes requests."""
        if served.engine.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(served.counts.exposition(), media_type=CONTENT_TYPE)


def _model(served: Served) -> dict[str, object]:
    pipeline, transformer = served.pipeline, served.pipeline.transformer
    own = {
        "image_size": pipeline.image_tokenizer.image_size,
        "levels": [level._asdict() for level in transformer.layout.levels],
        "order": transformer.order,
        "sampling": pipeline.told(pipeline.source.sampling).model_dump(mode="json"),
        "guidance_trained": pipeline.source.guidance_trained,
        "reranker": pipeline.ranker is not None,
        "nearest": served.nearest is not None,
        "slots": served.engine.slots,
        "model_hash": pipeline.source.model_hash,
        "training_step": pipeline.source.step,  # null: the finished transformer
    }
    common = {"id": served.name, "object": "model", "created": served.started, "owned_by": "smalti"}
    return common | {"smalti": own}


def _add_page(app: FastAPI) -> None:
    def serve(path: str, name: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            headers = {"content-security-policy": _CSP, "cache-control": "no-cache"}
            return FileResponse(_PAGE / name, headers=headers)

    for path, name in (("/", "index.html"), ("/app.js", "app.js"), ("/style.css", "style.css")):
        serve(path, name)
