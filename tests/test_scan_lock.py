"""One scan at a time: the lock, a stale lease, a lease that is lost; stores with and without conditional writes."""

import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta

import fsspec
import pytest
import s3fs
import servers

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


@pytest.fixture(scope="module")
def server():
    """A small S3 server with conditional writes."""
    with servers.ObjectStore() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in servers.environment(started.port).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield started
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server, monkeypatch):
    """The server, behaving well, and a folder in it; a lock's moments are short."""
    monkeypatch.setattr(module, "SETTLE", 0.05)
    server.answers, server.always, server.ignores, server.ahead = [], 200, False, 0.0
    server.objects.clear()
    server.puts.clear()
    return server, Store("s3://bucket/scans")


PATH = f"/bucket/scans/{NAME}"


def live(owner="other", lease=60):
    return json.dumps({"owner": owner, "lease": lease}).encode()


def age(store, seconds):
    """Let the lock be older by the store's clock."""
    if store.local:
        written = os.stat(store.path(NAME)).st_mtime
        os.utime(store.path(NAME), (written - seconds, written - seconds))
    else:
        store.fs.store[store.path(NAME)].modified -= timedelta(seconds=seconds)


def after_looking(monkeypatch, deed):
    """Have something happen between a scan's first look at the lock and what it does then."""
    look, seen = Lock._read_fresh, []

    def slowly(lock):
        held = look(lock)
        if not seen:
            seen.append(held)
            deed()
        return held

    monkeypatch.setattr(Lock, "_read_fresh", slowly)


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


