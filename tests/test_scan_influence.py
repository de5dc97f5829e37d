"""Both channels through Ray on a tiny model: ties, controls, what is asked again, verdicts, and what is refused."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from conftest import documents, run_plainly, settings, write_lines

from stride_ray.contamination.influence.channel import TIES, _Reference, item_p_values, query_table
from stride_ray.contamination.items import Item, read_set
from stride_ray.contamination.lexical.channel import MATCHES, Lexical
from stride_ray.contamination.nightly import scan
from stride_ray.contamination.verdicts import VERDICTS, verdicts
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
LEAKED = documents(48)[1]


def items_of(place, name, rows):
    return read_set(write_lines(place / f"{name}.jsonl", rows), name)


@pytest.fixture(scope="module")
def scanned(parts, sharded, tmp_path_factory):
    """A night of a tiny run with exact influence through Ray, and one with new items in a plain loop."""
    place = tmp_path_factory.mktemp("scan")
    shutil.copytree(parts.corpus, place / "corpus")
    folder = sharded("scan")
    changes = settings(parts, attribute__exact=True, corpus__input=[str(place / "corpus")], compute__workers=1)
    run = Run(str(folder), changes=changes)
    half = len(LEAKED) // 2
    rows = [
        {"id": "leaked", "question": LEAKED[:half], "answer": LEAKED[half:]},
        {"id": "fresh", "question": "Did the keel meet the dough?", "answer": "the dough met the keel"},
        {"id": "long", "question": "the tide " * 200, "answer": "no"},
    ]
    controls = items_of(place, "controls", [{"text": text} for text in documents(24, seed=5)])
    first = scan(run, [items_of(place, "asked", rows)], str(place / "scans"), [controls], "n1")
    more = items_of(place, "asked", [*rows, {"id": "later", "question": "What met the gull?", "answer": "the tide"}])
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        second = scan(run, [more], str(place / "scans"), [controls], "n2")
    return SimpleNamespace(
        place=place, run=run, folder=folder, first=first, second=second, controls=controls, sets=more
    )


def table(scanned, night):
    return {r["item_id"]: r for r in scanned.place.joinpath("x") and _rows(scanned.place / f"scans/nights/{night}")}


def _rows(folder):
    found = Store(str(folder)).read_table("verdicts.parquet")
    assert found.schema.equals(VERDICTS)
    return found.to_pylist()


def test_every_item_has_a_verdict_with_its_evidence(scanned):
    rows = table(scanned, "n1")
    leaked, fresh, long = rows["leaked"], rows["fresh"], rows["long"]
    assert leaked["verdict"] in ("lexical", "both")
    assert leaked["overlap"] == 1.0
    assert fresh["verdict"] == "clean"
    assert fresh["overlap"] < 0.3
    for row in (leaked, fresh):
        assert 0 < row["p"] <= row["q"] <= 1
        assert row["loss"] > 0
        assert 0 < row["share"] <= 1
        assert row["tied_document"]
    assert (long["contrast"], long["p"]) == (None, None)
    assert "the model's context is" in long["error"]
    assert scanned.first["influence"]["failed"] == 1
    report = (scanned.place / "scans/nights/n1/report.md").read_text()
    assert "24 control items" in report
    assert "suspicion, never proof" in report


def test_only_new_items_are_asked_and_a_night_over_nothing_new_asks_none(scanned):
    assert (scanned.first["influence"]["asked"], scanned.second["influence"]["asked"]) == (3, 1)
    third = scan(scanned.run, [scanned.sets], str(scanned.place / "scans"), [scanned.controls], "n3")
    assert third["did"] == {"searched_units": 0, "searched_items": 0, "asked_items": 0}
    assert third["seconds"] < 10
    first, third_rows = table(scanned, "n1"), table(scanned, "n3")
    assert all(third_rows[name]["contrast"] == row["contrast"] for name, row in first.items())


def test_another_checkpoint_is_asked_anew_and_words_are_not(scanned, parts, sharded, plain):
    folder = sharded("other")
    changes = settings(parts, attribute__exact=True, corpus__input=[str(scanned.place / "corpus")], seed=7)
    run = Run(str(folder), changes=changes)
    found = scan(run, [scanned.sets], str(scanned.place / "scans"), [scanned.controls], "n4")
    assert found["did"] == {"searched_units": 0, "searched_items": 0, "asked_items": 4}
    assert found["influence"]["checkpoint"] != scanned.first["influence"]["checkpoint"]


def test_without_enough_controls_nothing_is_claimed(scanned, plain):
    run, out = scanned.run, str(scanned.place / "few")
    with pytest.raises(StrideError, match=r"control items, and 0 are given.*--control.*scan\.influence=false"):
        scan(run, [scanned.sets], out)
    few = items_of(scanned.place, "few", [{"text": text} for text in documents(2, seed=9)])
    with pytest.raises(StrideError, match="control items, and 2 are given"):
        scan(run, [scanned.sets], out, [few])
    long = items_of(scanned.place, "long", [{"text": f"{i} {'tide ' * 600}"} for i in range(30)])
    with pytest.raises(StrideError, match=r"Only 0 control items could be measured .*the model's context is"):
        scan(run, [scanned.sets], out, [long])
    assert not Store(out).exists("latest.json")


def test_a_run_without_blocks_is_told(parts, tmp_path, plain):
    run = Run(str(tmp_path / "run"), changes=settings(parts))
    items, others = (
        items_of(tmp_path, name, [{"text": f"the tide met the {name} {i}"} for i in range(20)])
        for name in ("gull", "keel")
    )
    with pytest.raises(StrideError, match="stride-ray shard"):
        scan(run, [items], str(tmp_path / "scans"), [others])
    assert not (tmp_path / "scans/latest.json").exists()


def test_estimated_influence_serves_too(scanned, finished, tmp_path, plain):
    run = Run(str(finished.folder), changes={"attribute.exact": False})
    found = scan(run, [scanned.sets], str(tmp_path / "scans"), [scanned.controls])
    assert found["influence"]["mode"] == "estimated"
    assert found["influence"]["controls"] == 24


def test_a_contrast_is_taken_block_by_block(monkeypatch):
    from stride_ray.contamination.influence import channel as influence

    rng = np.random.default_rng(0)
    W = rng.normal(0, 1, (12, 8))
    W[:, 0] = 9 + 0.1 * rng.normal(size=12)  # this block moves every item

    def parts_of(run, name):
        rows = [{"query_id": f"c{i}", "ordinal": j, "influence": W[i, j]} for i in range(12) for j in range(8)]
        yield pa.Table.from_pylist(rows), None

    monkeypatch.setattr(influence, "influence_parts", parts_of)
    reference = _Reference(None, "controls")

    def contrast(values, control=False):
        rows = [
            {"ordinal": j, "influence": v, "block_id": j, "document_id": f"d{j}", "source": "s"}
            for j, v in enumerate(values)
        ]
        return reference.contrast(rows, control)

    item = W[0].copy()
    item[3] = 12
    found = contrast(item)
    assert (found["ordinal"], found["document_id"]) == (3, "d3")
    assert found["share"] == pytest.approx(12 / np.abs(item).sum())
    scaled = W / np.median(np.abs(W), 1, keepdims=True)
    mean, spread = scaled.mean(0), scaled.std(0)
    floor = np.median(spread)
    expected = (item / np.median(np.abs(item)) - mean) / (spread + floor)
    assert found["contrast"] == pytest.approx(expected.max())
    assert contrast(100 * item)["contrast"] == pytest.approx(found["contrast"])  # how hard it pulls does not matter
    rest = scaled[1:]
    own = ((scaled[0] - rest.mean(0)) / (rest.std(0) + floor)).max()
    assert contrast(W[0], control=True)["contrast"] == pytest.approx(own)
    assert contrast([*item, 30.0])["ordinal"] == 8  # a block that no control names


def test_a_leak_is_low_in_loss_and_tied_and_neither_alone_is_enough():
    rng = np.random.default_rng(0)
    rows = [
        {"key": f"k{i}", "control": i >= 5, "contrast": 4 + rng.random(), "loss": 2 + rng.random()} for i in range(205)
    ]
    rows[0] |= {"contrast": 6.0, "loss": 1.2}
    rows[1] |= {"contrast": 6.0, "loss": 3.5}  # a relative of what leaked
    rows[2] |= {"contrast": 3.0, "loss": 1.2}  # an easy one
    rows[3] |= {"contrast": None, "loss": None}
    p = item_p_values(pa.Table.from_pylist(rows, TIES))
    assert p["k0"] < 1e-3
    assert p["k3"] == 1
    assert min(p["k1"], p["k2"], p["k4"]) > 0.01


def test_verdicts_tell_both_channels_apart():
    items = [Item(name, "s", name, "f", i, name, (), "") for i, name in enumerate("abcd")]
    row = {"set": "s", "field": "question", "item_start": 0, "item_stop": 1, "source": "x", "file": "x", "place": 0}
    row |= {"part": "text", "start": 0, "stop": 1, "excerpt": "a", "excerpt_start": 0}
    hits = [
        {
            **row,
            "item_id": key,
            "key": key,
            "document_id": f"{key}1",
            "overlap": overlap,
            "kind": "copy" if overlap > 0.3 else "part",
            "near": False,
        }
        for key, overlap, kind in (("a", 0.9, "copy"), ("b", 0.8, "copy"), ("c", 0.1, "part"))
    ]
    overlaps = {hit["key"]: hit["overlap"] for hit in hits}
    # Ids start again in another file, and come twice in one: other documents, not further runs in the same one.
    hits += [{**hits[0], "source": "y", "file": "y"}, {**hits[0], "place": 70}, {**hits[0], "part": "answer"}]
    lexical = Lexical(pa.Table.from_pylist(hits, MATCHES), overlaps, 9, 0, (), 0, 0, 0, 0, frozenset())
    controls = [{"key": f"k{i}", "control": True, "loss": 3.0 + i, "contrast": 1 + i / 40} for i in range(40)]
    asked = [
        {"key": key, "control": False, "loss": loss, "contrast": contrast}
        for key, loss, contrast in (("b", 0.1, 99.0), ("c", 9.0, 99.0), ("d", 40.0, 1.2))
    ]
    ties = pa.Table.from_pylist(controls + asked, TIES)
    found = verdicts(items, lexical, ties, 0.05, {"b": "lexical"}).to_pylist()
    assert [r["verdict"] for r in found] == ["lexical", "both", "influence", "clean"]
    assert [r["before"] for r in found] == [None, "lexical", None, None]
    assert [r["memorised"] for r in found] == [None, True, False, False]
    assert [r["documents"] for r in found] == [3, 1, 0, 0]
    assert (found[0]["first_source"], found[0]["first_document"]) == ("y", "a1")
    assert (found[2]["first_source"], found[2]["first_document"]) == ("x", "c1")
    assert item_p_values(ties)["b"] == pytest.approx(1 / 41)
    assert [r["verdict"] for r in verdicts(items, lexical, None, 0.05, {}).to_pylist()] == ["lexical"] * 2 + [
        "clean"
    ] * 2


def test_items_are_asked_for_their_answers(scanned):
    rows = query_table(
        scanned.run,
        [
            Item("a", "s", "a", "f", 0, "the tide", (), "met the gull"),
            Item("b", "s", "b", "f", 1, "the tide met the gull", (), ""),
            Item("c", "s", "c", "f", 2, "", (), ""),
        ],
    ).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert not rows[0]["loss_mask"][0]
    assert rows[0]["loss_mask"][-1]
    assert all(rows[1]["loss_mask"])
