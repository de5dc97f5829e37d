"""Where a command runs: pipes that close, encodings, folders that cannot be written, long paths, other folders."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import flags, settings, write_lines

from stride_ray.cli.exits import exit_status
from stride_ray.corpus import shard as sharding
from stride_ray.corpus.shard import shard
from stride_ray.models.download import local_model, model_fingerprint
from stride_ray.models.linear_algebra.matrices import compiled
from stride_ray.runtime import tasks
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import anchored, looks_local

COMMAND = [sys.executable, "-m", "stride_ray"]


def environment(**more):
    """This process's environment, in which a Python buffers its output unless ``more`` says otherwise."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": os.getcwd(), **more}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["config"], ["--help"]])
def test_a_reader_that_stops_early(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [*COMMAND, *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(PYTHONUNBUFFERED=unbuffered),
        timeout=60,
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_of_another_encoding(encoding):
    ran = subprocess.run(
        [*COMMAND, "config"], capture_output=True, env=environment(PYTHONIOENCODING=encoding), timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert {"ascii": "\\u2013", "cp1252": "–", "utf-8": "–"}[encoding] in ran.stdout.decode(encoding)


def test_work_goes_on_when_nobody_reads(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    done = []

    def work():
        for step in range(3):
            print("ünïcödé", "line " * 10_000)  # more than a buffer holds
            print("progress", file=sys.stderr)
            done.append(step)
        return 3

    with open(writer, "w", encoding="ascii") as stream, open(os.dup(writer), "w") as other:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", other)
        assert exit_status("test", work) == 3
        assert sys.stdout is stream
        assert stream.errors == "strict"
        monkeypatch.undo()
    assert done == [0, 1, 2]


def test_output_that_is_full(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_status("test", lambda: print("line")) == 1
    assert "test: No space left on device" in capsys.readouterr().err


def test_no_output_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_status("test", lambda: print("line")) == 0


def test_loops_compile_where_no_cache_can_be_written(monkeypatch):
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])

    @compiled
    def total(x):
        return x.sum()

    assert total(np.arange(4.0)) == 6.0


@pytest.mark.parametrize("home", ["", "/proc/nowhere", "read-only"])
def test_a_model_is_fetched_where_the_home_cannot_be_written(home, parts, tmp_path, monkeypatch):
    url = f"memory://environment/{home}"
    store = Store(url)
    for path in parts.model.iterdir():
        store.write(path.name, path.read_bytes())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if home == "read-only":
        monkeypatch.setattr(os, "access", lambda *_: False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if not home:  # as for a user without an entry in the system's list
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    fetched = local_model(url)
    assert fetched.startswith(f"{tmp_path}/stride_ray-")
    assert model_fingerprint(fetched) == model_fingerprint(parts.model)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "stride_ray-12345").symlink_to(tmp_path)
    with pytest.raises(StrideError, match="is another user's; set XDG_CACHE_HOME"):
        local_model(url)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, None),
        ({"TMPDIR": "short"}, None),
        ({"TMPDIR": "x" * 60}, "/tmp/ray"),
        ({"TMPDIR": "missing"}, "/tmp/ray"),
        ({"RAY_TMPDIR": "short", "TMPDIR": "x" * 60}, None),
    ],
)
def test_a_local_ray_keeps_its_session_where_sockets_can_be_made(variables, folder, tmp_path, monkeypatch):
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        (tmp_path / value).mkdir(exist_ok=True) if value != "missing" else None
        monkeypatch.setenv(name, f"{tmp_path}/{value}")
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(tasks, "SOCKET_BYTES", len(f"{tmp_path}/{'x' * 40}{tasks.RAY_SOCKET}{os.getpid()}"))
    assert tasks._session_folder() == folder
    monkeypatch.setenv("RAY_TMPDIR", f"{tmp_path}/{'y' * 60}")
    with pytest.raises(StrideError, match=r"RAY_TMPDIR is a path of \d+ bytes"):
        tasks._session_folder()
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.mark.parametrize("writable", [False, True])
def test_a_local_ray_needs_no_home(writable, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path if writable else "/proc/nowhere"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    seen = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: seen.append("RAY_AUTH_TOKEN" in os.environ))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with tasks.connected(ComputeConfig()):
        assert seen == [not writable]


