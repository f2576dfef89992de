"""Run by tests/training/test_environment.py: one training on accelerate's engine; prints its weights and norms."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from tests.training.engine_worker import Case, run


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run(Case(kind="accelerate", zero=0, accumulation=2), Path(folder))
    weights = b"".join(weight.numpy().tobytes() for weight in found["weights"].values())
    print("weights", hashlib.sha256(weights).hexdigest(), found["norms"])


if __name__ == "__main__":
    main()
