"""Stands in for tfserve.model.grammars.process: breaks down in the way that the grammar names."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection


def main(fd: int) -> None:
    conn = Connection(fd)
    conn.send_bytes(b"")
    while True:
        match conn.recv_bytes().decode().partition(":")[0]:
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "loop":
                signal.signal(signal.SIGPROF, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_PROF, 0.05)
                while True:
                    pass
            case "sleep":
                time.sleep(60)
            case "leave":
                sys.exit(0)
            case "bad":
                conn.send_bytes(b"no good")
            case _:
                conn.send_bytes(b"")


if __name__ == "__main__":
    main(int(sys.argv[1]))
