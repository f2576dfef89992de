"""What the tests of the room ask a server, and how."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request

Answer = tuple[int, dict[str, object]]


def ask(
    server: str,
    values: object,
    path: str = "v1/images/generations",
    content_type: str = "application/json",
    **headers: str,
) -> Answer:
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    request = urllib.request.Request(server + path, body, {"content-type": content_type} | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def pngs(answer: Answer) -> list[bytes]:
    assert answer[0] == 200, answer
    data = answer[1]["data"]
    assert isinstance(data, list)
    return [base64.b64decode(one["b64_json"]) for one in data]


def multipart(**fields: bytes) -> bytes:
    parts = []
    for name, value in fields.items():
        file = '; filename="x.png"' if name in ("image", "mask") else ""
        parts.append(f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n")
    return b"".join(parts) + b"--b--\r\n"


def metric(server: str, name: str) -> float:
    lines = urllib.request.urlopen(server + "metrics").read().decode().splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))
