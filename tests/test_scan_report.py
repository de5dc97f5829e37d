"""The page of a scan: what it says and leaves out, that text cannot run in it, and, in a Chromium, that it works."""

import json
import re

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import HOSTILE, fits_a_telephone, opened

from stride_ray.contamination.compare import difference
from stride_ray.contamination.items import Item
from stride_ray.contamination.lexical.channel import MATCHES, Lexical
from stride_ray.contamination.report import scan_page
from stride_ray.contamination.verdicts import VERDICTS, counts

FILLER = "plain words that surround it " * 40
CORPUS = {"documents": 99, "units": 3, "rejected": 1, "rejects": ["a.jsonl: bad <i>"], "boilerplate": 0, "filtered": 0}
OPTIONS = {"words": 13, "shortest": 6, "overlap": 0.3, "false_discovery": 0.05}
INFLUENCE = {"model": "a/model", "mode": "exact", "blocks": 8000, "controls": 200, "failed": 1}


def item_of(i, letters):
    """Item i of a set, 500 to a set; its question has ``letters`` letters, more or less."""
    question = f"zebra{i} 🦓 asks {HOSTILE} " + "how so " * (letters // 7)
    return Item(f"{i:016x}", f"set-{i // 500}", f"i{i}{HOSTILE if i == 0 else ''}", "f", i, question, (), f"herd {i}")


def match(item, document, finding, length=None, at=300):
    """A run of MATCHES: the item's first ``length`` letters in a document of FILLER."""
    length = length or len(item.question)
    text = FILLER[:at] + item.question[:length] + FILLER
    row = {"set": item.set_name, "item_id": item.item_id, "key": item.key, "field": "question", "item_start": 0}
    row |= {"item_stop": length, "document_id": f"{document}{HOSTILE}", "source": "crawl", "file": "crawl.jsonl"}
    row |= {"place": document, "part": "text", "start": at, "stop": at + length, "excerpt_start": at - 80}
    row |= {"overlap": 0.9, "kind": "copy" if finding else "part", "near": False}
    return {**row, "excerpt": text[at - 80 :][: min(length + 160, 600)]}


def verdict_of(i):
    """Findings are copied, suspected and both in turn."""
    return ["lexical", "influence", "both"][i % 3]


def night(findings, clean, name="n2", before=(), letters=300, documents=7, asked=True):
    """Arguments of scan_page."""
    items = [item_of(i, letters) for i in range(findings + clean)]
    rows, hits = [], []
    for i, item in enumerate(items):
        verdict = verdict_of(i) if i < findings else "clean"
        copied, tied = verdict in ("lexical", "both"), verdict in ("influence", "both")
        row = {"set": item.set_name, "item_id": item.item_id, "key": item.key, "verdict": verdict}
        row |= {"question": item.question[:200], "overlap": 0.9 if copied else 0.1, "documents": documents * copied}
        row |= {"contrast": 40.0 - i / 1000 if tied else 1.5, "p": 1e-5 if tied else 0.5, "q": 1e-4 if tied else 1.0}
        row |= {"loss": 0.5 if tied else 2.0, "memorised": tied, "share": 0.25, "ordinal": i}
        row |= {"tied_document": f"tied-{i}", "block_id": i, "influence": 0.1}
        if not asked or i == 1:
            row |= dict.fromkeys(("contrast", "p", "q", "loss", "memorised", "share", "ordinal", "tied_document"))
            row["error"] = f"too long {HOSTILE}" if asked else None
        rows.append(row)
        hits += [match(item, document, True) for document in range(documents * copied)]
    table = pa.Table.from_pylist(rows, VERDICTS)
    earlier = pa.Table.from_pylist(list(before), VERDICTS) if before else None
    found = difference(earlier, table)
    lexical = Lexical(pa.Table.from_pylist(hits, MATCHES), {}, 99, 1, (), 0, 0, 0, 0, frozenset({items[-1].key}))
    facts = manifest(
        name,
        [(each, table.filter(pc.equal(table["set"], each))) for each in sorted({row["set"] for row in rows})],
        "n1" if before else "",
    )
    facts |= {"new": len(found.new), "changed": len(found.changed), "resolved": len(found.resolved)}
    facts["influence"] = INFLUENCE if asked else None
    return {"facts": facts, "table": table, "lexical": lexical, "items": items, "found": found, "history": []}


def manifest(name, sets, before="", influence=INFLUENCE):
    """A night's manifest of sets, each with its table of verdicts."""
    told = [
        {
            "name": each,
            "items": len(table),
            "short": 0,
            "searched_fields": ["question"],
            "question_fields": ["question"],
            "left_out_fields": [f"answer{HOSTILE}"],
            "not_understood": 1,
            "first_not_understood": [f"a.jsonl, row 1: 'answer' is {HOSTILE}"],
            "rejected": 0,
            "new": 0,
            "resolved": 0,
            "verdicts": counts(table),
        }
        for each, table in sets
    ]
    facts = {
        "night": name,
        "before": before,
        "since": before,
        "run": "a/run <b>",
        "new": 0,
        "changed": 0,
        "resolved": 0,
        "sets": told,
    }
    return {**facts, "corpus": {**CORPUS, "beyond": 0, "common": 0}, "influence": influence, "options": OPTIONS}


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def rows_of(page):
    data = data_of(page)
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def test_data_cannot_leave_its_place():
    page = scan_page(**night(6, 3))
    assert page.count("<script") == page.count("</script>") == 2  # the data and the page's own
    assert "<img" not in page
    assert "a/run &lt;b&gt;" in page
    assert "bad &lt;i&gt;" in page
    assert "default-src &#39;none&#39;" in page
    data = data_of(page)
    assert HOSTILE in data["evidence"]["0"]["texts"][0][1]
    assert rows_of(page)[0]["item"] == f"i0{HOSTILE}"


def test_evidence_names_the_best_documents_and_marks_what_they_hold():
    given = night(3, 1, letters=100)
    (item,) = given["items"][:1]
    near = {**match(item, 50, False, 20), "overlap": 0.2}
    second = {**match(item, 51, True, 30, at=500), "item_start": 25, "item_stop": 55, "overlap": 0.95}
    late = {**match(item, 51, True, 30, at=540), "item_start": 50, "item_stop": 80, "overlap": 0.95}
    matches = [near, second, late, *given["lexical"].matches.to_pylist()]
    given["lexical"] = Lexical(pa.Table.from_pylist(matches, MATCHES), {}, 9, 0, (), 0, 0, 0, 0, frozenset())
    told = data_of(scan_page(**given))["evidence"]
    assert set(told) == {"0", "1", "2", "3"}
    copies = told["0"]["copies"]
    assert [each["place"] for each in copies] == [51, 0, 1, 2, 3]  # the threshold's first, then by overlap
    (held,) = copies[0]["fields"]
    # Letters beyond the first plane count twice in a browser, and runs that overlap are one.
    assert (held["field"], held["spans"]) == ("question", [[26, 81]])
    (passage,) = held["passages"]
    assert passage["text"][0] == passage["text"][-1] == "…"
    assert len(passage["spans"]) == 2
    start, stop = copies[1]["fields"][0]["passages"][0]["spans"][0]
    marked = copies[1]["fields"][0]["passages"][0]["text"].encode("utf-16-le")[2 * start : 2 * stop].decode("utf-16-le")
    assert marked == item.question


def test_a_run_longer_than_its_excerpt_is_marked_to_the_end():
    given = night(1, 0, letters=2000)
    copy = data_of(scan_page(**given))["evidence"]["0"]["copies"][0]["fields"][0]["passages"][0]
    assert len(copy["text"]) == 602
    assert copy["spans"] == [[81, 602]]  # 520 letters, one of them of two units


def test_marks_say_what_is_new_changed_and_resolved():
    base = {"set": "set-0", "question": "?", "overlap": 0.9, "documents": 1, "first_document": "d", "q": 0.1}
    before = [
        {**base, "item_id": "i0", "key": f"{0:016x}", "verdict": "influence", "tied_document": "t"},
        {**base, "item_id": "i2", "key": f"{2:016x}", "verdict": "both", "tied_document": "t"},
        {**base, "item_id": "i4", "key": f"{4:016x}", "verdict": "lexical"},
        {**base, "item_id": "gone", "key": "x", "verdict": "lexical"},
    ]
    rows = rows_of(scan_page(**night(3, 3, before=before)))
    assert [(row["item"][:2], row["verdict"], row["mark"]) for row in rows] == [
        ("i1", "influence", "new"),
        ("i0", "lexical", "changed"),
        ("i2", "both", None),
        ("i4", "clean", "resolved"),
        ("go", "gone", "resolved"),
        ("i3", "clean", None),
        ("i5", "clean", None),
    ]
    assert rows[1]["note"] == "influence in n1"
    assert rows[3]["note"] == "lexical (90% in 1 document(s), first d) in n1"
    assert rows[4]["note"] == "lexical; the item is no longer evaluated in n1"
    assert [row["short"] for row in rows] == [False] * 6 + [True]


def test_the_trend_is_by_channel_with_gaps_where_nothing_was_asked():
    given = night(6, 3, "n9")
    (told,) = given["facts"]["sets"]
    other = {**told, "name": "other", "verdicts": {"lexical": 7, "influence": 0, "both": 0, "clean": 0}}
    given["history"] = [
        {**given["facts"], "night": "n7", "sets": [other]},
        {**given["facts"], "night": "n8", "influence": None},
    ]
    assert data_of(scan_page(**given))["trend"] == {
        "nights": ["n7", "n8", "n9"],
        "sets": [{"name": "set-0", "lexical": [None, 4, 4], "influence": [None, None, 4]}],
    }


@pytest.mark.parametrize(("findings", "clean"), [(1000, 20_000), (9000, 0)])
def test_however_much_was_scanned_the_page_stays_below_five_megabytes(findings, clean):
    given = night(findings, clean, letters=700, documents=5 if clean else 2)
    given["history"] = [{**given["facts"], "night": f"n-{i}"} for i in range(59)]
    page = scan_page(**given)
    assert 3_000_000 < len(page.encode()) < 5_000_000
    assert re.search(r"\d+ excerpts of documents are left out", page)
    told = data_of(page)["evidence"]
    if clean:
        assert re.search(r"Of 20000 clean items the \d{4} nearest to a finding are here", page)
        assert all(told[str(i)]["copies"] for i, row in enumerate(rows_of(page)) if row["documents"])
    else:
        assert re.search(r"The first \d{4} of 9000 findings are listed", page)
    small = scan_page(**night(3, 3))
    assert "documents are left out" not in small
    assert "nearest to a finding" not in small


def test_a_value_that_is_no_number_is_left_empty():
    given = night(1, 1)
    rows = given["table"].to_pylist()
    given["table"] = pa.Table.from_pylist(
        [{**rows[0], "contrast": float("inf")}, {**rows[1], "q": float("nan")}], VERDICTS
    )
    infinite, unknown = rows_of(scan_page(**given))
    assert (infinite["contrast"], unknown["q"]) == (None, None)


def test_in_a_browser_it_searches_sorts_and_runs_nothing_of_the_corpus(browser, tmp_path):
    path = tmp_path / "page.html"
    given = night(1000, 100)
    given["history"] = [{**given["facts"], "night": f"n-{i}"} for i in range(59)]
    path.write_text(scan_page(**given), "utf-8")
    page, complaints = opened(browser, path)
    assert page.locator("#count").text_content() == "1–25 of 1000"
    assert page.locator("#item div.lexical details").count() == 5
    held = page.locator("#item div.lexical details").first.locator("mark")
    assert held.nth(0).text_content() == held.nth(1).text_content() == given["items"][0].question
    assert "7 document(s) hold at least 30 %" in page.locator("#item div.lexical").text_content()
    assert page.locator("#trends svg").count() == 3
    assert page.locator("#trends circle.influence").count() == 180
    page.keyboard.press("/")
    page.keyboard.type("zebra77 unicorn")
    assert page.locator("#count").text_content() == "no item"
    page.fill("#search", "zebra77")
    assert page.locator("#count").text_content() == "1–11 of 11"  # 77, 770 to 779
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert page.locator("#item h2").text_content() == "set-0 / i77"
    page.keyboard.press("ArrowDown")
    assert page.locator("#item h2").text_content() == "set-1 / i770"
    assert page.locator("#table tr[aria-selected=true] td").nth(1).text_content() == "i770"
    page.keyboard.press("k")
    assert page.locator("#item h2").text_content() == "set-0 / i77"
    facts = page.locator("#item dl").inner_text()
    assert "tied-77" in facts
    page.fill("#search", "")
    page.get_by_role("button", name="contrast").click()
    page.get_by_role("button", name="contrast").click()
    assert page.locator("#table th").nth(8).get_attribute("aria-sort") == "descending"
    assert page.locator("#table tbody tr td").nth(1).text_content() == "i1"  # it could not be measured
    page.locator("#table tbody tr").first.click()
    assert "Could not be measured: too long </script>" in page.locator("#item .warning").text_content()
    page.get_by_label("clean items too").check()
    assert page.locator("#count").text_content() == "1–25 of 1100"
    page.get_by_role("button", name="next").click()
    assert page.locator("#count").text_content() == "26–50 of 1100"
    page.fill("#search", "i1099")
    page.locator("#table tbody tr").first.click()
    assert "too few words" in page.locator("#item").text_content()
    assert page.title() == "Contamination scan, n2"
    assert not complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_telephone_nothing_sticks_out(browser, tmp_path, scheme):
    path = tmp_path / "page.html"
    path.write_text(scan_page(**night(30, 5)), "utf-8")
    fits_a_telephone(browser, path, scheme)


@pytest.mark.parametrize(("findings", "asked"), [(0, True), (4, False)])
def test_a_first_night_and_one_without_findings_look_right(browser, tmp_path, findings, asked):
    path = tmp_path / "page.html"
    given = night(findings, 2, asked=asked)
    path.write_text(scan_page(**given), "utf-8")
    page, complaints = opened(browser, path)
    assert page.locator("#count").text_content() == ("no item" if not findings else "1–4 of 4")
    assert page.locator("#trends circle.lexical").count() == 1
    assert page.locator("#trends circle.influence").count() == int(asked)
    assert page.locator("#trends circle.lexical").evaluate("node => node.cx.baseVal.value") == 190
    if not asked:
        assert "Not asked (scan.influence = false)" in page.locator("#item").text_content()
    assert not complaints


def test_many_sets_show_those_with_findings_first(browser, tmp_path):
    path = tmp_path / "page.html"
    given = night(2, 4500)
    given["facts"]["sets"].reverse()
    path.write_text(scan_page(**given), "utf-8")
    page, complaints = opened(browser, path)
    assert page.locator("#trends figure").count() == 6
    assert page.locator("#trends figure b").first.text_content() == "set-0"
    page.get_by_text("4 more sets").click()
    page.locator("figure").nth(9).wait_for()
    assert not complaints
