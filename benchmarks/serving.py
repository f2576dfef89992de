"""The bars of `smalti serve`, in one run on this machine: the server beside `Pipeline.generate` in this process.

    python -m benchmarks.serving runs/openmoji --seconds 60

- 16 clients at once: no answer but 200 and 429, every image the bytes of the same request alone, memory after 10 s;
- 8 clients beside a batch of 8 offline, and beside one request after the other; a lone request beside one offline;
- 1,000 malformed requests: no 5xx;
- what a browser asks for at first: milliseconds and bytes.

Ratios are of medians over turns that take each other's place; the load of the machine stands beside them.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import click
import psutil

from pipeline.sampling.pipeline import Pipeline
from pipeline.sampling.save import png_file

PROMPTS = ("red heart", "blue cat", "flag of Japan", "smiling face", "a green tree", "house", "sun", "car")
_PATH = "v1/images/generations"


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--seconds", default=60.0, show_default=True, help="of 16 clients")
@click.option("--turns", default=5, show_default=True, help="of each comparison")
def main(run: Path, seconds: float, turns: int) -> None:
    with serving(run) as (server, process):
        click.echo(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        first_view(server)
        many_clients(server, process, seconds)
        beside_offline(server, process, run, turns)
        malformed(server, 1000)


@contextmanager
def serving(run: Path) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "pipeline", "serve", str(run), "--port", "0", "--waiting", "64"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    try:
        address = next(found[1] for line in started.stderr if (found := re.search(r"open (http://\S+/)", line)))
        yield address, psutil.Process(started.pid)
    finally:
        started.terminate()
        click.echo(f"the server ended with {started.wait()} after SIGTERM")


def ask(server: str, body: object) -> tuple[int, list[str]]:
    """Status, and the images in base64."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server + _PATH, content, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, [one["b64_json"] for one in json.load(answer)["data"]]
    except urllib.error.HTTPError as error:
        return error.code, []


def first_view(server: str) -> None:
    """The page, what it names, and what its script asks for, each on a connection of its own."""
    begin, sizes = time.perf_counter(), []
    for path in ("", "style.css", "app.js", "v1/models"):
        with urllib.request.urlopen(server + path, timeout=60) as answer:
            sizes.append(len(answer.read()))
    ms = 1000 * (time.perf_counter() - begin)
    click.echo(f"first view: {ms:.0f} ms (bar 1000), {sum(sizes) / 1000:.1f} kB (bar 200)")


def many_clients(server: str, process: psutil.Process, seconds: float) -> None:
    asked = [{"prompt": prompt, "seed": seed} for prompt in PROMPTS for seed in (0, 1)]
    alone = [ask(server, one) for one in asked]
    statuses: Counter[int] = Counter()
    different, memory, end = 0, [], time.monotonic() + seconds

    def client(number: int) -> None:
        nonlocal different
        for turn in count(number):
            if time.monotonic() > end:
                return
            status, images = ask(server, asked[turn % len(asked)])
            statuses[status] += 1
            different += status == 200 and images != alone[turn % len(asked)][1]

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(client, number) for number in range(16)]
        while not all(one.done() for one in clients):
            memory.append(process.memory_info().rss / 1e6)
            time.sleep(1)
    settled = memory[min(10, len(memory) - 1) :]
    click.echo(f"16 clients, {seconds:g} s: statuses {dict(statuses)}, {different} images unlike the one alone")
    click.echo(
        f"memory after 10 s: {min(settled):.0f} to {max(settled):.0f} MB ({max(settled) / min(settled) - 1:.1%})"
    )


def beside_offline(server: str, process: psutil.Process, run: Path, turns: int) -> None:
    """In seconds, and in those of a processor: the server's, or this process's, which other work disturbs less."""
    pipeline = Pipeline.from_pretrained(run)

    def offline(prompts: Sequence[str]) -> None:
        """What `smalti generate` does once its models are loaded: the run's own settings, and a PNG each."""
        for one in pipeline.generate(prompts, seed=1, sampling=pipeline.source.sampling):
            png_file(one.image, {"prompt": prompts[one.prompt], "seed": 1})

    ways: dict[str, Callable[[], object]] = {
        "8 clients": lambda: _at_once(server),
        "offline, batch of 8": lambda: offline(PROMPTS),
        "8 one after the other": lambda: [ask(server, {"prompt": prompt, "seed": 1}) for prompt in PROMPTS],
        "one client": lambda: ask(server, {"prompt": PROMPTS[0], "seed": 1}),
        "offline, one": lambda: offline(PROMPTS[:1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    of_cpu = dict.fromkeys(ways, 0.0)
    for turn in range(turns + 1):
        for name, way in ways.items():
            used = time.process_time if name.startswith("offline") else lambda: sum(process.cpu_times()[:2])
            begin, before = time.perf_counter(), used()
            way()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
                of_cpu[name] += (used() - before) / turns
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, value in median.items():
        click.echo(f"{name:24}{value:8.2f} s, {of_cpu[name]:8.3f} of CPU time")
    ratio = median["offline, batch of 8"] / median["8 clients"]
    click.echo(f"8 clients: {ratio:.2f} x the offline batch (bar 0.9)")
    click.echo(f"8 clients: {median['8 one after the other'] / median['8 clients']:.2f} x one after the other (bar 3)")
    click.echo(f"a lone request: {median['one client'] / median['offline, one']:.2f} x offline (bar 1.1)")
    ratio = of_cpu["offline, batch of 8"] / of_cpu["8 clients"]
    lone = of_cpu["one client"] / of_cpu["offline, one"]
    click.echo(f"in CPU time: 8 clients {ratio:.2f} x the offline batch, a lone request {lone:.2f} x offline")


def _at_once(server: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: ask(server, {"prompt": prompt, "seed": 1}), PROMPTS))


def malformed(server: str, requests: int) -> None:
    """Damaged bytes and values of any kind in any field."""
    chance = random.Random(0)
    fields = [
        "prompt",
        "n",
        "size",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "guidance",
        "stream",
        "response_format",
        "codes",
        "other",
    ]
    values: list[object] = [
        None,
        True,
        -1,
        0,
        2**70,
        1e308,
        float("nan"),
        "",
        "\ud800",
        "x" * 5000,
        [],
        {},
        [[]],
        "1e9",
    ]
    statuses: Counter[int] = Counter()
    for _ in range(requests):
        body = {"prompt": "red heart"} | {name: chance.choice(values) for name in chance.sample(fields, 3)}
        content = bytearray(json.dumps(body).encode())
        if chance.random() < 0.3:
            for _ in range(3):
                content[chance.randrange(len(content))] = chance.randrange(256)
        statuses[ask(server, bytes(content))[0]] += 1
    click.echo(f"{requests} malformed requests: statuses {dict(statuses)}")


if __name__ == "__main__":
    main()
