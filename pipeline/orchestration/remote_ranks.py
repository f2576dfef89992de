"""The ranks of a training on one machine of several, at the other end of an ssh (`hosts.py`).

The first line of stdin is JSON: the command, and an environment for each process. A line `stop` asks them to save and
end, and so does the end of stdin: then the connection is gone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

from pipeline.orchestration.environment import RUNNER_VARIABLE
from pipeline.orchestration.side_by_side import DEAF_TO_CTRL_C, GRACE_S, ask_to_end, wait_for_all


def main() -> None:
    """Run the ranks to their end. Never returns; exits with the code of the first that failed."""
    task = json.loads(sys.stdin.readline())
    inherited = os.environ | {RUNNER_VARIABLE: str(os.getpid())}  # they end with this process
    children = [
        subprocess.Popen([*DEAF_TO_CTRL_C, *task["command"]], env=inherited | own, stdin=subprocess.DEVNULL)
        for own in task["environments"]
    ]
    threading.Thread(target=_obey, args=(children,), daemon=True).start()
    failed = wait_for_all(children, meet=True)
    sys.stdout.flush()
    os._exit(128 - failed if failed < 0 else failed)


def _obey(children: list[subprocess.Popen[bytes]]) -> None:
    for line in sys.stdin:
        if line.strip() == "stop":
            ask_to_end(children)
    ask_to_end(children)
    time.sleep(GRACE_S)
    for child in children:
        child.kill()


if __name__ == "__main__":
    main()
