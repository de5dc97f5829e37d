"""Anything killed at any moment: the stages finish, at once or when run again, and every data file has the same bytes.

One driver process runs all stages over many small units while this one watches the run directory, and kills: a worker
in the middle of each stage, and the driver itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import data_files, documents, flags, run_plainly, settings, write_lines

from stride_ray.cli.main import main
from stride_ray.runtime.run import Run

DRIVER = """
import sys
from stride_ray.cli.main import main
from stride_ray.runtime.tasks import start_ray

start_ray(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
folder, queries, *options = sys.argv[1:]
# attribute is respond, recover and rescore in one pool of workers, which alone each starts anew.
verbs = [["shard", folder, *options], ["fit", folder], ["attribute", folder, "--queries", queries, "--name", "asked"]]
sys.exit(max(main(verb) for verb in verbs))
"""
# Stage, where its done-markers are, and the title of a process that works for it.
STAGES = [
    ("shard", "blocks/_tokenised/_done", "ray::MapWorker"),
    ("fit", "operators/_done", "ray::_PoolActor.work"),
    ("respond", "responses/asked/_done", "ray::_PoolActor.work"),
    ("recover", "estimates/asked/_done", "ray::_PoolActor.work"),
]
UNITS = {"shard": 120, "fit": 4, "respond": 20, "recover": 5}


@pytest.fixture(scope="module")
def big(parts, tmp_path_factory):
    """Options and queries that give every stage enough units to be interrupted in."""
    root = tmp_path_factory.mktemp("big")
    corpus = write_lines(root / "corpus.jsonl", [{"text": text} for text in documents(720, seed=5)])
    queries = write_lines(root / "queries.jsonl", [{"text": text} for text in documents(320, seed=6)])
    more = {"corpus__input": [corpus], "compute__batch_tokens": 64, "respond__mode": "exact"}
    return settings(parts, **more), queries


@pytest.fixture(scope="module")
def undisturbed(big, tmp_path_factory):
    """Data files of the same run in a plain loop."""
    options, queries = big
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    patch = pytest.MonkeyPatch()
    run_plainly(patch)
    try:
        assert main(["shard", str(folder), *flags(options)]) == 0
        assert main(["fit", str(folder)]) == 0
        assert main(["respond", str(folder), "--queries", queries, "--name", "asked"]) == 0
        assert main(["recover", str(folder), "--name", "asked"]) == 0
        assert main(["rescore", str(folder), "--name", "asked"]) == 0
    finally:
        patch.undo()
    for stage, markers, _ in STAGES[1:]:
        assert len(list((folder / markers).glob("*.json"))) >= UNITS[stage]
    return data_files(folder)


def all_stages(big, folder):
    options, queries = big
    return [sys.executable, "-c", DRIVER, str(folder), queries, *flags(options)]


def start(command, log, markers):
    """A driver that has left a done-marker."""
    with open(log, "w") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        await_markers(markers, 1, driver, log)
    except BaseException:
        kill_family(driver)
        raise
    return driver


def await_markers(folder, count, driver, log, limit=300):
    """Until a stage has so many done-markers; the driver must not end before."""
    until = time.monotonic() + limit
    while len(list(folder.glob("*.json"))) < count:
        assert driver.poll() is None, f"the driver ended early: {Path(log).read_text()[-3000:]}"
        assert time.monotonic() < until, f"no {count} markers in {folder}: {Path(log).read_text()[-3000:]}"
        time.sleep(0.005)


def kill_family(driver):
    """End what a killed driver may leave behind: its session is its own, so its processes are known by that."""
    mine = [each for each in psutil.process_iter() if _session(each.pid) == driver.pid]
    for each in mine:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(mine, timeout=20)


def _session(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def worker_of(driver, title, stage, limit=60):
    """A process of the driver's Ray that is busy with a unit, by the title that Ray gives it while it is.

    Between two units a process has another title, so one look may find nobody at work.
    """
    until = time.monotonic() + limit
    while time.monotonic() < until and driver.poll() is None:
        for each in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(each.cmdline()).startswith(title):
                    return each
    raise AssertionError(f"no {title} at work in {stage}")


def kill_worker(driver, folder, stage, markers, title, log):
    """Kill a worker in the middle of a stage."""
    await_markers(folder / markers, 1, driver, log)
    found = worker_of(driver, title, stage)
    done = len(list((folder / markers).glob("*.json")))
    found.send_signal(signal.SIGKILL)
    assert done < UNITS[stage], f"{stage} was through already"


def times_of(paths):
    """When each file was written, of those that are there."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime_ns
    return found


def test_a_driver_that_is_told_to_stop_says_so(big, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [str(Path(sys.executable).with_name("stride-ray")), "shard", str(folder), *flags(big[0])]
    driver = start(command, log, folder / "blocks/_done")
    try:
        driver.terminate()
        assert driver.wait(60) == 143
    finally:
        kill_family(driver)
    told = log.read_text()
    assert "terminated (SIGTERM); run the same command again to go on" in told
    assert "SIGABRT" not in told
    assert "Traceback" not in told


def test_killed_workers_are_replaced_and_a_killed_driver_goes_on_where_it_was(big, undisturbed, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    driver = start(all_stages(big, folder), log, folder / STAGES[0][1])
    try:
        kill_worker(driver, folder, *STAGES[0], log)
        fit_markers = folder / STAGES[1][1]
        await_markers(fit_markers, 1, driver, log)
        driver.send_signal(signal.SIGKILL)
        driver.wait(20)
    finally:
        kill_family(driver)
    assert 0 < len(list(fit_markers.glob("*.json"))) < UNITS["fit"], "fit was through already"
    before = times_of([*folder.rglob("part-*.parquet"), *folder.rglob("sum-*.safetensors")])
    assert {path.suffix for path in before} == {".parquet", ".safetensors"}
    driver = start(all_stages(big, folder), log, fit_markers)
    try:
        kill_worker(driver, folder, *STAGES[1], log)
        assert times_of(before).items() <= before.items(), "finished units were done again"  # fit's sums go at its end
        for stage in STAGES[2:]:
            kill_worker(driver, folder, *stage, log)
        assert driver.wait(240) == 0, log.read_text()[-3000:]
    finally:
        kill_family(driver)
    assert data_files(folder) == undisturbed
    parts = times_of(before)
    assert parts
    assert parts.items() <= before.items(), "finished units were done again"
    assert not list(folder.glob("operators/sum-*"))
    # A killed process leaves the file that it was writing, which nobody reads.
    assert len(list(folder.rglob("*.partial"))) <= len(STAGES) + 1
    assert Run(str(folder)).stage("operators").store.read_json("manifest.json")["learned"]