@pytest.mark.parametrize("content", [live(), b"{", b"[]", b"{}", live(lease=1e999)])
def test_a_stale_or_broken_lock_is_taken_over(content, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    age(Store(str(tmp_path)), 61)
    with Lock(Store(str(tmp_path)), 60) as lock:
        assert json.loads((tmp_path / NAME).read_text())["owner"] == lock.owner
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("odd", [{"lease": 1e18}, {"pid": 2**70}])
def test_a_lock_with_numbers_beyond_clocks_and_processes_is_told(odd, tmp_path, monkeypatch):
    held = {"owner": "other", "lease": 60, "machine": module._process_scope()}
    (tmp_path / NAME).write_text(json.dumps(held | odd))
    with pytest.raises(StrideError, match=r"held by other until 20.* UTC at the earliest"):
        Lock(Store(str(tmp_path)), 60).__enter__()


def test_the_lease_is_renewed_while_the_scan_is_alive(tmp_path):
    store = Store(str(tmp_path))
    with Lock(store, 0.6) as lock:
        first = store.read_json(NAME, foreign=True)["version"]
        deadline = time.monotonic() + 10
        while store.read_json(NAME, foreign=True)["version"] == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert store.read_json(NAME, foreign=True)["version"] != first
        lock.check()


def test_who_lost_the_lock_publishes_nothing_and_leaves_it_alone(tmp_path):
    store = Store(str(tmp_path))
    with Lock(store, 60) as lock:
        store.write(NAME, live())
        with pytest.raises(StrideError, match="was taken over by another scan"):
            lock.check()
    assert store.read(NAME) == live()


def test_a_store_that_is_no_local_folder(remote):
    with Lock(remote, 60) as lock:
        lock.check()
        with pytest.raises(StrideError, match="another scan is under way"):
            Lock(remote, 60).__enter__()
    assert not remote.exists(NAME)
    remote.write(NAME, live())
    age(remote, 62)
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
        assert remote.read_json(NAME, foreign=True)["owner"] == lock.owner


def test_a_lock_that_cannot_be_read_is_left_alone(remote, monkeypatch):
    remote.write(NAME, live())

    def away(store, name):
        raise StrideError(f"Cannot read {name}: the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", away)
        with pytest.raises(StrideError, match="the store is away"):
            Lock(remote, 60).__enter__()
    assert remote.read_json(NAME, foreign=True)["owner"] == "other"


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
        first = remote.read_json(NAME, foreign=True)["version"]
        write, failed = Store.write, []

        def once(store, name, data):
            if not failed:
                failed.append(name)
                raise StrideError("away")
            write(store, name, data)

        monkeypatch.setattr(Store, "write", once)
        deadline = time.monotonic() + 10
        while remote.read_json(NAME, foreign=True)["version"] == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert failed
        assert remote.read_json(NAME, foreign=True)["version"] != first
        lock.check()


def test_a_lock_of_a_process_that_ended_on_this_machine_is_free(tmp_path):
    code = "import os; from stride_ray.contamination.lock import Lock; from stride_ray.runtime.storage import Store; "
    code += f"Lock(Store({str(tmp_path)!r}), 900).__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    left = json.loads((tmp_path / NAME).read_text())
    assert left["lease"] == 900
    (tmp_path / NAME).write_text(json.dumps({**left, "machine": "another"}))
    with pytest.raises(StrideError, match="if it was killed, until that time"):
        Lock(Store(str(tmp_path)), 60).__enter__()
    (tmp_path / NAME).write_text(json.dumps(left))
    with Lock(Store(str(tmp_path)), 60) as lock:
        lock.check()


def test_who_comes_late_to_an_expired_lock_leaves_its_new_owner_alone(tmp_path, monkeypatch):
    store, other = Store(str(tmp_path)), []
    store.write(NAME, live("gone"))
    age(store, 61)
    after_looking(monkeypatch, lambda: other.append(Lock(store, 60).__enter__()))
    with pytest.raises(StrideError, match="is held by") as refused:
        Lock(store, 60).__enter__()
    assert other[0].owner in str(refused.value)
    other[0].check()
    other[0].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_released_meanwhile_is_free(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write(NAME, live())
    after_looking(monkeypatch, lambda: store.remove(NAME))
    with Lock(store, 60) as lock:
        lock.check()


def test_of_many_that_want_an_expired_lock_one_gets_it(tmp_path):
    store, got, refused = Store(str(tmp_path)), [], []
    store.write(NAME, live("gone"))
    age(store, 61)
    gate, end = threading.Barrier(6), threading.Barrier(6)

    def take():
        gate.wait()
        try:
            got.append(Lock(store, 60).__enter__())
        except StrideError as error:
            refused.append(str(error))
        end.wait()

    threads = [threading.Thread(target=take) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (len(got), len(refused)) == (1, 5)
    assert all("is held by" in why for why in refused)
    got[0].check()


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_the_stores_clock_decides_whoever_is_wrong(bucket, ahead):
    server, store = bucket
    server.ahead = ahead
    with Lock(store, 60) as lock:
        with pytest.raises(StrideError, match="another scan is under way"):
            Lock(store, 60).__enter__()
        server.age(PATH, 55)
        with pytest.raises(StrideError, match="another scan is under way"):
            Lock(store, 60).__enter__()
        server.age(PATH, 10)
        with Lock(store, 60) as later:
            later.check()
            with pytest.raises(StrideError, match="was taken over"):
                lock.check()


@pytest.mark.parametrize("status", [409, 412])
def test_a_refusal_is_no_leave_to_overwrite(bucket, status, monkeypatch):
    server, store = bucket
    server.always = status
    with pytest.raises(StrideError, match="could not be taken in 5 tries"):
        Lock(store, 60).__enter__()
    assert "none" not in server.puts
    assert not server.objects
    after_looking(monkeypatch, lambda: server.objects.update({PATH: (live(), '"x"', time.time())}))
    with pytest.raises(StrideError, match="is held by other"):
        Lock(store, 60).__enter__()
    assert server.objects[PATH][0] == live()


def test_a_conflict_is_tried_again_and_a_lost_answer_is_seen(bucket):
    server, store = bucket
    server.answers = [409, 200]
    with Lock(store, 60) as lock:
        assert server.puts == ["If-None-Match", "If-None-Match"]
        server.answers = [412]  # as if the first try had been carried out
        lock.check()
    assert not server.objects


def test_an_expired_lock_is_taken_over_on_condition(bucket, monkeypatch):
    server, store = bucket
    server.objects[PATH] = (live("gone"), '"a"', time.time() - 100)
    with Lock(store, 60):
        assert server.puts == ["none", "If-Match"]  # the first is for the store's time
    server.objects[PATH] = (live("gone"), '"a"', time.time() - 100)
    claim = Lock._claim

    def late(lock, seen):
        server.objects[PATH] = (live(), '"b"', time.time())
        return claim(lock, seen)

    monkeypatch.setattr(Lock, "_claim", late)
    with pytest.raises(StrideError, match="is held by other"):
        Lock(store, 60).__enter__()


@pytest.mark.parametrize("how", ["501", "ignored"])
def test_a_store_without_conditional_writes_is_written_and_read_again(bucket, how):
    server, store = bucket
    server.always, server.ignores = (501, False) if how == "501" else (200, True)
    with Lock(store, 60) as lock:
        lock.check()
        with pytest.raises(StrideError, match="another scan is under way"):
            Lock(store, 60).__enter__()
    assert not server.objects


def test_any_other_failure_is_told_and_takes_nothing(bucket):
    server, store = bucket
    server.always = 403
    with pytest.raises(StrideError, match=r"Cannot write s3://bucket/scans/scan.lock: access denied"):
        Lock(store, 60).__enter__()
    assert not server.objects


def test_where_a_store_gives_no_times_the_lock_is_watched(remote, monkeypatch):
    def none(*_):
        raise NotImplementedError

    monkeypatch.setattr(type(remote.fs), "modified", none)
    remote.write(NAME, live(lease=0.5))
    # Nobody renews the first; the second is.
    with Lock(remote, 0.6), pytest.raises(StrideError, match="another scan is under way"):
        Lock(remote, 0.6).__enter__()
