"""The engine process: `python -m tfserve.engine.core.process FD`, started by ProcessClient only.

FD is one end of a socket pair. The first frame is the EngineConfig, the answer is Ready or Failed; then ToCore frames
come in and StepOutputs go out. When the other end closes, this process ends at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

import msgspec

from tfserve.config import EngineConfig
from tfserve.engine.core.loop import EngineCore, Inbox
from tfserve.errors import ConfigError, TfserveError
from tfserve.heap import freeze_heap, trim_heap
from tfserve.logs import log_to_stderr
from tfserve.messages import Failed, Ready, ToCore, ToFront


def main(fd: int) -> int:
    """Run the core until the front says Shutdown (returns 0) or something fails (returns 1)."""
    # Ctrl-C, a closed terminal and a supervisor's SIGTERM reach the whole process group. The front decides when this
    # process ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    trim_heap()
    conn = Connection(fd)
    config = msgspec.msgpack.decode(conn.recv_bytes(), type=EngineConfig)
    log_to_stderr(config.log_level, config.log_format, "engine")
    inbox_ready: threading.Event = threading.Event()
    box: list[Inbox] = []
    # Listen before the model is loaded: if the front dies during the load, this process ends too.
    threading.Thread(target=_listen, args=(conn, inbox_ready, box), name="tfserve-inbox", daemon=True).start()
    core: EngineCore | None = None
    try:
        from tfserve.engine.core.build import build_core

        core, info = build_core(config, lambda outputs: _send(conn, outputs))
        freeze_heap()
        box.append(core.inbox)
        inbox_ready.set()
        _send(conn, Ready(info))
        core.run()
    except ConfigError as error:
        return _fail(conn, Failed(str(error).removeprefix(f"{error.key}: "), error.key, error.exit_code))
    except TfserveError as error:
        return _fail(conn, Failed(str(error), None, error.exit_code))
    except BaseException as error:  # also a Rust library's panic: the front must learn why this process ends
        logging.getLogger(__name__).exception("the engine process failed")
        return _fail(conn, Failed(f"{type(error).__name__}: {error}"))
    finally:
        if core is not None:
            core.close()
    return 0


def _send(conn: Connection, message: ToFront) -> None:
    try:
        conn.send_bytes(msgspec.msgpack.encode(message))
    except OSError:
        os._exit(1)


def _fail(conn: Connection, failed: Failed) -> int:
    _send(conn, msgspec.structs.replace(failed, message=failed.message.encode(errors="replace").decode()))
    return 1


def _listen(conn: Connection, inbox_ready: threading.Event, box: list[Inbox]) -> None:
    decoder = msgspec.msgpack.Decoder(ToCore)
    try:
        while True:
            message = decoder.decode(conn.recv_bytes())
            inbox_ready.wait()
            box[0].put(message)
    except (EOFError, OSError):
        # The front is gone, so no request can be answered: end at once.
        os._exit(1)
    except BaseException:
        # Without its inbox the engine cannot work: it must end visibly.
        logging.getLogger(__name__).exception("the inbox failed")
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
