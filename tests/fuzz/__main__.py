"""`python -m tests.fuzz`: see the package. Exit 1 if anything was found."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from tests.conftest import TINY
from tests.fuzz.harness import Found, cases, fuzz
from tests.launch import launch


def main() -> None:
    """Parse the arguments, run, report each kind of finding once."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Malformed inputs of every kind.")
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="apart by commas; default: all")
    parser.add_argument("--run", type=Path, help="a finished run of tests/configs/tiny.yaml; default: make one")
    parser.add_argument("--case", help="KIND:SEED:NUMBER, one case again, with its traceback")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wanted = given.case.split(":")[:1] if given.case else given.kinds.split(",") if given.kinds else None
        run = given.run
        if run is None and (wanted is None or "run" in wanted):
            launch("pipeline", "run", str(TINY), f"runs={folder}")
            run = Path(folder) / "tiny"
        kinds = {name: case for name, case in cases(run).items() if wanted is None or name in wanted}
        if given.case:
            next(iter(kinds.values()))(Path(tempfile.mkdtemp()), Random(given.case))
            return
        started, counts, first = time.monotonic(), Counter[tuple[str, str]](), dict[tuple[str, str], Found]()
        for number, found in enumerate(fuzz(kinds, given.seed, range(given.count)), 1):
            if found:
                which = (found.case.partition(":")[0], found.where or found.what[:60])
                counts[which] += 1
                if first.setdefault(which, found) is found:
                    print(f"{found.case}: {found.where}: {found.what}", flush=True)
            if number % 500 == 0:
                print(f"{number} cases, {counts.total()} findings, {time.monotonic() - started:.0f} s", flush=True)
    for which, count in counts.most_common():
        print(f"{count:5d} × {' '.join(which)}: first {first[which].case}")
    print(f"{given.count} cases of {len(kinds)} kinds, {counts.total()} findings of {len(counts)} kinds")
    sys.exit(bool(counts))


if __name__ == "__main__":
    main()
