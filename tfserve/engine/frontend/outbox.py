"""Queue of messages to the engine process. Torch-free."""

from __future__ import annotations

import threading
from collections import deque
from multiprocessing.connection import Connection

from tfserve.errors import EngineDeadError, EngineStalledError

MAX_BYTES = 64 * 2**20
"""Bytes that may wait for an engine that does not read. A working engine leaves almost none waiting."""

_FRAME_BYTES = 256
"""Counted for each frame in addition to its bytes, so that small frames are limited too (to 250,000)."""


class Outbox:
    """Frames for a connection, written in order by a thread of this object. Only that thread waits for the reader.

    Call `put` from any thread.
    """

    def __init__(self, conn: Connection, max_bytes: int = MAX_BYTES) -> None:
        self._conn = conn
        self._max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
        self._num_bytes = 0
        self._is_over = False
        # Reentrant: the interpreter may finalize an Engine in any thread, which puts a last message.
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._write_all, name="tfserve-engine-writer", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """True while the limit is reached: the other end does not read."""
        return self._num_bytes >= self._max_bytes

    def put(self, frame: bytes) -> None:
        """Queue a frame, also beyond the limit. Raises EngineDeadError once the other end has closed."""
        with self._changed:
            if self._is_over:
                raise EngineDeadError("the engine process is gone")
            self._frames.append(frame)
            self._num_bytes += len(frame) + _FRAME_BYTES
            self._changed.notify_all()

    def put_in_turn(self, frame: bytes, patience_s: float | None) -> None:
        """Queue a frame once there is room; waits up to `patience_s` (None: without limit).

        Raises EngineStalledError if there is no room by then, and EngineDeadError as `put`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_over or not self.is_full, patience_s):
                raise EngineStalledError(
                    f"the engine has stopped taking messages; {self._num_bytes / 2**20:.0f} MiB wait for it"
                )
            self.put(frame)

    def close(self, timeout_s: float) -> None:
        """Drop all frames and end the thread. The other end must be closed, or a write may block on."""
        with self._changed:
            self._end()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while (frame := self._next()) is not None:
            try:
                self._conn.send_bytes(frame)
            except OSError:  # the client's reading thread reports the reason
                with self._changed:
                    self._end()
                return
            with self._changed:
                # A frame counts until it is written: one that the reader does not take is still waiting.
                self._num_bytes -= len(frame) + _FRAME_BYTES
                self._changed.notify_all()

    def _next(self) -> bytes | None:
        """Wait for the next frame; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._frames)
            return None if self._is_over else self._frames.popleft()

    def _end(self) -> None:
        self._is_over = True
        self._frames.clear()
        self._num_bytes = 0
        self._changed.notify_all()
