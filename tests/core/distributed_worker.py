"""A process of tests/core/test_distributed.py: joins the others and does what its arguments say."""

from __future__ import annotations

import sys
import time

import psutil
import torch
import torch.distributed as dist

from pipeline.core import distributed, rendezvous
from pipeline.core.errors import UserError


def main() -> None:
    action, *arguments = sys.argv[1:]
    if action == "wait":
        rendezvous.MEETING_S = 3.0
    try:
        distributed.init()
        if action == "listen":
            dist.barrier()
            for found in psutil.Process().net_connections("inet"):
                print(found.status, found.laddr.ip, flush=True)
            print("sum", float(distributed.sum_tensor(torch.ones(1))), flush=True)
        elif action == "late":
            distributed.set_collective_timeout(1.0)
            if distributed.rank() == 1:
                time.sleep(3)
            distributed.barrier()
            print("met", distributed.broadcast_object("all"), flush=True)
            if distributed.rank() == 1:
                time.sleep(3)
            try:
                distributed.sum_tensor(torch.ones(1))
            except RuntimeError as error:
                print("gave up:", str(error).splitlines()[0], flush=True)
                distributed.leave(1)
        elif action == "fail":
            text = arguments[distributed.rank()]
            if text:
                raise UserError(text)
            distributed.barrier()
    except UserError as error:
        if distributed.tells(str(error)):
            print(f"error: {error}", flush=True)
        distributed.leave(2)
    distributed.leave(0)


if __name__ == "__main__":
    main()
