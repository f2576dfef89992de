"""`smalti serve` that waits for a body for 0.2 s: `python -m tests.serving.impatient serve RUN`."""

from __future__ import annotations

from functools import partial

from pipeline.cli.main import main
from pipeline.serving import server

if __name__ == "__main__":
    server.Guard = partial(server.Guard, body_timeout_s=0.2)  # type: ignore[misc,assignment]
    main()
