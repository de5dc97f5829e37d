"""Run directories: run.toml, what a stage refuses, and done-markers."""

import pickle
import time

import pytest

from stride_ray.runtime.config import FORMATS, Config, loads
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run


@pytest.fixture
def url(tmp_path):
    return str(tmp_path / "run")


def test_run_toml_is_the_configuration(url):
    run = Run(url, changes={"seed": 3, "corpus.input": ["s3://key:secret@bucket/part-?.jsonl"], "model.path": "m"})
    assert not run.store.exists("run.toml")
    run.begin("blocks")
    again = Run(url)
    assert again.config == run.config.updated({"corpus.input": ["s3://bucket/part-?.jsonl"]})
    assert again.config.corpus.tokenizer == "m"
    text = run.store.read_text("run.toml")
    assert "secret" not in text
    assert "code_version" in text
    assert "corpus_fingerprint" not in text
    run.store.write_json("blocks/manifest.json", {"fingerprint": "f00"})
    run.save()
    assert 'corpus_fingerprint = "f00"' in run.store.read_text("run.toml")
    assert loads(run.store.read_text("run.toml")) == again.config


def test_options_on_top_of_the_directorys(url):
    Run(url, changes={"seed": 3}).begin("blocks")
    assert Run(url, changes={"recover.penalty_ratio": 0.5}).config.seed == 3
    assert Run(url, Config()).config.seed == 0


def claimed(url, stage, name="", extra=None, **changes):
    """A stage's folder with some work in it."""
    opened = Run(url, changes={key.replace("__", "."): value for key, value in changes.items()}).begin(
        stage, name, **(extra or {})
    )
    opened.mark("unit", time.monotonic())
    return opened


def test_other_settings_are_refused_by_key(url):
    claimed(url, "operators", seed=1, operators__rank=8).store.write_json("manifest.json", {})
    with pytest.raises(StrideError, match=r"operators was made with operators\.rank = 8, and this command has 9"):
        Run(url, changes={"operators.rank": 9}).begin("operators")
    with pytest.raises(StrideError, match="seed = 1"):
        Run(url, changes={"seed": 2}).require("operators")
    Run(url, changes={"recover.penalty_ratio": 0.5, "compute.workers": 7}).begin("operators")
    assert Run(url).require("operators").done().keys() == {"unit"}


@pytest.mark.parametrize(
    ("of", "stages"),
    [
        ("blocks", ("blocks", "operators")),
        ("curvature", ("curvature", "exact")),
        ("operators", ("operators", "responses")),
    ],
)
def test_files_of_another_version_are_refused(url, of, stages, monkeypatch):
    monkeypatch.setitem(FORMATS, of, FORMATS[of] - 1)
    for stage in stages:
        claimed(url, stage)
    monkeypatch.undo()
    for stage in stages:
        with pytest.raises(StrideError, match=f"{stage} was made by another version of stride-ray; use another folder"):
            Run(url).begin(stage)


def test_other_input_is_refused(url):
    claimed(url, "responses", "asked", {"corpus": "c", "queries": "q"})
    Run(url).begin("responses", "asked", corpus="c", queries="q")
    for other, told in (("queries", "other queries"), ("corpus", "other blocks")):
        with pytest.raises(StrideError, match=f"responses/asked was made from {told}"):
            Run(url).begin("responses", "asked", **{"corpus": "c", "queries": "q", other: "x"})
    Run(url).begin("responses", "another", corpus="c", queries="x")


def test_a_folder_without_work_may_be_claimed_anew(url):
    Run(url, changes={"model.dtype": "float16"}).begin("operators")
    Run(url, changes={"model.dtype": "bfloat16"}).begin("operators").mark("unit", time.monotonic())
    with pytest.raises(StrideError, match="'bfloat16'"):
        Run(url, changes={"model.dtype": "float16"}).begin("operators")


def test_markers_count_for_their_own_settings(url):
    stage = claimed(url, "blocks")
    marker = stage.mark("part-1", time.monotonic() - 2, counts={"blocks": 3}, sha256="x")
    assert stage.done()["part-1"] == marker
    assert (marker["counts"], 2 <= marker["seconds"] < 60) == ({"blocks": 3}, True)
    assert list(stage.done()) == ["part-1", "unit"]
    other = Run(url, changes={"corpus.block_tokens": 64}).stage("blocks")
    assert other.done() == {}


def test_what_is_missing_is_named(url):
    with pytest.raises(StrideError, match="blocks is not finished; run 'stride-ray shard' first"):
        Run(url).require("blocks")


def test_a_broken_run_toml_is_named(tmp_path):
    (tmp_path / "run.toml").write_text("[fit]\nstepz = 1\n")
    with pytest.raises(StrideError, match=r"run\.toml has the key 'fit\.stepz'"):
        Run(str(tmp_path))


def test_a_run_may_lie_in_memory():
    run = Run("memory://runs/one", changes={"seed": 9})
    run.begin("blocks").mark("unit", time.monotonic())
    assert Run("memory://runs/one").config.seed == 9
    assert list(Run("memory://runs/one").stage("blocks").done()) == ["unit"]
    run.store.remove("")


def test_who_lost_a_folder_to_another_command_writes_nothing_more(url, tmp_path):
    first = Run(url, changes={"seed": 1}).begin("operators", corpus="c")
    first.store.write("basis.json", b"of the first")
    first.store.remove("basis.json")
    second = Run(url, changes={"seed": 2}).begin("operators", corpus="c")  # no unit is done: it may
    travelled = pickle.loads(pickle.dumps(first))  # as to a worker
    (tmp_path / "data").write_bytes(b"data")
    for write in (
        lambda: travelled.store.write("basis.json", b"x"),
        lambda: travelled.store.child("fitted").put("A.safetensors", str(tmp_path / "data")),
        lambda: travelled.mark("unit", time.monotonic()),
        lambda: travelled.store.remove("stage.json"),
    ):
        with pytest.raises(StrideError, match="operators was taken by another command, with other settings"):
            write()
    assert second.store.names() == ["stage.json"]
    second.mark("unit", time.monotonic())
    assert list(Run(url, changes={"seed": 2}).begin("operators", corpus="c").done()) == ["unit"]
