"""A run in an object store: real S3 servers, and a proxy that is busy, cuts connections and lists late.

The whole of it has the bytes of a local run, whatever the proxy does; where a store stays away, one sentence says so.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import s3fs
import servers
from conftest import data_files, flags, run_plainly, settings, verbs
from servers import FaultProxy

from stride_ray.cli.main import main
from stride_ray.cli.quickstart import settings as quickstart_settings
from stride_ray.contamination import lock
from stride_ray.contamination.lock import Lock
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

DRIVER = """
import json, sys
import ray
from stride_ray.cli.main import main

ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
sys.exit(max(main(verb) for verb in json.loads(sys.argv[1])))
"""


def commands(run, queries, options):
    """All stages of a run, and a selection beside it."""
    chosen = ["select", run, "--name", "asked", "--out", f"{run}-chosen", "--tokens", "0.5"]
    return [*verbs(run, queries, options), chosen]


@pytest.fixture(scope="module")
def local(parts, tmp_path_factory):
    """Data files of the run on local files, without Ray."""
    folder = tmp_path_factory.mktemp("local") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        assert [main(verb) for verb in commands(str(folder), str(parts.queries), settings(parts))] == [0] * 6
    return {**data_files(folder), **chosen(folder)}


def driven(verbs, **environment):
    """Verbs on a Ray of their own, in a process that sees the environment."""
    command = [sys.executable, "-c", DRIVER, json.dumps(verbs)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert servers.SECRET not in done.stdout + done.stderr


def holders_of_the_secret(folder):
    return [path for path in folder.rglob("*") if path.is_file() and servers.SECRET.encode() in path.read_bytes()]


def chosen(folder):
    files = sorted(folder.parent.glob("run-chosen/data/*"))
    assert files
    return {f"chosen/{path.name}": path.read_bytes() for path in files}


def fetched(url, folder):
    """Data files of a run in a bucket."""
    files = s3fs.S3FileSystem(use_listings_cache=False)
    files.get(url, str(folder / "run"), recursive=True)
    files.get(f"{url}-chosen", str(folder / "run-chosen"), recursive=True)
    return {**data_files(folder / "run"), **chosen(folder / "run")}


@pytest.mark.cluster
def test_the_quickstart_in_a_bucket_has_the_bytes_of_the_local_one(bucket, tmp_path):
    root = tmp_path / "quickstart"
    driven([["quickstart", str(root)]])
    with bucket("swift") as whole:
        url = f"{whole}/quickstart"
        files = s3fs.S3FileSystem()
        for name in ("corpus", "tokenizer", "model"):
            files.put(str(root / name), f"{url}/in/{name}", recursive=True)
        files.put(str(root / "prompts.jsonl"), f"{url}/in/prompts.jsonl")
        options = flags(quickstart_settings(f"{url}/in"))
        asked = ["attribute", f"{url}/run", "--queries", f"{url}/in/prompts.jsonl", "--name", "prompts"]
        driven(
            [["shard", f"{url}/run", *options], ["fit", f"{url}/run"], asked], XDG_CACHE_HOME=str(tmp_path / "cache")
        )
        s3fs.S3FileSystem(use_listings_cache=False).get(f"{url}/run", str(tmp_path / "run"), recursive=True)
    local = data_files(root / "run")
    assert len(local) >= 8
    assert {name.partition("/")[0] for name in local} == {"blocks", "operators", "exact"}
    assert data_files(tmp_path / "run") == local
    assert not holders_of_the_secret(tmp_path)


@pytest.mark.cluster
@pytest.mark.parametrize("server", ["swift", "rclone"])
def test_a_run_in_a_bucket_has_the_bytes_of_a_local_one(parts, local, bucket, server, tmp_path):
    with bucket(server) as url:
        files = s3fs.S3FileSystem()
        for name in ("corpus", "tokenizer", "model"):
            files.put(str(parts.root / name), f"{url}/in/{name}", recursive=True)
        files.put(str(parts.queries), f"{url}/in/queries.jsonl")
        inputs = {"corpus.input": [f"{url}/in/corpus"], "model.path": f"{url}/in/model"}
        given = commands(f"{url}/a/run", f"{url}/in/queries.jsonl", {**settings(parts), **inputs})
        driven(given, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert fetched(f"{url}/a/run", tmp_path) == local
    assert not holders_of_the_secret(tmp_path)


@pytest.mark.cluster
def test_a_busy_store_that_cuts_connections_and_lists_late_changes_no_byte(parts, local, bucket, plain, tmp_path):
    with bucket("rclone"):
        upstream = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with FaultProxy(upstream) as proxy, bucket(proxy.port) as url:
        proxy.refuses, proxy.cuts, proxy.lag = lambda number: number % 67 < 2, lambda number: number % 13 == 3, 1.0
        for verb in commands(f"{url}/b/run", str(parts.queries), settings(parts)):
            assert main(verb) == 0
        proxy.refuses, proxy.cuts, proxy.lag = lambda number: False, lambda number: False, 0.0
        assert all(proxy.counts.values()), proxy.counts
        assert fetched(f"{url}/b/run", tmp_path) == local


@pytest.mark.cluster
def test_a_store_that_stays_away_is_told_in_a_sentence_and_a_rerun_goes_on(
    parts, local, bucket, plain, capsys, tmp_path
):
    with bucket("rclone"):
        upstream = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with FaultProxy(upstream) as proxy, bucket(proxy.port) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr("stride_ray.runtime.urls.TRIES", 2)
        given = commands(f"{url}/c/run", str(parts.queries), settings(parts))
        for verb in given[:-1]:  # Ray's workers, whom select asks, would try for minutes
            first = proxy.numbers["cut"]
            proxy.refuses = lambda number, first=first: proxy.numbers["cut"] > first + 2
            assert main(verb) == 1
            assert re.search("Service Unavailable|request rate", capsys.readouterr().err)
            proxy.refuses = lambda number: False
            assert main(verb) == 0
        assert main(given[-1]) == 0
        assert fetched(f"{url}/c/run", tmp_path) == local


@pytest.mark.parametrize("server", ["swift", "rclone"])
def test_what_is_wrong_with_a_store_is_a_sentence(bucket, server, monkeypatch):
    with bucket(server) as url:
        with pytest.raises(StrideError, match=r"Cannot write s3://nowhere/run/x: no such bucket"):
            Store("s3://nowhere/run").write("x", b"1")
        Store(f"{url}/d").write("x", b"1")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-one-12345")
        s3fs.S3FileSystem.clear_instance_cache()
        for deed in (lambda s: s.write("x", b"2"), lambda s: s.read("x"), lambda s: s.names(), lambda s: s.exists("x")):
            with pytest.raises(StrideError, match=r"permission denied|Cannot \w+ s3://bucket/d") as caught:
                deed(Store(f"{url}/d"))
            assert "another-one" not in str(caught.value)


@pytest.mark.cluster
def test_a_store_that_does_not_answer_ends_within_a_minute(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(StrideError, match=r"Cannot read s3://bucket/x/y"):
        Store("s3://bucket/x").read("y")
    assert time.monotonic() - started < 60
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("server", ["moto", "swift", "rclone"])
def test_of_many_that_want_a_lock_one_gets_it(bucket, server):
    with bucket(server) as url:
        store, got, refused = Store(f"{url}/e"), [], []
        gate = threading.Barrier(4)

        def take():
            gate.wait()
            try:
                with Lock(Store(store.url), 30.0) as held:
                    got.append(held)
                    time.sleep(lock.SETTLE)
                    held.check()
            except StrideError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=take) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(got) == 1, refused
        assert len(refused) == 3
        assert all("is held by" in told for told in refused)
        assert not store.exists(lock.NAME)
