"""One scan at a time: the lock, a stale lease, a lease that is lost; stores with and without exclusive creation."""

import json
import subprocess
import sys
import time

import fsspec
import pytest

from stride_ray.contamination import lock as module
from stride_ray.contamination.lock import NAME, Lock
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store


@pytest.fixture
def remote(monkeypatch):
    """A folder that is no local one, and a lock's moments short."""
    monkeypatch.setattr(module, "SETTLE", 0.2)
    fsspec.filesystem("memory").store.clear()
    return Store("memory://scans")


def live(owner="other"):
    return json.dumps({"owner": owner, "since": 0, "expires": time.time() + 60}).encode()


def test_a_second_scan_is_refused_and_told_by_whom(tmp_path):
    store = Store(str(tmp_path))
    with Lock(store, 60) as first:
        first.check()
        with pytest.raises(StrideError, match=r"held by .*process \d+ .* another scan is under way") as refused:
            Lock(store, 60).__enter__()
        assert first.owner in str(refused.value)
    assert store.names() == []
    with Lock(store, 60):
        pass


@pytest.mark.parametrize("content", [json.dumps({"owner": "someone", "since": 0, "expires": 1.0}), "{", "[]"])
def test_a_stale_or_broken_lock_is_taken_over(content, tmp_path):
    (tmp_path / NAME).write_text(content)
    with Lock(Store(str(tmp_path)), 60) as lock:
        assert json.loads((tmp_path / NAME).read_text())["owner"] == lock.owner
    assert list(tmp_path.iterdir()) == []


def test_the_lease_is_renewed_while_the_scan_is_alive(tmp_path):
    store = Store(str(tmp_path))
    with Lock(store, 0.6) as lock:
        first = store.read_json(NAME)["expires"]
        deadline = time.monotonic() + 10
        while store.read_json(NAME)["expires"] == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert store.read_json(NAME)["expires"] > first
        lock.check()


def test_who_lost_the_lock_publishes_nothing_and_leaves_it_alone(tmp_path):
    store = Store(str(tmp_path))
    with Lock(store, 60) as lock:
        other = {"owner": "other", "since": 0, "expires": time.time() + 60}
        store.write_json(NAME, other)
        with pytest.raises(StrideError, match="was taken over by another scan"):
            lock.check()
    assert store.read_json(NAME) == other


def test_a_store_that_is_no_local_folder(remote):
    with Lock(remote, 60) as lock:
        lock.check()
        with pytest.raises(StrideError, match="another scan is under way"):
            Lock(remote, 60).__enter__()
    assert not remote.exists(NAME)
    remote.write_json(NAME, {"owner": "gone", "since": 0, "expires": 1.0})
    with Lock(remote, 60) as lock:
        lock.check()


def test_a_lock_that_is_half_written_when_it_is_read_is_not_taken_for_a_broken_one(remote, monkeypatch):
    remote.write(NAME, live())
    whole, answers = Store.read, iter([b"", b'{"owner": "oth'])
    monkeypatch.setattr(Store, "read", lambda store, name: next(answers, None) or whole(store, name))
    with pytest.raises(StrideError, match="is held by other"):
        Lock(remote, 60).__enter__()
    assert json.loads(whole(remote, NAME))["owner"] == "other"


def test_what_stays_broken_is_nobodys(remote):
    remote.write(NAME, b"{")
    with Lock(remote, 60) as lock:
        assert remote.read_json(NAME)["owner"] == lock.owner


def test_a_lock_that_cannot_be_read_is_left_alone(remote, monkeypatch):
    remote.write(NAME, live())

    def away(store, name):
        raise StrideError(f"Cannot read {name}: the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", away)
        with pytest.raises(StrideError, match="the store is away"):
            Lock(remote, 60).__enter__()
    assert remote.read_json(NAME)["owner"] == "other"


def test_that_nobody_held_it_a_while_ago_is_asked_again(remote, monkeypatch):
    there, asked = Store.exists, []

    def slowly(store, name):
        asked.append(there(store, name))
        if len(asked) == 1:
            remote.write(NAME, live())
            time.sleep(module.SETTLE)
        return asked[-1]

    monkeypatch.setattr(Store, "exists", slowly)
    with pytest.raises(StrideError, match="is held by other"):
        Lock(remote, 60).__enter__()
    assert asked[0] is False


def test_a_store_that_was_away_for_a_renewal_is_asked_again(remote, monkeypatch):
    with Lock(remote, 0.9) as lock:
        first = remote.read_json(NAME)["expires"]
        write, failed = Store.write, []

        def once(store, name, data):
            if not failed:
                failed.append(name)
                raise StrideError("away")
            write(store, name, data)

        monkeypatch.setattr(Store, "write", once)
        deadline = time.monotonic() + 10
        while remote.read_json(NAME)["expires"] == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert failed
        assert remote.read_json(NAME)["expires"] > first
        lock.check()


def test_a_lock_of_a_process_that_ended_on_this_machine_is_free(tmp_path):
    code = "import os; from stride_ray.contamination.lock import Lock; from stride_ray.runtime.storage import Store; "
    code += f"Lock(Store({str(tmp_path)!r}), 900).__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    left = json.loads((tmp_path / NAME).read_text())
    assert left["expires"] > time.time() + 600
    (tmp_path / NAME).write_text(json.dumps({**left, "machine": "another"}))
    with pytest.raises(StrideError, match="where that one was killed"):
        Lock(Store(str(tmp_path)), 60).__enter__()
    (tmp_path / NAME).write_text(json.dumps(left))
    with Lock(Store(str(tmp_path)), 60) as lock:
        lock.check()
