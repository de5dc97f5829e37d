"""Standard output and error that do not end the work: readers that stop early, encodings without all characters."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Lenient:
    """A text stream whose reader may leave: what is written after that is dropped, as with ``| head``.

    Everything else, such as a full disk below the stream, still raises.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        # Python flushes once more when it exits; what is still in the buffer must have somewhere to go.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise error


@contextlib.contextmanager
def lenient_output() -> Iterator[None]:
    """Within the block, printing neither fails on a closed pipe nor on a character that the encoding lacks.

    Such characters are escaped (``…`` becomes ``u2026`` after a backslash).
    """
    before = sys.stdout, sys.stderr
    plain = {stream: stream.errors for stream in before if isinstance(stream, io.TextIOWrapper)}
    for stream in plain:
        stream.reconfigure(errors="backslashreplace")
    lenient: Any = [stream if stream is None else _Lenient(stream) for stream in before]
    sys.stdout, sys.stderr = lenient
    try:
        yield
    finally:
        for stream in lenient:
            with contextlib.suppress(AttributeError, OSError, ValueError):  # None, full, closed
                stream.flush()
        sys.stdout, sys.stderr = before
        for stream, errors in plain.items():
            stream.reconfigure(errors=errors)
