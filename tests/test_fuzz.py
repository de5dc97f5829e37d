"""The benchmark that corrupts files: it sees a traceback and a loss, and finds none in a few seconds."""

import pytest

from benchmarks import fuzz as module
from benchmarks.fuzz import fuzz
from stride_ray.corpus.readers import Rejected


@pytest.mark.parametrize("target", ["inputs", "config"])
def test_nothing_is_found_in_a_second(target, tmp_path):
    found = fuzz(target, str(tmp_path), 1.0, seed=1)
    assert found.faults == {}
    assert found.tried > 5
    assert found.refused > 0


def test_lost_rows_and_tracebacks_are_seen_and_kept(tmp_path, monkeypatch):
    read = module.read
    monkeypatch.setattr(
        module, "read", lambda *given: [item for item in read(*given) if not isinstance(item, Rejected)][:-1]
    )
    found = fuzz("inputs", str(tmp_path), 1.0)
    assert any("silence" in fault or "neither" in fault for fault in found.faults)
    monkeypatch.setattr(module, "read", lambda *given: 1 / 0)
    found = fuzz("inputs", str(tmp_path), 0.5)
    assert any(fault.startswith("ZeroDivisionError") for fault in found.faults)
    assert list((tmp_path / "faults").iterdir())
