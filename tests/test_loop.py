"""The one-pass fit beside the trained loop: loops of doubled steps, one level, one ratio."""

import pytest
from test_compare import made  # noqa: F401 - a benchmark with retraining results

from benchmarks import loop
from benchmarks.loop import measure_loop, table
from stride_ray.runtime.storage import Store


@pytest.mark.cluster
def test_loops_are_measured_beside_the_one_pass_and_kept(made, one_ray, tmp_path, monkeypatch):  # noqa: F811
    found = measure_loop(made, str(tmp_path), "gate", 2, 4)
    assert [each["steps"] for each in found["loops"]] == [2, 4]
    compared = found["loops"][-1]
    assert found["plateau"] is None  # which takes three
    assert found["ratio_loop"] == pytest.approx(compared["seconds"] / found["once"]["seconds"])
    assert found["once"]["gap"] != found["loops"][0]["gap"] != found["loops"][1]["gap"]
    assert set(found["once"]["lds"]) >= {"report, near", "development, far"}
    assert "| 4 steps |" in table(found)
    monkeypatch.setattr(loop, "score", None)
    assert measure_loop(made, str(tmp_path), "gate", 2, 4) == found


@pytest.mark.parametrize(
    ("gaps", "plateau"),
    [
        ([0.1, 0.2, 0.201, 0.202], 200),
        ([0.1, 0.2, 0.4, 0.8], None),
        ([0.2, 0.201, 0.1], 100),
        ([0.1, 0.104, 0.108, 0.112], None),  # slow but sure: no doubling shows it, two do
    ],
)
def test_the_shortest_loop_at_the_level_counts(gaps, plateau, made, plain, tmp_path, monkeypatch):  # noqa: F811
    def measured(benchmark, store: Store, name, changes):
        steps = changes.get("fit.steps", 0)
        gap = gaps[(steps // 100).bit_length() - 1] if steps else 0.0
        return {"seconds": float(steps or 10), "gap": gap, "gap_error": 0.002, "lds": {}}

    monkeypatch.setattr(loop, "_measured", measured)
    found = measure_loop(made, str(tmp_path), "gate", 100, 800)
    assert found["plateau"] == plateau
    assert found["ratio_loop"] == (plateau or 800) / 10
