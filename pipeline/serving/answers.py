"""What a client gets: the JSON of OpenAI's images API, and the events of its streams; PNGs behind addresses."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections import OrderedDict

from pipeline.sampling.pipeline import Pipeline
from pipeline.serving.order import Finished, Made, Order, Partial
from pipeline.text_tokenizer.bpe import PAD_ID

_KEPT_FILES = 256  # images that are answered as addresses; older ones are forgotten


class Files:
    """PNGs behind names that nobody guesses, for `response_format` url; in memory, the newest of them."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, bytes] = OrderedDict()

    def add(self, png: bytes) -> str:
        name = secrets.token_urlsafe(24)
        self._files[name] = png
        while len(self._files) > _KEPT_FILES:
            self._files.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        return self._files.get(name)


class Answers:
    """Of one order."""

    def __init__(
        self, pipeline: Pipeline, order: Order, files: Files, base_url: str, as_url: bool, codes: bool
    ) -> None:
        """`base_url`: of the server, as its client calls it; `codes`: they are answered, too."""
        self._order, self._files, self._base_url = order, files, base_url
        self._as_url, self._codes = as_url, codes
        self._levels = [level.positions for level in pipeline.transformer.layout.levels]
        self._size = f"{pipeline.image_tokenizer.width}x{pipeline.image_tokenizer.height}"
        self._created = int(time.time())
        self._text_tokens = int((order.text != PAD_ID).sum())

    def whole(self, finished: Finished) -> dict[str, object]:
        """Without a stream."""
        common = {"background": "opaque", "output_format": "png", "size": self._size, "created": self._created}
        data = [self._image(made) | self._facts(made) for made in finished.images]
        return common | {"data": data, "usage": self._usage(len(data))}

    def partial(self, event: Partial, kind: str) -> str:
        """An event of a stream; `kind`: image_generation or image_edit."""
        values = {"b64_json": base64_of(event.png), "partial_image_index": event.index, "candidate": event.candidate}
        return _event(f"{kind}.partial_image", self._common | values)

    def completed(self, finished: Finished, kind: str) -> str:
        """The last events of a stream, one an image."""
        events = []
        for made in finished.images:
            values = {"b64_json": base64_of(made.png), "usage": self._usage(1)} | self._facts(made)
            events.append(_event(f"{kind}.completed", self._common | values))
        return "".join(events)

    @property
    def _common(self) -> dict[str, object]:
        common = {"created_at": self._created, "size": self._size, "quality": "auto"}
        return common | {"background": "auto", "output_format": "png"}

    def _image(self, made: Made) -> dict[str, object]:
        if self._as_url:
            return {"url": f"{self._base_url}v1/images/files/{self._files.add(made.png)}"}
        return {"b64_json": base64_of(made.png)}

    def _facts(self, made: Made) -> dict[str, object]:
        facts: dict[str, object] = {"seed": self._order.seed, "candidate": made.candidate}
        if made.score is not None:
            facts["score"] = made.score
        if self._codes:
            codes = iter(made.codes)
            facts["codes"] = [[next(codes) for _ in range(positions)] for positions in self._levels]
        return facts

    def _usage(self, images: int) -> dict[str, object]:
        """In tokens: of the prompt, and of codes."""
        drawn = images * sum(self._levels)
        known = 0 if self._order.known is None else int((self._order.known >= 0).sum())
        details = {"text_tokens": self._text_tokens, "image_tokens": known}
        read = self._text_tokens + known
        return {
            "input_tokens": read,
            "input_tokens_details": details,
            "output_tokens": drawn,
            "total_tokens": read + drawn,
        }


def error_event(body: dict[str, object]) -> str:
    """An error within a stream."""
    return _event("error", body)


def _event(kind: str, values: dict[str, object]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | values)}\n\n"


def base64_of(png: bytes) -> str:
    """As JSON carries it."""
    return base64.b64encode(png).decode()