def test_a_ray_that_has_no_folder(monkeypatch):
    def fails(**_):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fails)
    with (
        pytest.raises(StrideError, match=r"Permission denied: '/somewhere'.*set RAY_TMPDIR"),
        tasks.connected(ComputeConfig()),
    ):
        pass


def test_what_looks_local_is_not_asked_of_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    for place in ("./m", "../m", "/m", "~/m", "~nobody/m", "m/", "some/m", "a/b/c", "m.gguf", "m.json"):
        assert looks_local(place), place
        with pytest.raises(StrideError, match="does not exist"):
            local_model(place)
    for place in ("gpt2", "owner/name"):
        assert not looks_local(place)
        assert anchored(place, maybe_hub=True) == place
    assert anchored("some/m", maybe_hub=True) == f"{tmp_path}/some/m"
    assert anchored("some", maybe_hub=True) == anchored("some") == f"{tmp_path}/some"
    assert anchored("*.txt") == f"{tmp_path}/*.txt"
    assert (anchored(""), anchored("s3://b/x")) == ("", "s3://b/x")


def test_a_run_is_used_from_another_folder_and_a_model_from_another_path(parts, tmp_path, monkeypatch, told, plain):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    for name in ("model", "tokenizer", "corpus"):
        shutil.copytree(getattr(parts, name), here / name)
    monkeypatch.chdir(here)
    given = {"corpus.input": "corpus", "corpus.tokenizer": "tokenizer", "model.path": "model"}
    told("shard", "run", *flags({**settings(parts), **given, "compute.workers": 1}), code=0)
    asked = ["--queries", parts.queries, "--exact"]
    told("attribute", "run", *asked, "--name", "a", code=0)
    kept = Run("run").config
    assert (kept.model.path, kept.corpus.tokenizer) == (f"{here}/model", f"{here}/tokenizer")
    assert kept.corpus.input == (f"{here}/corpus",)
    monkeypatch.chdir(there)
    shutil.copytree(here / "model", there / "copy")
    shutil.copytree(here / "tokenizer", there / "tokenizer")
    told("attribute", here / "run", *asked, "--name", "b", code=0)
    told("attribute", here / "run", *asked, "--name", "b", "--model", "copy", code=0)
    told("shard", here / "run", "--tokenizer", "tokenizer", "--input", here / "corpus", code=0)
    tables = [(here / f"run/exact/{name}/influence-00000.parquet").read_bytes() for name in "ab"]
    assert tables[0] == tables[1]
    added = json.loads((there / "tokenizer/tokenizer.json").read_text())
    added["normalizer"] = {"type": "Lowercase"}
    (there / "tokenizer/tokenizer.json").write_text(json.dumps(added))
    sentence = told("shard", here / "run", "--tokenizer", "tokenizer", "--input", here / "corpus")
    assert "blocks was made from the tokens of another tokenizer than corpus.tokenizer now names" in sentence


def test_the_same_command_twice_at_once(parts, tmp_path, monkeypatch, plain):
    changes = settings(parts, compute__workers=1)
    run, plain_map, ran = Run(str(tmp_path / "run"), changes=changes), sharding.map_tasks, []

    def slower(*arguments, **named):
        if not ran:
            ran.append(None)
            ran[0] = shard(Run(str(tmp_path / "run"), changes=changes), io.StringIO())
        return plain_map(*arguments, **named)

    monkeypatch.setattr(sharding, "map_tasks", slower)
    assert shard(run, io.StringIO()) == ran[0]
    # An error that the other command does not explain stays one.
    more = write_lines(tmp_path / "more.jsonl", [{"text": "the tide met the gull"}])

    def failing(*arguments, **named):
        raise StrideError("a part is lost")

    monkeypatch.setattr(sharding, "map_tasks", failing)
    with pytest.raises(StrideError, match="a part is lost"):
        shard(Run(str(tmp_path / "run"), changes={"corpus.input": [*changes["corpus.input"], more]}))
