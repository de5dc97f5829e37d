"""One scan at a time: a lock file with an owner and a lease that the owner renews; others take it over once it expires.

On a local disk the file is created exclusively, on object stores with conditional writes (S3 itself) likewise. On
others the owner reads, writes, waits a moment and reads again: the last writer wins. This is safe unless a process
writes long after it read; one that is displaced that way finds out from ``check``.
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
# Seconds between writing a lock to an object store and reading back its owner.
SETTLE = 2.0
# Maximum reads of a lock file if an object store is slow or returns a half-written one.
MAX_READS = 3


def _machine() -> str:
    """Identify the scope of a process id: this boot of this machine, and the PID namespace; empty except on Linux."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _ended(held: dict[str, Any]) -> bool:
    """Whether the owner was a process on this machine that has ended."""
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
    """A lock on a folder for the duration of a ``with`` block.

    Args:
        store: the folder.
        lease: seconds until the lock expires unless renewed; it is renewed every third of that.

    Raises:
        StrideError: on entering, if another scan holds it, naming its owner and expiry.
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
                    f"{self.store.display_url(NAME)} is held by {held['owner']} until {until} at the earliest: another "
                    "scan is under way; wait for it (or, where that one was killed, until then)."
                )
            if self._link(held) if self.store.local else self._claim(held):
                self._thread.start()
                return self
        raise StrideError(f"{self.store.display_url(NAME)} changes hands faster than it can be taken; try again.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        held = self._read()
        if held is not None and held["owner"] == self.owner:
            self.store.remove(NAME)

    def check(self) -> None:
        """Verify that the lock is still held; call this before publishing.

        Raises:
            StrideError: the lease expired and another scan took the lock, or the lock file is gone.
        """
        held = self._read()
        if self.lost or held is None or held["owner"] != self.owner:
            raise StrideError(
                f"{self.store.display_url(NAME)} was taken over by another scan, which did not see this one in time; "
                "run the same command again: what is done is kept."
            )

    def _record(self) -> bytes:
        now = time.time()
        told = {"owner": self.owner, "pid": os.getpid(), "machine": _machine(), "since": now}
        return json.dumps({**told, "expires": now + self.lease}).encode()

    def _look(self) -> dict[str, Any] | None:
        """Read who holds the lock, again if an object store took so long that the answer may be stale."""
        for _ in range(MAX_READS):
            asked = time.monotonic()
            held = self._read()
            if self.store.local or time.monotonic() - asked < SETTLE / 2:
                break
        return held

    def _claim(self, ended: dict[str, Any] | None) -> bool:
        """On an object store: create the file, or overwrite an expired one; returns whether it is ours after SETTLE."""
        try:
            if ended is not None:
                self.store.write(NAME, self._record())
            else:
                self.store.fs.pipe_file(self.store.path(NAME), self._record(), mode="create")
        except FileExistsError:
            return False
        except Exception:  # stores without conditional create raise errors of their own
            self.store.write(NAME, self._record())
        time.sleep(SETTLE)
        held = self._read()
        return held is not None and held["owner"] == self.owner

    def _link(self, ended: dict[str, Any] | None) -> bool:
        """On a local disk: hard-link a complete file to the name, which is atomic and fails if the name is taken."""
        path = self.store.path(NAME)
        partial = f"{path}.{uuid.uuid4().hex}"
        with self.store.translated_errors(NAME, "write"):
            os.makedirs(self.store.root, exist_ok=True)
            try:
                if ended is not None:
                    os.rename(path, partial)  # succeeds for one of several processes
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
        """Read the file; some stores return half-written ones, so retry. If it stays invalid JSON, it has no owner."""
        for left in reversed(range(MAX_READS)):
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
            ):  # tolerate a brief outage: the next renewal comes before the lease expires
                held = self._read()
                if held is None or held["owner"] != self.owner:
                    self.lost = True
                    return
                self.store.write(NAME, self._record())
