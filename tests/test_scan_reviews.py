"""Reviews of alarms: kept, honoured by later nights until more leaks, and exported."""

import json
import shutil

import pytest
from conftest import run_plainly, write_lines

from stride_ray.cli.main import main
from stride_ray.contamination.items import read_set
from stride_ray.contamination.nightly import scan
from stride_ray.contamination.purify import purify
from stride_ray.contamination.reviews import import_reviews, last_reviews
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

QUESTIONS = [
    f"Which {thing} did the old ferryman of the northern lake lend to his {who} on the first Sunday in May"
    for thing, who in (("lantern", "nephew"), ("anchor", "daughter"))
] + ["How many of the seven old bridges of the town can one cross without crossing any of them twice"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a corpus that leaks two of three items, and the items."""
    run_plainly(monkeypatch)
    write_lines(tmp_path / "corpus/a.jsonl", [{"text": f"So: {question}?"} for question in QUESTIONS[:2]])
    items = [{"id": f"i{i}", "question": question, "answer": f"none {i}"} for i, question in enumerate(QUESTIONS)]
    write_lines(tmp_path / "items.jsonl", items)
    return tmp_path


def run_of(place):
    return Run(str(place / "run"), changes={"corpus.input": str(place / "corpus"), "scan.influence": False})


def night(place, name):
    done = scan(run_of(place), [read_set(str(place / "items.jsonl"))], str(place / "scans"), night=name)
    table = Store(str(place / "scans")).read_table(f"nights/{name}/verdicts.parquet")
    return done, {row["item_id"]: row for row in table.to_pylist()}


def review(row, said, at="2026-01-01T00:00:00.000Z"):
    """A row as the page saves it."""
    kept = {name: row[name] for name in ("set", "item_id", "key", "question", "leaked")}
    return {**kept, "night": "n1", "verdict": row["alarm"], "overlap": row["overlap"], "review": said, "at": at}


def test_a_false_alarm_is_not_raised_again_until_more_leaks_and_a_leak_stays(place):
    first, rows = night(place, "n1")
    assert (first["status"], first["new"]) == (2, 2)
    assert [rows[f"i{i}"]["leaked"] for i in range(3)] == ["question", "question", ""]
    file = write_lines(place / "reviews.jsonl", [review(rows["i0"], "false"), review(rows["i1"], "true")])
    assert main(["scan", "review", str(place / "scans"), file]) == 0
    second, rows = night(place, "n2")
    assert (second["status"], second["new"], second["resolved"]) == (0, 0, 1)
    assert [(rows[i]["verdict"], rows[i]["alarm"], rows[i]["review"]) for i in ("i0", "i1", "i2")] == [
        ("clean", "lexical", "false"),
        ("lexical", "lexical", "true"),
        ("clean", "clean", None),
    ]
    # Another copy of the question is the same alarm; one with the answer is not.
    write_lines(place / "corpus/b.jsonl", [{"text": QUESTIONS[0]}])
    assert night(place, "n3")[0]["status"] == 0
    write_lines(place / "corpus/c.jsonl", [{"text": f"{QUESTIONS[0]}? none 0"}])
    fourth, rows = night(place, "n4")
    assert (fourth["status"], fourth["new"]) == (2, 1)
    assert (rows["i0"]["leaked"], rows["i0"]["review"]) == ("question and answer", None)


def test_the_last_review_counts_and_all_are_exported(place, capsys):
    _, rows = night(place, "n1")
    for at, said in (("2026-01-02T00:00:00Z", "false"), ("2026-01-01T00:00:00Z", "true")):
        file = write_lines(place / f"{said}.jsonl", [review(rows["i0"], said, at)])
        assert main(["scan", "review", str(place / "scans"), file, "--export", str(place / "labels.jsonl")]) == 0
    assert "1 review(s) kept; 1 of 1 reviewed items are false alarms." in capsys.readouterr().out
    (label,) = [json.loads(line) for line in (place / "labels.jsonl").read_text().splitlines()]
    assert (label["item_id"], label["review"], label["question"]) == ("i0", "false", QUESTIONS[0])
    store = Store(str(place / "scans"))
    assert import_reviews(store, file) == 1  # again
    assert len(last_reviews(store)) == 1


def test_false_alarms_are_not_cut_from_the_corpus(place):
    _, rows = night(place, "n1")
    import_reviews(Store(str(place / "scans")), write_lines(place / "r.jsonl", [review(rows["i0"], "false")]))
    night(place, "n2")
    purify(run_of(place), str(place / "scans"), "n2", str(place / "clean"))
    kept = (place / "clean/a.jsonl").read_text()
    assert QUESTIONS[0] in kept
    assert QUESTIONS[1] not in kept


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"key": "k"}, r"r.jsonl, row 1: 'set' is not a text; a file of reviews is saved by a night's page"),
        ({"review": "maybe"}, r"r.jsonl, row 1: 'review' is not one of true, false"),
        ({"key": ""}, r"r.jsonl, row 1: "),
        ({"at": 5}, r"r.jsonl, row 1: 'at' is not a text"),
        ({"at": "yesterday"}, r"r.jsonl, row 1: 'at' is not a time such as 2026-01-31T09:30:00Z"),
        ({"overlap": "much"}, r"r.jsonl, row 1: 'overlap' is not a number"),
        ({"verdict": "clean"}, r"r.jsonl, row 1: it is not about an alarm"),
    ],
)
def test_what_is_no_review_is_refused(place, row, says):
    _, rows = night(place, "n1")
    given = row if "set" not in row and row == {"key": "k"} else {**review(rows["i0"], "false"), **row}
    with pytest.raises(StrideError, match=says):
        import_reviews(Store(str(place / "scans")), write_lines(place / "r.jsonl", [given]))
    assert last_reviews(Store(str(place / "scans"))) == []


def test_a_folder_without_nights_is_told(place, capsys):
    assert main(["scan", "review", str(place)]) == 1
    assert "has no finished night; give the folder of all nights" in capsys.readouterr().err


def test_in_a_browser_one_reviews_and_saves(place, browser):
    night(place, "n1")
    page = browser.new_page()
    try:
        page.goto((place / "scans/nights/n1/report.html").as_uri())
        assert page.locator("#reviews").is_hidden()
        page.locator("#table tbody tr").first.click()
        page.get_by_role("button", name="False alarm").click()
        assert "reviewed: a false alarm" in page.inner_text("#item")
        page.locator("#table tbody tr").nth(1).click()
        page.get_by_role("button", name="Leak", exact=True).click()
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save 2 reviews").click()
        saved.value.save_as(place / "reviews.jsonl")
    finally:
        page.close()
    assert import_reviews(Store(str(place / "scans")), str(place / "reviews.jsonl")) == 2
    done, rows = night(place, "n2")
    assert sorted((row["alarm"], row["review"]) for row in rows.values() if row["review"]) == [
        ("lexical", "false"),
        ("lexical", "true"),
    ]
    assert done["new"] == 0
    shutil.rmtree(place / "scans")


def test_more_of_the_same_field_is_another_alarm(place):
    write_lines(place / "corpus/a.jsonl", [{"text": " ".join(QUESTIONS[0].split()[:14])}])
    items = [{"id": "i0", "question": QUESTIONS[0]}]  # without an answer that could be missed
    write_lines(place / "items.jsonl", items)
    first, rows = night(place, "n1")
    assert (first["status"], rows["i0"]["leaked"]) == (2, "question")
    import_reviews(Store(str(place / "scans")), write_lines(place / "r.jsonl", [review(rows["i0"], "false")]))
    assert night(place, "n2")[0]["status"] == 0
    write_lines(place / "corpus/b.jsonl", [{"text": QUESTIONS[0]}])
    third, rows = night(place, "n3")
    assert (third["status"], rows["i0"]["review"]) == (2, None)


def test_labels_go_into_a_new_folder(place):
    night(place, "n1")
    assert main(["scan", "review", str(place / "scans"), "--export", str(place / "new/folder/labels.jsonl")]) == 0
    assert (place / "new/folder/labels.jsonl").read_text() == ""
