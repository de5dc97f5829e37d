"""Exit statuses: what becomes of a program's work, its errors and what stops it."""

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stride_ray.runtime.errors import StrideError, Terminated

# What is wrong with a disk, a path or a limit, and not with this package.
OUTSIDE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def exit_status(program: str, work: Callable[[], int | None]) -> int:
    """Do a program's work; a StrideError becomes a sentence on standard error and 1, an interrupt 130, None 0.

    SIGTERM interrupts too, with 143.
    """
    try:
        with _stoppable():
            return work() or 0
    except StrideError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        told = f"{error.strerror}{where}; put that right and run the same command again: what is done is kept"
        print(f"{program}: {told}", file=sys.stderr)
        return 1
    except Terminated:
        print(f"{program}: told to stop (SIGTERM); run the same command again to go on", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM becomes an exception, so that what is open is closed."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
