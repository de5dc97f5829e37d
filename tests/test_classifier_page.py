"""The page of a classifier: its pictures are the pixels, its order the scores', and no text of the data is markup."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import HOSTILE, fits_a_telephone, opened, run_plainly
from PIL import Image
from test_classification import SHORT, N, Q, blobs
from test_compare import in_this_process

from jobs.classification import main
from stride_ray.evaluate.comparison.classifier_page import FEATURES, PICTURES, TABLES, classifier_page
from stride_ray.evaluate.retraining.classification import LabelledExamples, write_benchmark
from stride_ray.models.causal_lm import load_model
from stride_ray.runtime.errors import StrideError

IMAGE = (3, 5)
CLASSES = (f"cat {HOSTILE}", "dog", "fox")
NAMES = ("width", f"height {HOSTILE}", "a,b", "d", "e")


def images():
    """Images of three rows and five columns, with a bright column for each class."""
    rng = np.random.default_rng(1)
    labels = np.arange(N + Q) % 3
    pixels = rng.integers(0, 100, (N + Q, *IMAGE))
    pixels[np.arange(N + Q), :, labels] += 156
    pixels[0, 0, 0], pixels[1, 0, 0] = 0, 255  # so that a pixel's value is its brightness
    return LabelledExamples(pixels.reshape(N + Q, -1).astype(np.float32), labels, CLASSES, IMAGE)


def vectors():
    return replace(blobs(), classes=CLASSES, feature_names=NAMES)


def benchmark_of(examples, folder):
    return examples, write_benchmark(examples, str(folder / "made"), Q, 8, 2, SHORT)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """Images and their benchmark; tests only read it."""
    return benchmark_of(images(), tmp_path_factory.mktemp("pictured"))


@pytest.fixture(scope="module")
def tabular(tmp_path_factory):
    """Vectors and their benchmark."""
    return benchmark_of(vectors(), tmp_path_factory.mktemp("tabular"))


@pytest.fixture(params=["pictured", "tabular"])
def made(request):
    """One after the other."""
    return request.getfixturevalue(request.param)


def scores():
    """Scores of two methods: dense with ties, and sparse with three examples of each sign."""
    rng = np.random.default_rng(2)
    dense = rng.integers(-20, 20, (Q, N)).astype(np.float32)
    few = np.zeros((Q, N), np.float32)
    few[:, [7, 3, 5]], few[:, [0, 2, 39]] = (1.5, 0.25, 1e-5), (-2, -4, -1)
    return {"STRIDE": dense, f"rival {HOSTILE}": scipy.sparse.csr_array(few)}


def page_of(made, queries=3, **changes):
    examples, benchmark = made
    return classifier_page(benchmark, examples, changes.pop("scores", scores()), "a <b> set", queries)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def rows_of(texts):
    return (texts.ids[:, 0] - len(CLASSES)).tolist()


def test_pictures_are_the_examples_pixels(pictured):
    examples, benchmark = pictured
    data = data_of(page_of(pictured))
    shown = {each[0] for query in data["queries"] for side in query["found"][0].values() for each in side}
    assert data["image"] == list(IMAGE)
    assert shown | set(rows_of(benchmark.queries)[Q // 2 : Q // 2 + 3]) <= set(map(int, data["pictures"]))
    for row, picture in data["pictures"].items():
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert (image.format, image.mode) == ("PNG", "L")
        np.testing.assert_array_equal(np.asarray(image), examples.features[int(row)].reshape(IMAGE))
        assert data["labels"][row] == examples.labels[int(row)]


def test_examples_of_one_brightness_are_black(tmp_path):
    made = benchmark_of(replace(images(), features=np.full((N + Q, 15), 7, np.float32)), tmp_path)
    pictures = data_of(page_of(made))["pictures"]
    assert not any(np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))).any() for each in pictures.values())


def test_queries_are_the_first_of_the_report_part_with_what_the_model_says(made):
    examples, benchmark = made
    assert list(benchmark.parts) == ["development"] * 4 + ["report"] * 4
    data = data_of(page_of(made))
    report = rows_of(benchmark.queries)[4:]
    assert [query["example"] for query in data["queries"]] == report[:3]
    assert len(data_of(page_of(made, queries=100))["queries"]) == 4
    whole = replace(benchmark, parts=np.full(Q, "all"))
    assert data_of(page_of((examples, whole)))["queries"][0]["example"] == rows_of(benchmark.queries)[0]
    logits = load_model(benchmark.model).model(torch.from_numpy(benchmark.queries.ids.astype(np.int64))).logits[4:, 0]
    chances = torch.softmax(logits, 1).numpy()
    for query, chance in zip(data["queries"], chances, strict=False):
        assert query["predicted"] == chance.argmax()
        assert query["probability"] == pytest.approx(chance.max(), abs=1e-4)
        assert query["own"] == pytest.approx(chance[examples.labels[query["example"]]], abs=1e-4)
    correct = (chances.argmax(1) == examples.labels[report]).sum()
    page = page_of(made)
    assert re.search(rf"{correct} of 4 held-out queries classified\scorrectly · 3 of the 4 shown", page)
    assert "of the 4 shown" not in page_of(made, queries=4)


def test_examples_are_ordered_by_influence(made):
    examples, benchmark = made
    given, pool = scores(), rows_of(benchmark.blocks)
    most = PICTURES if examples.image else TABLES
    data = data_of(page_of(made))
    assert data["methods"] == list(given)
    for number, query in enumerate(data["queries"], Q // 2):
        dense, sparse = query["found"]
        row = given["STRIDE"][number]
        helping = sorted(range(N), key=lambda block: -row[block])[:most]
        harming = sorted(range(N), key=lambda block: row[block])[:most]
        assert [each[:2] for each in dense["helping"]] == [[pool[block], row[block]] for block in helping]
        assert [each[:2] for each in dense["harming"]] == [[pool[block], row[block]] for block in harming]
        assert [each[:2] for each in sparse["helping"]] == [[pool[7], 1.5], [pool[3], 0.25], [pool[5], 1e-5]]
        assert [each[:2] for each in sparse["harming"]] == [[pool[2], -4.0], [pool[0], -2.0], [pool[39], -1.0]]


def test_a_table_begins_with_the_largest_difference_from_the_query(tabular):
    examples, benchmark = tabular
    data, pool = data_of(page_of(tabular)), rows_of(benchmark.blocks)
    assert data["features"] == list(NAMES)
    assert "pictures" not in data
    deviation, mean = examples.features[pool].std(0), examples.features[pool].mean(0)
    for query in data["queries"]:
        sides = [side for found in query["found"] for side in found.values()]
        tables = [(query["example"], query["features"], mean)]
        tables += [(row, table, examples.features[query["example"]]) for side in sides for row, _, table in side]
        for row, table, origin in tables:
            expected = (examples.features[row] - origin) / deviation
            order = sorted(range(5), key=lambda feature: -abs(expected[feature]))
            assert [each[0] for each in table] == order[:FEATURES]
            np.testing.assert_allclose([each[1] for each in table], examples.features[row][order], rtol=1e-5)
            np.testing.assert_allclose([each[2] for each in table], expected[order], rtol=0.01, atol=1e-3)


def test_features_without_names_are_numbered(tabular):
    examples, benchmark = tabular
    data = data_of(page_of((replace(examples, feature_names=()), benchmark)))
    assert data["features"] == [f"feature {number}" for number in range(5)]


def test_no_text_of_the_data_is_markup(made):
    page = page_of(made)
    assert page.count("<script") == page.count("</script>") == 2  # the data and the page's own
    assert "<img" not in page
    assert "a &lt;b&gt; set" in page
    assert data_of(page)["classes"][0] == CLASSES[0]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "default-src &#39;none&#39;; img-src data:;" in page


def test_the_same_arguments_give_the_same_bytes(made):
    assert page_of(made) == page_of(made)


def test_what_cannot_be_shown_is_refused(made):
    examples, benchmark = made
    for given, sentence in (
        ({"queries": 0}, "0 queries cannot be shown; ask for at least 1"),
        ({"scores": {}}, "There are no scores to show"),
        ({"scores": {"few": np.zeros((Q, N - 1))}}, f"few: scores have shape .*; they must be {Q} × {N}"),
    ):
        with pytest.raises(StrideError, match=sentence):
            page_of(made, **given)
    others = replace(examples, labels=(examples.labels + 1) % 3)
    fewer = replace(examples, features=examples.features[:9], labels=examples.labels[:9])
    for strangers in (others, fewer):
        with pytest.raises(StrideError, match="made is not a benchmark of these examples"):
            page_of((strangers, benchmark))


def test_the_job_ends_with_the_page_and_a_rerun_writes_the_same(tmp_path, monkeypatch, capsys):
    run_plainly(monkeypatch)
    in_this_process(monkeypatch)
    examples = blobs()
    head = 'x,y,"<script>alert(1)</script>",z,v,kind\n'
    rows = zip(examples.features.tolist(), examples.labels, strict=True)
    lines = [",".join([*map(str, features), examples.classes[label]]) for features, label in rows]
    (tmp_path / "<i>.csv").write_text(head + "\n".join(lines))
    command = ["--examples", str(tmp_path / "<i>.csv"), "--label", "kind", "--out", str(tmp_path / "out")]
    command += ["--queries", str(Q), "--subsets", "2", "--seeds", "1", "--epochs", "2", "--hidden-size", "8"]
    command += ["--methods", "random,featsim", "--shown", "2"]
    assert main(command) == 0
    path = tmp_path / "out/comparison/examples.html"
    *_, named, last = capsys.readouterr().out.splitlines()
    assert (named, json.loads(last)["benchmark"]) == (str(path), "benchmark")
    page = path.read_text("utf-8")
    data = data_of(page)
    assert (data["methods"], len(data["queries"])) == (["random", "FeatSim"], 2)
    assert data["features"][2] == "<script>alert(1)</script>"
    assert "<script>alert" not in page
    assert "<b>&lt;i&gt;.csv</b>" in page
    path.unlink()
    assert main(command) == 0
    assert path.read_text("utf-8") == page
    assert main([*command[:-2], "--methods", "datamodels"]) == 0  # sums over subsets, without scores of examples
    assert str(path) not in capsys.readouterr().out.splitlines()[-2]


def test_in_a_browser_queries_can_be_stepped_through(browser, made, tmp_path):
    examples, _ = made
    path = tmp_path / "page.html"
    path.write_text(page_of(made), "utf-8")
    page, complaints = opened(browser, path)
    queries = data_of(page_of(made))["queries"]
    assert page.locator("#query h2").text_content() == f"Example {queries[0]['example']}"
    assert page.locator("#query details").count() == 2
    assert page.locator("#query details[open]").count() == 1
    first = page.locator("#query details").first
    values = first.locator(".value").all_text_contents()
    sides = queries[0]["found"][0]
    shown = [each[1] for each in (*sides["helping"], *sides["harming"])]
    assert [float(value.replace("−", "-")) for value in values] == shown
    classes = [CLASSES[examples.labels[each[0]]] for each in (*sides["helping"], *sides["harming"])]
    assert first.locator("figcaption b").all_text_contents() == classes
    page.locator("#query summary").nth(1).press("Enter")
    page.keyboard.press("j")
    assert page.locator("#query h2").text_content() == f"Example {queries[1]['example']}"
    assert page.locator("#query details[open]").count() == 2
    if examples.image:
        page.locator("img").evaluate_all("nodes => Promise.all(nodes.map((node) => node.decode()))")
        drawn = page.locator("#query .asked img")
        assert drawn.evaluate("node => [node.naturalHeight, node.naturalWidth]") == list(IMAGE)
        label = CLASSES[examples.labels[queries[1]["example"]]]
        assert drawn.get_attribute("alt") == f"example {queries[1]['example']}, class {label}"
        assert drawn.evaluate("node => getComputedStyle(node).imageRendering") == "pixelated"
        assert page.locator("img").evaluate_all("nodes => nodes.every((node) => node.alt)")
    else:
        assert NAMES[1] in page.locator("#query .asked td.name").all_text_contents()
    page.fill("#search", "no such class")
    assert page.locator("#count").text_content() == "no query"
    assert page.title() == "Which examples made the classifier decide: a <b> set"
    assert not complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_telephone_nothing_sticks_out(browser, made, tmp_path, scheme):
    path = tmp_path / "page.html"
    path.write_text(page_of(made), "utf-8")
    page = fits_a_telephone(browser, path, scheme)
    page.locator("#query summary").nth(1).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
