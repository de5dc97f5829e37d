"""Peers on one machine: our own tool measured from start to end, a peer's scores read, seconds set beside seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_compare import made  # noqa: F401 - a benchmark with retraining results

from benchmarks.peers import measure
from benchmarks.peers.measure import compare_peers, ratios, table
from benchmarks.peers.tools import TOOLS, ToolPaths
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.lds import evaluate, subset_sums
from stride_ray.runtime.errors import StrideError


@pytest.mark.cluster
def test_our_tool_is_measured_as_a_user_starts_it(made, tmp_path):  # noqa: F811
    found = compare_peers(made, str(tmp_path), [1], ["STRIDE, exact"])
    (row,) = found["rows"]
    assert row["blocks"] == 40
    assert row["seconds"] > 1
    assert row["peak_bytes"] > 2**28  # torch alone is more than that
    assert row["stored_bytes"] >= sum(p.stat().st_size for p in tmp_path.rglob("run/exact/asked/*.parquet")) > 0
    benchmark, scores = read_benchmark(made), np.load(tmp_path / "STRIDE, exact-1/scores.npy")
    truth = benchmark.retrained()
    again = evaluate({"a": subset_sums(scores, truth.subsets)}, truth, benchmark.kinds, benchmark.parts)
    assert row["lds"]["report, near"][0] == again.figure("a", "near", "report").lds.value
    assert np.count_nonzero(scores) > scores.size / 2
    assert compare_peers(made, str(tmp_path), [1], ["STRIDE, exact"])["rows"] == found["rows"]
    assert "| STRIDE, exact | 40 |" in table(found)


def test_scores_of_a_peer_are_read_column_by_column(tmp_path):
    names = [f"{kind}_{i}" for i in range(3) for kind in ("score", "written")]
    kind = np.dtype(
        {"names": names, "formats": ["float32", "bool"] * 3, "offsets": [0, 4, 8, 12, 16, 20], "itemsize": 24}
    )
    rows = np.zeros(5, kind)
    expected = np.random.default_rng(0).random((3, 5), dtype=np.float32)
    for i, column in enumerate(expected):
        rows[f"score_{i}"] = column
    folder = tmp_path / "score"
    folder.mkdir()
    rows.tofile(folder / "scores.bin")
    told = {"names": names, "formats": ["float32", "bool"] * 3, "offsets": [0, 4, 8, 12, 16, 20], "itemsize": 24}
    (folder / "info.json").write_text(json.dumps({"num_rows": 5, "dtype": told}))
    place = ToolPaths("python", "model", "pool", "queries", str(tmp_path), "run.toml", "asked")
    quick = next(tool for tool in TOOLS if tool.name == "bergson, quick start")
    np.testing.assert_array_equal(quick.scores(place, 3, 5), expected)
    for command in (each for tool in TOOLS for each in tool.commands(place)):
        assert all(isinstance(part, str) for part in command)


def test_ratios_are_of_pools_of_one_size():
    rows = [
        {"tool": "peer", "ours": False, "blocks": 10, "seconds": 30.0},
        {"tool": "peer", "ours": False, "blocks": 40, "seconds": 99.0},
        {"tool": "own", "ours": True, "blocks": 10, "seconds": 3.0},
    ]
    assert ratios(rows) == {"peer / own at 10": 10.0}


def test_a_tool_that_is_not_known_is_told(tmp_path):
    with pytest.raises(StrideError, match="Unknown tool 'stride' to compare with; there are: bergson, quick start; "):
        compare_peers("nowhere", str(tmp_path), [1], ["stride"])


def test_a_tool_that_fails_is_named_with_its_last_line(tmp_path):
    command = ["python3", "-c", "import sys; print('first'); sys.exit('no such model')"]
    with pytest.raises(StrideError, match=r"ended with status 1: .*no such model.*; see .*log"):
        measure._checked(command, Path(tmp_path, "log"))
