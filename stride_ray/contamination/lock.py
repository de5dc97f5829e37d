"""One scan at a time: a lock file with an owner and a lease, renewed by its owner, that others take over once it ends.

Locally the file is created exclusively. An object store that knows conditional writes (S3 itself) creates it so; on
one that does not, the owner looks, writes, waits a moment and reads again, and the last writer has won. That holds as
long as nobody writes long after looking; whoever was displaced all the same is told so by ``check``.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

NAME = "scan.lock"
# Seconds between writing a lock without a conditional create, and reading whose it is.
SETTLE = 2.0
# How often a slow or half-written answer of an object store is asked for again.
LOOKS = 3


def _machine() -> str:
    """Where a process id means something: this boot of this machine, and on Linux the processes that it can see."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _ended(held: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if not _machine() or held.get("machine") != _machine():
        return False
    try:
        os.kill(int(held["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError):
        return False
    return False


class Lock:
    """A lock on a folder for the length of a ``with`` block.

    Args:
        store: the folder.
        lease: seconds that the lock holds without being renewed; it is renewed every third of that.

    Raises:
        StrideError: on entering, where another scan holds it, saying who and until when.
    """

    def __init__(self, store: Store, lease: float) -> None:
        self.store, self.lease = store, lease
        self.owner = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex[:8]}"
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Lock":
        for _ in range(3):
            held = self._look()
            if held is not None and held["expires"] > time.time() and not _ended(held):
                until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(held["expires"]))
                raise StrideError(
                    f"{self.store.name_of(NAME)} is held by {held['owner']} until {until} at the earliest: another "
                    "scan is under way; wait for it (or, where that one was killed, until then)."
                )
            if self._link(held) if self.store.local else self._claim(held):
                self._thread.start()
                return self
        raise StrideError(f"{self.store.name_of(NAME)} changes hands faster than it can be taken; try again.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        held = self._read()
        if held is not None and held["owner"] == self.owner:
            self.store.remove(NAME)

    def check(self) -> None:
        """Refuse to go on without the lock; to be called before anything is published.

        Raises:
            StrideError: where the lease ran out and another scan took the lock.
        """
        held = self._read()
        if self.lost or held is None or held["owner"] != self.owner:
            raise StrideError(
                f"{self.store.name_of(NAME)} was taken over by another scan, which did not see this one in time; "
                "run the same command again: what is done is kept."
            )

    def _record(self) -> bytes:
        now = time.time()
        told = {"owner": self.owner, "pid": os.getpid(), "machine": _machine(), "since": now}
        return json.dumps({**told, "expires": now + self.lease}).encode()

    def _look(self) -> dict[str, Any] | None:
        """Who holds the lock; asked again where the answer took so long that it may be of the past."""
        for _ in range(LOOKS):
            asked = time.monotonic()
            held = self._read()
            if self.store.local or time.monotonic() - asked < SETTLE / 2:
                break
        return held

    def _claim(self, ended: dict[str, Any] | None) -> bool:
        """In an object store: make the file, or write over one that ended; whether it is ours after a moment."""
        try:
            if ended is not None:
                self.store.write(NAME, self._record())
            else:
                self.store.fs.pipe_file(self.store.path(NAME), self._record(), mode="create")
        except FileExistsError:
            return False
        except Exception:  # whatever a store says that knows no conditional create
            self.store.write(NAME, self._record())
        time.sleep(SETTLE)
        held = self._read()
        return held is not None and held["owner"] == self.owner

    def _link(self, ended: dict[str, Any] | None) -> bool:
        """On a local disk: a file linked to its name is whole at once, and linking fails where the name is taken."""
        path = self.store.path(NAME)
        partial = f"{path}.{uuid.uuid4().hex}"
        with self.store.translated_errors(NAME, "write"):
            os.makedirs(self.store.root, exist_ok=True)
            try:
                if ended is not None:
                    os.rename(path, partial)  # of several that try, one succeeds
                with open(partial, "wb") as file:
                    file.write(self._record())
                os.link(partial, path)
            except (FileExistsError, FileNotFoundError):
                return False
            finally:
                with contextlib.suppress(OSError):
                    os.remove(partial)
        return True

    def _read(self) -> dict[str, Any] | None:
        """What the file says; one that stays unreadable as JSON is nobody's, as some stores show half-written ones."""
        for left in reversed(range(LOOKS)):
            if not self.store.exists(NAME):
                return None
            try:
                held = json.loads(self.store.read(NAME))
                return {**held, "owner": str(held["owner"]), "expires": float(held["expires"])}
            except StrideError:
                if not left:
                    raise
            except (KeyError, TypeError, ValueError):
                if self.store.local:
                    break
            time.sleep(SETTLE / 4)
        return {"owner": "nobody", "expires": 0.0}

    def _renew(self) -> None:
        while not self._stop.wait(self.lease / 3):
            with contextlib.suppress(
                StrideError
            ):  # a store that is away for a while; the next time comes before the end
                held = self._read()
                if held is None or held["owner"] != self.owner:
                    self.lost = True
                    return
                self.store.write(NAME, self._record())
