"""The start of `smalti` and `python -m pipeline`: quiet when Ctrl-C comes while Python is still importing."""

import os
import signal


def main() -> None:
    """The command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process without a traceback; main() takes it over
    os.environ["PYTHONSAFEPATH"] = "1"  # no process that comes of this one imports what lies in the current folder
    from pipeline.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
