"""The page of a classifier: queries with the training examples that help and harm them most (the paper's Figure 7).

Images are shown as pictures. Other examples are shown as tables of the features that differ most from the query's, in
standard deviations of the pool.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
import transformers
from numpy.typing import NDArray

from stride_ray.evaluate.baselines.problem import Texts
from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.evaluate.retraining.classification import LabelledExamples
from stride_ray.evaluate.retraining.lds import REPORT
from stride_ray.evaluate.retraining.results import read_scores
from stride_ray.models.builtin.classifier import Classifier
from stride_ray.models.causal_lm import load_model
from stride_ray.report.page import render
from stride_ray.report.png import picture
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redact_url

PAGE = "examples.html"
# Pictures of helping, and of harming, examples of a query; tables of them; features in a table.
PICTURES, TABLES, FEATURES = 8, 4, 6


def write_classifier_page(
    store: Store, benchmark: Benchmark, examples: LabelledExamples, files: Mapping[str, str], name: str, queries: int
) -> str:
    """Write the page of a comparison's scores; returns its URL for display.

    Args:
        store: the comparison's folder; gets ``examples.html``.
        benchmark: made of ``examples`` (classification.write_benchmark).
        examples: all of them, training and queries.
        files: by method, the name of its scores in ``store``; the page begins with the first.
        name: of the examples, for the title.
        queries: how many to show.

    Raises:
        StrideError: as classifier_page, or for scores that cannot be read.
    """
    scores = {method: read_scores(store, file) for method, file in files.items()}
    page = classifier_page(benchmark, examples, scores, name, queries)
    store.write(PAGE, page.encode("utf-8", "replace"))  # a file's name may hold bytes that are not UTF-8
    return store.display_url(PAGE)


def classifier_page(
    benchmark: Benchmark, examples: LabelledExamples, scores: Mapping[str, Any], name: str, queries: int = 10
) -> str:
    """Render the first queries of the report part (of all, if there are no parts) with their top examples.

    Args:
        benchmark: made of ``examples`` (classification.write_benchmark).
        examples: all of them, training and queries.
        scores: by method (Q, N), dense or scipy sparse, higher for more helpful; the page begins with the first.
        name: of the examples, for the title.
        queries: how many to show.

    Returns:
        Self-contained HTML, the same bytes for the same arguments.

    Raises:
        StrideError: for a benchmark of other examples, scores of another shape, no scores, or no queries.
    """
    if queries < 1:
        raise StrideError(f"{queries} queries cannot be shown; ask for at least 1.")
    if not scores:
        raise StrideError("There are no scores to show; name a method that scores examples.")
    shape = (len(benchmark.queries), len(benchmark.blocks))
    for method, found in scores.items():
        if found.shape != shape:
            raise StrideError(f"{method}: scores have shape {found.shape}; they must be {shape[0]} × {shape[1]}.")
    asked, pool = _rows(benchmark.queries, examples, benchmark), _rows(benchmark.blocks, examples, benchmark)
    transformers.utils.logging.disable_progress_bar()
    model: Classifier = load_model(benchmark.model, device="cpu").model
    features = model.model.features.weight[len(examples.classes) :].cpu().numpy().reshape(len(examples.labels), -1)
    part = np.flatnonzero(benchmark.parts == REPORT)
    part = part if len(part) else np.arange(len(asked))
    probabilities = _probabilities(model, benchmark.queries.ids[part])
    view = _View(examples, features, pool)
    shown = [
        view.query(asked[query], probability, {method: _row(found, query) for method, found in scores.items()})
        for query, probability in zip(part[:queries].tolist(), probabilities, strict=False)
    ]
    data = {"methods": list(scores), "classes": examples.classes, "queries": shown, **view.data(shown)}
    facts = {
        "name": name,
        "training": len(pool),
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
        "grid": model.config.grid,
        "correct": int((probabilities.argmax(1) == examples.labels[asked[part]]).sum()),
        "queries": len(part),
        "shown": len(shown),
        "features": None if examples.image else (min(FEATURES, features.shape[1]), features.shape[1]),
    }
    return render("classifier", data, facts=facts)


@dataclass(frozen=True)
class _View:
    """What the page shows of examples.

    Attributes:
        examples: all of them.
        standardised: (n, F) their features as the model reads them, in standard deviations from the pool's mean;
            images' are in the order of patches.
        pool: (N,) which of them each block is.
    """

    examples: LabelledExamples
    standardised: NDArray[np.float32]
    pool: NDArray[np.int64]

    def query(
        self, row: int, probability: NDArray[np.float64], scores: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, Any]:
        """A query's data: what the model makes of it, and each method's helping and harming examples."""
        predicted = int(probability.argmax())
        return {
            "example": int(row),
            "predicted": predicted,
            "probability": _rounded(probability[predicted], 4),
            "own": _rounded(probability[self.examples.labels[row]], 4),
            "features": self.features(row, None),
            "found": [
                {side: self.side(row, found, sign) for side, sign in (("helping", 1), ("harming", -1))}
                for found in scores.values()
            ],
        }

    def side(self, query: int, scores: NDArray[np.float64], sign: int) -> list[list[Any]]:
        """The examples with the largest scores of one sign: row, score, and features (None for images)."""
        blocks = np.argsort(-sign * scores, kind="stable")[: PICTURES if self.examples.image else TABLES]
        blocks = blocks[sign * scores[blocks] > 0]
        rows = self.pool[blocks].tolist()
        return [
            [row, _rounded(score, 4), self.features(row, query)]
            for row, score in zip(rows, scores[blocks], strict=True)
        ]

    def features(self, row: int, query: int | None) -> list[list[Any]] | None:
        """The features that differ most from the query's, or from the mean: number, value, difference; None for images.

        Example: of features (0, 3, −1) in standard deviations, an example with (0, 1, −4) differs by −3 in the third
        and by −2 in the second.
        """
        if self.examples.image:
            return None
        difference = self.standardised[row] - (0 if query is None else self.standardised[query])
        largest = np.argsort(-np.abs(difference), kind="stable")[:FEATURES]
        values = self.examples.features[row]
        return [[each, _rounded(values[each], 6), _rounded(difference[each], 3)] for each in largest.tolist()]

    def data(self, shown: list[dict[str, Any]]) -> dict[str, Any]:
        """The labels of all examples that the page shows, and their pictures or the names of features."""
        sides = [side for query in shown for found in query["found"] for side in found.values()]
        rows = sorted({query["example"] for query in shown} | {each[0] for side in sides for each in side})
        values, image = self.examples.features, self.examples.image
        data: dict[str, Any] = {"labels": {row: int(self.examples.labels[row]) for row in rows}, "image": image}
        if image:
            low, high = float(values.min()), float(values.max())
            return {**data, "pictures": {row: picture(values[row].reshape(image), low, high) for row in rows}}
        names = self.examples.feature_names or [f"feature {number}" for number in range(values.shape[1])]
        return {**data, "features": names}


def _rows(texts: Texts, examples: LabelledExamples, benchmark: Benchmark) -> NDArray[np.int64]:
    """Which example each text [patches…, class] is."""
    rows = (texts.ids[:, 0].astype(np.int64) - len(examples.classes)) // max(1, texts.ids.shape[1] - 1)
    fits = rows.min() >= 0 and rows.max() < len(examples.labels)
    if not fits or (texts.ids[:, -1] != examples.labels[rows]).any():
        raise StrideError(f"{redact_url(benchmark.url)} is not a benchmark of these examples.")
    return rows


@torch.no_grad()
def _probabilities(model: Classifier, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """The classes' probabilities for texts [patches…, class], (Q, C)."""
    logits = model(torch.from_numpy(ids[:, :-1].astype(np.int64))).logits[:, -1]
    return torch.softmax(logits.double(), 1).numpy()


def _row(scores: Any, query: int) -> NDArray[np.float64]:
    row = scores[[query]]
    return (row.toarray() if scipy.sparse.issparse(row) else row)[0].astype(np.float64)


def _rounded(value: Any, digits: int) -> float:
    return float(f"{float(value):.{digits}g}")
