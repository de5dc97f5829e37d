"""Exit statuses of programs: mapping errors and interruptions to status and message."""

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stride_ray.cli.streams import lenient_output
from stride_ray.runtime.errors import StrideError, Terminated

# Errors of disks, paths or limits, as opposed to bugs in this package.
OUTSIDE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def exit_status(program: str, work: Callable[[], int | None]) -> int:
    """Run a program's work and return its exit status; ``program`` prefixes the messages.

    The status is what ``work`` returns (None: 0), 1 after a StrideError or an OSError of the environment, with a
    message on standard error, 130 after an interrupt and 143 after SIGTERM. A reader of its output that stops early
    (``| head``) changes nothing.
    """
    with lenient_output():
        return _status(program, work)


def _status(program: str, work: Callable[[], int | None]) -> int:
    try:
        with _stoppable():
            status = work() or 0
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        return status
    except StrideError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        told = f"{error.strerror}{where}; fix this and run the same command again: what is done is kept"
        print(f"{program}: {told}", file=sys.stderr)
        return 1
    except Terminated:
        print(f"{program}: terminated (SIGTERM); run the same command again to go on", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that cleanup code runs."""
    received = threading.Event()

    def stop(number: int, frame: object) -> None:
        received.set()
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        # Ray's native calls turn whatever a signal handler raises into this.
        if received.is_set():
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
