"""The attribution page: what it says, that text cannot run in it, and, in a real Chromium, that it works."""

import json
import re

import pytest
from conftest import HOSTILE, fits_a_telephone, opened

from stride_ray.report.page import attribution_page

FACTS = {
    "name": "asked",
    "run": "a/run <b>",
    "model": "a/model",
    "blocks": 8000,
    "queries": 1000,
    "failed": 1,
    "median_nonzeros": 16.0,
    "how": "operators for each block",
    "rows": 16000,
    "exact": 2000,
    "believable": "; over all blocks, estimates correlate with exact influence at about 0.97",
    "learned": True,
    "tokens": True,
    "verdict": "",
}
TRUST = {"level": "good", "verdict": "Trust: good, because so.", "rows": [("halves", "0.9", "<i>0.1</i>")]}


def shown(queries, letters=2000):
    """As attribute.shown_queries gives them: query i is helped by block 8 i and others, the last one failed."""
    found = []
    for i in range(queries):
        rows = [
            {
                "rank": 1 + k,
                "influence": (8 - k if k < 4 else -k) / (1 + i),
                "share": 1 / (1 + k),
                "ordinal": 8 * i + k,
                "document_id": f"document-{8 * i + k}{HOSTILE if i == 0 else ''}",
                "source": f"source-{i % 3}",
                "exact": k != 1,
                "tokens": [0.5, -0.25, 8.0 - 0.25] if k == 0 else None,
                "pieces": [f"zebra{i}", f" {HOSTILE}", " words", " padding"] if k == 0 else None,
                "text": f"zebra{i} block {8 * i + k} {HOSTILE} " + "filler words here " * (letters // 18),
            }
            for k in range(8)
        ]
        about = {"query_id": f"q{i}", "error": None, "base_loss": 1 + (i * 7 % queries) / queries, "nonzeros": 16}
        text = {"prompt": f"about {HOSTILE}", "completion": f"the zebra{i} runs", "contrast": HOSTILE if i == 1 else ""}
        stats = {"curve": [[0, 8.0], [7, -7.0]], "half": 1 + i % 40, "sources": [[f"source-{i % 3}", 1.0]]}
        found.append({**about, **text, **stats, "helping": rows[:4], "harming": rows[4:][::-1]})
    found[-1] |= {"error": f"too short {HOSTILE}", "base_loss": None, "nonzeros": None, "curve": [], "half": 0}
    found[-1] |= {"helping": [], "harming": [], "sources": []}
    return found


def test_data_cannot_leave_its_place():
    page = attribution_page(shown(3), FACTS, TRUST)
    assert page.count("<script") == 2  # the data and the page's own
    assert page.count("</script>") == 2
    assert "<img" not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1)
    read = json.loads(data)
    assert HOSTILE in read["texts"]["0"]
    assert read["queries"][0]["helping"][0] == [
        1,
        8.0,
        1.0,
        0,
        f"document-0{HOSTILE}",
        "source-0",
        True,
        [0.5, -0.25, 7.8],
    ]
    assert read["queries"][0]["helping"][1][7] is None
    assert read["pieces"]["0"] == ["zebra0", f" {HOSTILE}", " words"]
    assert re.search(
        r"2000 of\s16000 influences are exact; the others are estimates; over all blocks, estimates correlate", page
    )
    assert "Every influence is exact." in attribution_page(shown(3), {**FACTS, "exact": 16000})
    assert "a/run &lt;b&gt;" in page
    assert "&lt;i&gt;0.1" in page
    assert "default-src &#39;none&#39;" in page


def test_a_thousand_queries_stay_below_five_megabytes():
    page = attribution_page(shown(1000), FACTS)
    assert len(page.encode()) < 5_000_000
    assert re.search(r"Texts of blocks are cut at \d{3} letters", page)
    assert "are cut at" not in attribution_page(shown(3), FACTS)


def first(page):
    return page.locator("#table tbody tr td").first.text_content()


def test_in_a_browser_it_searches_sorts_and_runs_nothing_of_the_corpus(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(attribution_page(shown(1000), FACTS, TRUST), "utf-8")
    page, complaints = opened(browser, path)
    assert page.locator("#count").text_content() == "1–25 of 1000"
    assert page.locator("#query mark").first.text_content() == "zebra0"
    assert page.locator("#query .helping details").count() == 4
    tokens = page.locator("#query .helping pre").first
    assert tokens.locator(".toward").all_text_contents() == ["zebra0", " words"]
    assert tokens.locator(".toward").last.get_attribute("title") == "+7.800"
    told = page.locator("#query .helping details summary").all_text_contents()
    assert ["estimate" in each for each in told] == [False, True, False, False]
    page.keyboard.press("/")
    page.keyboard.type("zebra77")
    assert page.locator("#count").text_content() == "1–11 of 11"  # 77, 770 to 779
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert page.locator("#query h2").text_content() == "q77"
    page.fill("#search", "document-8000")
    assert page.locator("#count").text_content() == "no query"
    page.fill("#search", "")
    page.get_by_role("button", name="loss, nats").click()
    assert first(page) == "q0"
    page.get_by_role("button", name="loss, nats").click()
    assert page.locator("#table th").nth(2).get_attribute("aria-sort") == "descending"
    assert first(page) == "q999"  # the failed one has no loss
    page.locator("#table tbody tr").first.click()
    assert "too short </script>" in page.locator("#query .warning").text_content()
    page.get_by_role("button", name="next").click()
    assert page.locator("#count").text_content() == "26–50 of 1000"
    assert page.title() == "What made the model say this: asked"
    assert not complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_telephone_nothing_sticks_out(browser, tmp_path, scheme):
    path = tmp_path / "page.html"
    path.write_text(attribution_page(shown(30), FACTS, TRUST), "utf-8")
    fits_a_telephone(browser, path, scheme).screenshot(path=str(tmp_path / f"{scheme}.png"), full_page=True)
