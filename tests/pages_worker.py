"""Runs commands of `smalti` one after the other in this process: `python -m tests.pages_worker '[["runs"], …]'`."""

from __future__ import annotations

import json
import sys

import click

from pipeline.cli.main import cli


def main() -> None:
    for words in json.loads(sys.argv[1]):
        try:
            cli.main(words, prog_name="smalti", standalone_mode=False)
        except (Exception, click.exceptions.Exit, SystemExit) as error:
            code = getattr(error, "code", getattr(error, "exit_code", error))
            if code:
                print(f"FAILED smalti {' '.join(words)}: {code!r}", flush=True)


if __name__ == "__main__":
    main()
