"""The job that strikes runs: it sees a byte that differs, and one round of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import STAGES, Round, counted, data_files, describe

ROOT = Path(__file__).parent.parent


def test_a_byte_that_differs_and_a_file_that_is_missing_are_seen(tmp_path):
    for run, last in (("one", b"a"), ("two", b"b")):
        folder = tmp_path / run / "exact" / "asked"
        folder.mkdir(parents=True)
        (folder / "influence-00000.parquet").write_bytes(b"same" + last)
        (folder / "manifest.json").write_bytes(last)  # holds times: not compared
        (folder / "documents-00000.parquet").write_bytes(b"same")
    (tmp_path / "two/exact/asked/documents-00000.parquet").unlink()
    one, two = (data_files(tmp_path / run) for run in ("one", "two"))
    differ = {name for name, _ in one.items() ^ two.items()}
    assert differ == {"exact/asked/influence-00000.parquet", "exact/asked/documents-00000.parquet"}


def test_rounds_are_told_and_counted():
    good = Round((("node", "fit"), ("driver", "exact")), 2, 60.0, ())
    bad = Round((("node", "fit"),), 1, 50.0, ("exact/asked/influence-00000.parquet",))
    lost = Round((), 3, 900.0, (), "it did not end within 900 s")
    assert [each.equal for each in (good, bad, lost)] == [True, False, False]
    assert describe(good) == "node in fit, driver in exact; 2 driver(s), 60 s; equal"
    assert "1 files differ" in describe(bad)
    assert "did not end" in describe(lost)
    assert counted([good, bad, lost]) == {"driver in exact": 1, "node in fit": 2}


@pytest.mark.cluster
def test_one_round(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "benchmarks", "chaos", "--rounds", "1", "--out", str(tmp_path), "--seed", "7"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] == found["rounds"] == 1
    assert sum(found["strikes"].values()) > 0
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert json.loads(again.stdout.splitlines()[-1]) == found  # the same seconds: nothing was done again
    assert {name.split(" in ")[1] for name in found["strikes"]} <= {*STAGES, "start"}
