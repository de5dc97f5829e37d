"""Disks without room, names that nobody can write, folders in each other: one sentence, and nothing is lost."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from conftest import flags, settings, write_lines
from test_bad_input import shard_flags

from stride_ray.cli.exits import exit_status
from stride_ray.corpus.files import list_files
from stride_ray.runtime.errors import StrideError, Terminated
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run, refuse_inside
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import connected
from stride_ray.selection.database import Database


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk to fill: mount says {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_no_room_on_the_disk(parts, small_disk, told, plain):
    sentence = told("shard", small_disk / "run", *shard_flags(parts, parts.corpus))
    assert "No room left to write" in sentence
    assert "run the same command again" in sentence
    assert not list(small_disk.rglob("*.partial"))


def test_a_file_that_may_not_grow(parts, tmp_path, told, plain):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        sentence = told("shard", tmp_path / "run", *shard_flags(parts, parts.corpus))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "File too large" in sentence
    assert not list(tmp_path.rglob("*.partial"))


def test_no_room_for_temporary_files(small_disk, tmp_path):
    (small_disk / "full").write_bytes(bytes(64 * 1024))
    with pytest.raises(StrideError, match="needs room for its temporary files"):
        Database(str(small_disk))
    with pytest.raises(StrideError, match="set TMPDIR"):
        Database(str(tmp_path / "it's"))


def test_a_quickstart_that_cannot_be_written(small_disk, told, plain):
    (small_disk / "file").write_text("")
    assert "Not a directory" in told("quickstart", small_disk / "file")
    (small_disk / "full").write_bytes(bytes(64 * 1024))
    assert "No space left on device" in told("quickstart", small_disk / "folder")


def test_an_argument_that_is_no_text(told):
    assert "is not valid UTF-8" in told("shard", "run", "--input", "caf\udce9")


@pytest.mark.parametrize("url", ["", " ", "s3://", "file:///", "memory://", "a\0b"])
def test_a_folder_without_a_name(url, told):
    assert "names no folder" in told("status", url)
    with pytest.raises(StrideError, match="names no folder"):
        Store(url)


def test_an_input_or_options_without_a_name(parts, tmp_path, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "not-asked-for.txt").write_text("the tide met the gull")
    assert "paths, none of them empty" in told("shard", "run", "--tokenizer", parts.tokenizer, "--input", "")
    with pytest.raises(StrideError, match="An input's name is empty"):
        list_files(" ")
    assert "--config names no file" in told("fit", "run", "--config", "")


@pytest.mark.parametrize("name", ["", "../other", "a/b", ".hidden"])
@pytest.mark.parametrize("verb", ["recover", "rescore", "select", "plan"])
def test_query_sets_that_cannot_be(verb, name, told, tmp_path):
    more = {"select": ["--out", tmp_path / "out"], "plan": ["--blocks", 9, "--queries", 1, "--workers", 1]}
    assert "is not a valid name for a query set" in told(verb, tmp_path / "run", "--name", name, *more.get(verb, []))


def test_options_that_gave_no_block_are_not_kept(parts, tmp_path, told, plain):
    file = write_lines(tmp_path / "c.jsonl", [{"body": "", "text": "the tide met the gull"}])
    run = tmp_path / "run"
    given = ["--tokenizer", parts.tokenizer, "--input", file]
    assert "produced no blocks" in told("shard", run, *given, "--columns", "text=body")
    told("shard", run, *given, code=0)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/run.toml").write_text("seed = 7\n")
    assert "produced no blocks" in told("shard", tmp_path / "own", *given, "--columns", "text=body")
    assert (tmp_path / "own/run.toml").read_text() == "seed = 7\n"


def test_a_marker_that_is_none(tmp_path):
    stage = Run(str(tmp_path)).begin("blocks")
    stage.store.write("_done/part-00000.json", b"null")
    with pytest.raises(
        StrideError, match=r"part-00000\.json does not hold a JSON object; restore it, or delete it and rerun"
    ):
        stage.done()


def test_output_inside_the_input(parts, tmp_path, told, plain):
    inside = tmp_path / "corpus"
    write_lines(inside / "a.jsonl", [{"text": "the tide met the gull"}])
    items = write_lines(tmp_path / "items.jsonl", [{"question": "which gull?", "answer": "that one"}])
    given = [*flags(settings(parts, corpus__input=[str(inside)])), "--set", "scan.influence=false"]
    sentence = told("scan", tmp_path / "run", *given, "--evaluation", items, "--out", inside / "scans")
    assert f"The scan's folder {inside}/scans lies in the input {inside}" in sentence
    out = ["--out", tmp_path / "scans", "--purify", inside / "clean"]
    assert "The cleaned corpus" in told("scan", tmp_path / "run", *given, "--evaluation", items, *out)
    for folder, given_input, refused in (
        ("s3://b/corpus/out", "s3://b/corpus/", True),
        ("s3://b/corpus-2", "s3://b/corpus", False),
        ("s3://b/corpus", str(inside), False),
        (str(inside), str(inside), True),
        (str(tmp_path), str(inside), False),
    ):
        try:
            refuse_inside(Store(folder), [given_input], "It")
        except StrideError:
            assert refused, folder
        else:
            assert not refused, folder


def test_a_signal_while_ray_starts(monkeypatch):
    def start(*args, **kwargs):  # Ray's own handler
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ray.init", start)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Terminated), connected(ComputeConfig()):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_ray_that_does_not_start(monkeypatch):
    starts = []

    def late(*args, **kwargs):  # as a machine with too much to do makes it
        starts.append(kwargs)
        if len(starts) != 4:
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr("ray.init", late)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(StrideError, match=r"Ray did not start here \(The current node timed out"),
        connected(ComputeConfig()),
    ):
        pass
    assert len(starts) == 2
    with connected(ComputeConfig()):  # the second try is in time
        assert len(starts) == 4
    assert starts[3] == starts[0]


def test_sigterm_that_surfaces_as_an_interrupt_is_still_sigterm(capsys):
    """As in Ray's native calls, which raise KeyboardInterrupt in place of what a signal handler raised."""

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Terminated:
            raise KeyboardInterrupt from None

    assert exit_status("stride-ray", work) == 143
    assert "terminated (SIGTERM)" in capsys.readouterr().err

    def interrupted():
        raise KeyboardInterrupt

    assert exit_status("stride-ray", interrupted) == 130
