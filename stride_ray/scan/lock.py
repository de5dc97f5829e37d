"""One scan at a time: a lock file with an owner and a lease, renewed by its owner, that others take over once it ends.

Locally the file is created exclusively. An object store that knows conditional writes (S3 itself) creates it so; on
one that does not, the owner writes, waits a moment and reads again, and the last writer has won.
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

from stride_ray.errors import StrideError
from stride_ray.storage import Store

NAME = "scan.lock"
# Seconds between writing a lock without a conditional create, and reading whose it is.
SETTLE = 2.0


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
            if self._create():
                self._thread.start()
                return self
            held = self._read()
            if held is None:
                continue  # let go of in between
            if held["expires"] > time.time() and not _ended(held):
                until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(held["expires"]))
                raise StrideError(
                    f"{self.store.name_of(NAME)} is held by {held['owner']} until {until} at the earliest: another "
                    "scan is under way; wait for it (or, where that one was killed, until then)."
                )
            self._take_away()
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
                f"{self.store.name_of(NAME)} was taken over by another scan after this one's lease ran out; run the "
                "same command again: what is done is kept."
            )

    def _record(self) -> bytes:
        now = time.time()
        told = {"owner": self.owner, "pid": os.getpid(), "machine": _machine(), "since": now}
        return json.dumps({**told, "expires": now + self.lease}).encode()

    def _create(self) -> bool:
        """Make the file where there is none; whether it is ours."""
        path = self.store.path(NAME)
        if self.store.local:
            with self.store.told(NAME, "write"):
                return self._link(path)
        if self.store.exists(NAME):
            return False
        try:
            self.store.fs.pipe_file(path, self._record(), mode="create")
        except FileExistsError:
            return False
        except Exception:  # whatever a store says that knows no conditional create
            self.store.write(NAME, self._record())
        time.sleep(SETTLE)
        held = self._read()
        return held is not None and held["owner"] == self.owner

    def _link(self, path: str) -> bool:
        """On a local disk: a file linked to its name is whole at once, and linking fails where the name is taken."""
        os.makedirs(self.store.root, exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex}"
        try:
            with open(partial, "wb") as file:
                file.write(self._record())
            os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.remove(partial)
        return True

    def _read(self) -> dict[str, Any] | None:
        if not self.store.exists(NAME):
            return None
        try:
            held = self.store.read_json(NAME)
            return {**held, "owner": str(held["owner"]), "expires": float(held["expires"])}
        except (StrideError, KeyError, TypeError, ValueError):
            return {"owner": "nobody", "expires": 0.0} if self.store.exists(NAME) else None

    def _take_away(self) -> None:
        """Remove a lock whose lease has ended; of several that try, one succeeds."""
        if not self.store.local:
            self.store.remove(NAME)
            return
        path = self.store.path(NAME)
        aside = f"{path}.{uuid.uuid4().hex}"
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return
        os.remove(aside)

    def _renew(self) -> None:
        while not self._stop.wait(self.lease / 3):
            held = self._read()
            if held is None or held["owner"] != self.owner:
                self.lost = True
                return
            self.store.write(NAME, self._record())
