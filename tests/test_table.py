"""The comparison as tables and a plot: what is in them is what was measured, failed methods included."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from stride_ray.evaluate.comparison.table import SCHEMA, Entry, as_markdown, best_rival, plot, protocol, write_tables
from stride_ray.evaluate.retraining.lds import evaluate
from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.runtime.storage import Store

S, Q = 24, 8
ENTRIES = [
    Entry("LoGRA", paper=True, seconds=12.3, peak_mb=800),
    Entry("STRIDE", ours=True, default=True, seconds=2.0, peak_mb=500.4),
    Entry("TF-IDF", lexical=True),
    Entry("GradDot", paper=True),
    Entry("AirRep", paper=True, note="out of memory at 12 GB"),
]


@pytest.fixture(scope="module")
def evaluation():
    rng = np.random.default_rng(0)
    subsets = tuple(np.sort(rng.choice(40, 10, replace=False)) for _ in range(S))
    truth = RetrainingResults(subsets, rng.normal(size=(2, S, Q)).astype(np.float32), ("seed0", "seed1"))
    target = -truth.losses.mean(0).T
    noise = {"STRIDE": 0.5, "TF-IDF": 2.0, "LoGRA": 1.0, "GradDot": 300.0}
    sums = {name: target + size * rng.normal(size=target.shape) for name, size in noise.items()}
    parts = ["development", "report"] * (Q // 2)
    return truth, evaluate(sums, truth, ["same_document"] * 4 + ["held_out"] * 4, parts)


def test_parquet_has_a_row_per_method_kind_part_and_target(evaluation, tmp_path):
    _, found = evaluation
    store = Store(str(tmp_path))
    assert write_tables(store, found, ENTRIES, "header") == ["lds.parquet", "lds.md", "lds.png", "lds.svg"]
    table = pq.read_table(tmp_path / "lds.parquet")
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert len(rows) == len({(r["method"], r["kind"], r["part"], r["target"]) for r in rows}) == 5 * 9 * 2
    for row in rows:
        if row["method"] == "AirRep":
            assert row["note"] == "out of memory at 12 GB"
            assert all(row[name] is None for name in ("lds", "lds_low", "lds_high", "std", "pearson", "kendall"))
            continue
        figure = found.figure(row["method"], row["kind"], row["part"], row["target"])
        assert (row["lds"], row["lds_low"], row["lds_high"]) == (figure.lds.value, figure.lds.low, figure.lds.high)
        assert (row["pearson"], row["kendall"], row["std"]) == (figure.pearson, figure.kendall, figure.std)
    ours = next(row for row in rows if row["method"] == "STRIDE")
    assert (ours["ours"], ours["default"], ours["paper"], ours["lexical"]) == (True, True, False, False)
    assert (ours["seconds"], ours["peak_mb"]) == (2.0, 500.4)


def test_markdown_ranks_compares_and_ends_with_the_ceiling(evaluation):
    truth, found = evaluation
    text = as_markdown(found, ENTRIES, protocol("made", truth, 40))
    header, *sections = text.split("\n## ")
    for fact in ("made: pool of 40 blocks, 8 queries", "24 subsets", "α = 0.25", "2 training seed(s)", "400 draws"):
        assert fact in header
    assert len(sections) == 10
    assert sections[-1] == "Failed\n\n- AirRep: out of memory at 12 GB\n"
    section = next(each for each in sections if each.startswith("same document queries, report"))
    heads, _, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"\|", line)[1:-1]] for line in section.splitlines() if "|" in line]
    names = [line[0] for line in cells[2:]]
    assert names[0] == "**STRIDE** *"
    assert sorted(names) == ["**STRIDE** *", "GradDot", "LoGRA", "TF-IDF", "ceiling"]
    assert names[-1] == "ceiling"
    rival = best_rival(found, ENTRIES, "same_document", "report")
    assert rival == max(("TF-IDF", "LoGRA", "GradDot"), key=lambda name: _lds(found, name))
    assert rival == "LoGRA"
    assert f"− best rival ({rival})" in heads
    row = dict(zip(heads, cells[2], strict=True))
    paired = found.paired("STRIDE", "TF-IDF", "same_document", "report")
    d = paired.difference
    assert row["− TF-IDF"] == f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    assert row["÷ TF-IDF"].startswith(f"{paired.ratio.value:.2f} [")
    centred = found.figure("STRIDE", "same_document", "report", "centred").lds
    assert row["centred"].startswith(f"{centred.value:.3f} [")
    values = [float(line[1].split()[0]) for line in cells[2:-1]]
    assert values == sorted(values, reverse=True)
    ceiling = found.ceiling("same_document", "report")
    assert cells[-1][1] == f"{ceiling.value:.3f} [{ceiling.low:.3f}, {ceiling.high:.3f}]"
    assert lines


def _lds(found, method):
    return found.figure(method, "same_document", "report").lds.value


def test_the_best_rival_may_be_lexical_and_is_compared_with_once(evaluation):
    _, found = evaluation
    without = [entry for entry in ENTRIES if entry.method not in ("LoGRA", "GradDot")]
    text = as_markdown(found, without, "header")
    assert "| − best rival (TF-IDF) | ÷ best rival (TF-IDF) | centred |" in text


def test_without_rivals_seeds_or_figures_tables_are_smaller(evaluation):
    truth, _ = evaluation
    one_seed = RetrainingResults(truth.subsets, truth.losses[:1], ("seed0",))
    sums = {"STRIDE": -truth.losses[0].T}
    found = evaluate(sums, one_seed, ["all"] * Q, ["all"] * Q)
    text = as_markdown(found, ENTRIES[1:2], "header")
    assert "1.000 [1.000, 1.000]" in text
    assert "\n| ceiling" not in text
    assert "− " not in text.split("## ")[1]
    nothing = evaluate({}, one_seed, ["all"] * Q, ["all"] * Q)
    assert "- STRIDE: no reason given" in as_markdown(nothing, ENTRIES[1:2], "header")
    assert plot(nothing, ENTRIES[1:2]).startswith(b"\x89PNG")


def test_plot_shows_each_method_and_is_reproducible(evaluation):
    _, found = evaluation
    svg = plot(found, ENTRIES, "svg").decode()
    for shown in ("STRIDE *", "LoGRA", "TF-IDF", "held out queries, report", "ceiling"):
        assert shown in svg
    assert "AirRep" not in svg
    assert svg == plot(found, ENTRIES, "svg").decode()
    assert plot(found, ENTRIES, "png").startswith(b"\x89PNG")
    assert "development" in plot(found, ENTRIES, "svg", part="development").decode()
