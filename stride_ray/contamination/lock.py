"""One scan at a time: a lock file with an owner and a lease that the owner renews; others take it over once it expires.

One clock decides whether a lease has expired, that of the store: the time of the lock file's last write is compared
with that of a file written now. Where a store gives no times, the lock is watched for a lease's length.

A lock is taken over from the record that was seen to expire, never from a later one. On a local disk every change is
made under a file lock of the operating system. Object stores are asked to write on condition that the file is as it was
seen (If-None-Match, If-Match); a refusal (409, 412) means that another scan was first. Stores without conditional
writes (501) get a plain write, and a moment later the lock is read again: the last writer wins. This is safe unless a
process writes long after it read; one that is displaced that way finds out from ``check``.
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from stride_ray.runtime.errors import StrideError, storage_codes
from stride_ray.runtime.storage import Store

NAME = "scan.lock"
# Seconds between writing a lock to an object store and reading back its owner.
SETTLE = 2.0
# Maximum reads of a lock file if an object store is slow or returns a half-written one; maximum tries to take a lock.
MAX_READS, TRIES = 3, 5
# Seconds that another process may take to change the lock on a local disk.
GUARD = 10.0
# Object stores give times in whole seconds.
RESOLUTION = 1.0
# The longest time in seconds that is waited or shown: calendars and threads know no longer ones.
_LONGEST = 1e9


class _Record(NamedTuple):
    """A lock file as read: its bytes, its ETag on S3 (else empty), and its fields; no owner if it cannot be parsed."""

    content: bytes
    tag: str
    owner: str
    lease: float
    machine: str
    pid: Any


def _process_scope() -> str:
    """Identify the scope of a process id: this boot of this machine, and the PID namespace; empty except on Linux."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _owner_has_exited(held: _Record) -> bool:
    """Whether the owner was a process on this machine that has ended."""
    if not _process_scope() or held.machine != _process_scope():
        return False
    try:
        os.kill(int(held.pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return False


class Lock:
    """A lock on a folder for the duration of a ``with`` block.

    Args:
        store: the folder.
        lease: seconds until the lock expires unless renewed; it is renewed every third of that.

    Raises:
        StrideError: on entering, if another scan holds it, naming its owner and expiry, or the store fails.
    """

    def __init__(self, store: Store, lease: float) -> None:
        self.store, self.lease = store, lease
        self.owner = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex[:8]}"
        self.lost = False
        self._s3 = "s3" in ([store.fs.protocol] if isinstance(store.fs.protocol, str) else store.fs.protocol)
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Lock":
        for attempt in range(TRIES):
            held = self._read_fresh()
            # The lock may be ours already: a client repeats a write whose response was lost, and the store refuses it.
            if held is not None and held.owner == self.owner:
                break
            left = 0.0 if held is None or not held.owner or _owner_has_exited(held) else self._seconds_left(held)
            if held is not None and left > 0:
                now = self._read()
                if now is None or now.owner != held.owner:
                    continue
                until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time.time() + min(left, _LONGEST)))
                raise StrideError(
                    f"{self.store.display_url(NAME)} is held by {held.owner} until {until} at the earliest: another "
                    "scan is under way; wait for it to end or, if it was killed, until that time."
                )
            if self._claim(held):
                break
            time.sleep(0 if self.store.local else SETTLE / 4 * attempt)
        else:
            raise StrideError(
                f"{self.store.display_url(NAME)} could not be taken in {TRIES} tries: each time, the store reported "
                "that another process had changed it; run the same command again."
            )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with self._guard():
            held = self._read()
            if held is not None and held.owner == self.owner:
                self.store.remove(NAME)

    def check(self) -> None:
        """Renew the lock; call this before publishing.

        Raises:
            StrideError: the lease expired and another scan took the lock, or the lock file is gone.
        """
        if self.lost or not self._extend():
            raise StrideError(
                f"{self.store.display_url(NAME)} was taken over by another scan, because this one did not renew it in "
                "time; run the same command again: finished work is kept."
            )

    def _new_record(self) -> bytes:
        """Return the content to write; it is unique, so that a renewal is visible to other processes."""
        fields = {"owner": self.owner, "pid": os.getpid(), "machine": _process_scope(), "lease": self.lease}
        return json.dumps({**fields, "version": uuid.uuid4().hex}).encode()

    def _seconds_left(self, held: _Record) -> float:
        """Seconds until a lock expires; not positive if it has."""
        age = self._age()
        if age is None:
            return 0.0 if self._unchanged(held) else held.lease
        return held.lease - age + (0 if self.store.local else RESOLUTION)

    def _age(self) -> float | None:
        """Seconds since the lock's last write by the store's own clock; None if the store gives no times.

        Infinite if the lock is gone.
        """
        probe = f".{NAME}.{uuid.uuid4().hex}"
        self.store.write(probe, b"")
        try:
            with self.store.translated_errors(NAME, "read"):
                now = self.store.fs.modified(self.store.path(probe))
                try:
                    return (now - self.store.fs.modified(self.store.path(NAME))).total_seconds()
                except FileNotFoundError:
                    return math.inf
        except (NotImplementedError, AttributeError, KeyError, TypeError):
            return None
        finally:
            self.store.remove(probe)

    def _unchanged(self, held: _Record) -> bool:
        """Watch a lock for its lease's length; returns whether it stayed as it is."""
        started = time.monotonic()
        while time.monotonic() - started < held.lease:
            time.sleep(held.lease / 20)
            now = self._read()
            if now is None or now.content != held.content:
                return False
        return True

    def _read_fresh(self) -> _Record | None:
        """Read the lock, again if an object store took so long that the result may be stale; None if it is free."""
        for _ in range(MAX_READS):
            asked = time.monotonic()
            held = self._read()
            if self.store.local or time.monotonic() - asked < SETTLE / 2:
                break
        return held

    def _claim(self, seen: _Record | None) -> bool:
        """Take the lock if it is still as seen, free or expired; returns whether it is ours."""
        with self._guard() as guarded:
            if self.store.local:
                now = self._read()
                if (now and now.content) != (seen and seen.content):
                    return False
                self.store.write(NAME, self._new_record())
            elif not self._write_if(seen):
                return False
        if not guarded:
            time.sleep(SETTLE)
        held = self._read()
        return held is not None and held.owner == self.owner

    def _extend(self) -> bool:
        """Renew the lease; returns whether the lock is still ours."""
        with self._writing, self._guard():
            held = self._read()
            if held is None or held.owner != self.owner:
                return False
            if self.store.local:
                self.store.write(NAME, self._new_record())
            elif not self._write_if(
                held
            ):  # perhaps refused only because our first try, whose response was lost, worked
                held = self._read()
            return held is not None and held.owner == self.owner

    def _write_if(self, seen: _Record | None) -> bool:
        """Write to an object store if the lock is still as seen; returns False if the store refuses.

        On a store without conditional writes, the lock is read again and then written unconditionally.
        """
        path = self.store.path(NAME)
        with self.store.translated_errors(NAME, "write"):
            try:
                if seen is None:
                    self.store.fs.pipe_file(path, self._new_record(), mode="create")
                elif self._s3:
                    self.store.fs.pipe_file(path, self._new_record(), IfMatch=seen.tag)
                else:
                    raise NotImplementedError
                return True
            except Exception as error:
                codes = storage_codes(error)
                gone = seen is not None and codes & {"404", "NoSuchKey"}
                if isinstance(error, FileExistsError) or codes & {"409", "412"} or gone:
                    return False
                if not codes & {"501", "NotImplemented"} and not isinstance(error, NotImplementedError):
                    raise
        now = self._read()
        if (now and now.content) != (seen and seen.content):
            return False
        self.store.write(NAME, self._new_record())
        return True

    @contextlib.contextmanager
    def _guard(self) -> Iterator[bool]:
        """On a local disk, exclude other processes from changing the lock; yields whether they are excluded."""
        if not self.store.local:
            yield False
            return
        path = self.store.path(f".{NAME}.guard")
        deadline = time.monotonic() + GUARD
        with contextlib.ExitStack() as opened:
            while True:
                with self.store.translated_errors(NAME, "write"):
                    os.makedirs(self.store.root, exist_ok=True)
                    file = opened.enter_context(open(path, "ab"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # The previous holder may have removed the file while this process waited for it.
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                        break
                except FileNotFoundError:
                    pass
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StrideError(
                            f"{path} has been locked by another process for {GUARD:g} s; end that scan and try again."
                        ) from None
                    time.sleep(0.01)
                except OSError:  # a file system without file locks
                    yield False
                    return
                opened.close()
            try:
                yield True
            finally:
                os.remove(path)

    def _read(self) -> _Record | None:
        """Read the file; some stores return half-written ones, so retry. If it stays invalid JSON, it has no owner."""
        content, tag = b"", ""
        for left in reversed(range(MAX_READS)):
            if not self.store.exists(NAME):
                return None
            try:
                if self._s3:  # before the content, so that the ETag is never newer than the content
                    with self.store.translated_errors(NAME, "read"):
                        tag = str(self.store.fs.info(self.store.path(NAME)).get("ETag", ""))
                content = self.store.read(NAME)
                held = json.loads(content)
                if not math.isfinite(float(held["lease"])):
                    raise ValueError("a lease without an end")
                known = str(held.get("machine", "")), held.get("pid")
                return _Record(content, tag, str(held["owner"]), float(held["lease"]), *known)
            except StrideError:
                if not left:
                    raise
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
                if self.store.local:
                    break
            time.sleep(SETTLE / 4)
        return _Record(content, tag, "", 0.0, "", None)

    def _renew(self) -> None:
        while not self._stop.wait(min(self.lease / 3, _LONGEST)):
            # Tolerate a brief outage: the next renewal comes before the lease expires.
            with contextlib.suppress(StrideError):
                if not self._extend():
                    self.lost = True
                    return
