"""Messages on their way to the engine process. Torch-free."""

from __future__ import annotations

import threading
from collections import deque
from multiprocessing.connection import Connection

from tfserve.errors import EngineDeadError, EngineStalledError

MAX_BYTES = 64 * 2**20
"""What may wait for an engine that does not read; a living one leaves next to nothing waiting."""

_FRAME_BYTES = 256
"""What a frame takes beside its bytes, so that small ones have a limit too (250,000 of them)."""


class Outbox:
    """Frames for a connection, which a thread of this object writes in order: only that thread waits for the reader.

    `put` from any thread.
    """

    def __init__(self, conn: Connection, most_bytes: int = MAX_BYTES) -> None:
        self._conn = conn
        self._most_bytes = most_bytes
        self._frames: deque[bytes] = deque()
        self._num_bytes = 0
        self._is_over = False
        # Reentrant, as the interpreter may drop an Engine, and so put a last message, in any thread.
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._write_all, name="tfserve-engine-writer", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """True while more waits than may: the other end does not read."""
        return self._num_bytes >= self._most_bytes

    def put(self, frame: bytes) -> None:
        """Leave a frame, full or not. Raises EngineDeadError once the other end has gone."""
        with self._changed:
            if self._is_over:
                raise EngineDeadError("the engine process is gone")
            self._frames.append(frame)
            self._num_bytes += len(frame) + _FRAME_BYTES
            self._changed.notify_all()

    def put_in_turn(self, frame: bytes, patience_s: float | None) -> None:
        """Leave a frame once there is room, which may take `patience_s` (None: for ever).

        Raises EngineStalledError if there is none by then, and as `put`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_over or not self.is_full, patience_s):
                raise EngineStalledError(
                    f"the engine has stopped taking messages; {self._num_bytes / 2**20:.0f} MiB wait for it"
                )
            self.put(frame)

    def close(self, timeout_s: float) -> None:
        """End the thread, dropping what is left; the other end must have gone, or a write may go on."""
        with self._changed:
            self._end()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while (frame := self._next()) is not None:
            try:
                self._conn.send_bytes(frame)
            except OSError:  # the client's reader tells why
                with self._changed:
                    self._end()
                return
            with self._changed:
                # What is being written still counts: a frame that is not taken is one that waits.
                self._num_bytes -= len(frame) + _FRAME_BYTES
                self._changed.notify_all()

    def _next(self) -> bytes | None:
        """The next frame, which may have to be waited for; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._frames)
            return None if self._is_over else self._frames.popleft()

    def _end(self) -> None:
        self._is_over = True
        self._frames.clear()
        self._num_bytes = 0
        self._changed.notify_all()
