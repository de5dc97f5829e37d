"""Recall of shortlists: one pass says what exact influence and rows of any size say by themselves."""

import numpy as np
import pytest
import torch
from conftest import documents, write_lines
from test_compare import write_benchmark

from benchmarks import recall
from benchmarks.recall import measure_recall, table
from stride_ray.corpus.blocks import Blocks
from stride_ray.models.curvature.kfac import SITES, load_sites
from stride_ray.models.curvature.sketch import sketch_sites, sketched_gradients, whole_shape
from stride_ray.models.loading import load_measured_model
from stride_ray.models.sites import site_gradients
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run


@pytest.fixture(scope="module")
def measured(parts, tmp_path_factory):
    """A benchmark's pool extended from 40 to 60 blocks."""
    root = tmp_path_factory.mktemp("recall")
    (root / "made").mkdir()
    made = write_benchmark(root / "made", parts.model)
    texts = write_lines(root / "texts/more.jsonl", [{"text": text} for text in documents(60, seed=3)])
    with pytest.MonkeyPatch.context() as patch:
        from conftest import run_plainly

        run_plainly(patch)
        patch.setattr(recall, "CANDIDATES", (10, 25, 50))
        found = measure_recall(made, [texts], str(root / "out"), (40, 60), (60, 4000))
        told = table(found)
    return root, made, texts, found, told


def test_recall_is_told_by_size_and_source(measured):
    _, _, _, found, told = measured
    rows = {(row["blocks"], row["source"]): row for row in found["rows"]}
    sources = {"TF-IDF", "60", "4000", "60 and TF-IDF", "4000 and TF-IDF"}
    assert set(rows) == {(n, source) for n in (40, 60) for source in sources}
    for row in rows.values():
        assert 0 <= row["10 of 10"] <= row["10 of 25"] <= row["10 of 50"] <= 1
    assert rows[40, "60"]["10 of 50"] == 1  # all blocks are candidates
    assert rows[60, "4000"]["10 of 10"] > rows[60, "60"]["10 of 10"]
    assert rows[60, "4000"]["10 of 10"] > 0.8
    assert "| 60 | 60 bytes a block and TF-IDF in turns |" in told


def test_a_sketch_of_whole_gradients_is_the_sketch_of_a_pass(measured):
    root, *_ = measured
    run = Run(str(root / "out/run"))
    sites = load_sites(run.store.child("curvature"), SITES, "cpu")
    model = load_measured_model(run.config, "cpu")
    sketches = sketch_sites(sites, [(min(5, F), min(7, D)) for F, D in map(whole_shape, sites)], 0)
    batch = Blocks(run.stage("blocks").store).batch(np.arange(8))
    given = (torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
    pieces, _ = sketched_gradients(model, sketches, *given)
    for (_, J), sketch, piece in zip(site_gradients(model, sites, *given)[0], sketches, pieces, strict=True):
        torch.testing.assert_close(sketch.whiten(J).flatten(1), piece, rtol=1e-3, atol=1e-3 * float(piece.abs().max()))


def test_too_few_texts_are_told(measured, plain):
    root, made, texts, *_ = measured
    with pytest.raises(StrideError, match=r"The texts make \d+ blocks, and 9960 are needed"):
        measure_recall(made, [texts], str(root / "short"), (10_000,), (60,))
