"""An accuracy benchmark: a pool, queries, the model trained on the pool, and the losses after retraining on subsets.

A benchmark is a folder at any fsspec URL: ``pool.parquet`` (``token_ids``), ``queries.parquet`` (``token_ids``, and
optionally ``kind`` and ``part``; both files optionally ``loss_mask``, False for the tokens of prompts, which carry no
loss), ``model/``, ``start/`` if training on the pool began from a checkpoint, ``initial/``: the random weights that
``model/`` was trained from, where each retraining draws its own,
``recipe.json`` if the built-in recipe's hyperparameters differ from its defaults (finetune.FineTune), and the
retraining results (see ``results``). Sequence lengths may vary; other columns are ignored.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.rows.row import has_content
from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.evaluate.retraining.lds import ALL, evaluate, subset_sums
from stride_ray.evaluate.retraining.results import RetrainingResults, read_truth
from stride_ray.models.query_batches import padded
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in memory, except for its models, which stay on disk.

    Attributes:
        url: the folder.
        blocks: the pool, N sequences, in the row order of ``pool.parquet``.
        queries: Q sequences.
        kinds: (Q,) str, each query's kind; ``all`` if the file has no such column.
        parts: (Q,) str, each query's part (development or report); ``all`` if the file has no such column.
        model: the folder of the model trained on the whole pool.
        start: the folder of the checkpoint that training began from; None if it began from random weights.
        initial: the folder of the random weights that ``model`` began from, which retrainings do not share; None if
            unknown.
        truth: the retraining results; None if there are none yet.
        fingerprint: sixteen hexadecimal digits over the tokens, the architecture, and the model files' names and sizes.
        hyperparameters: of the built-in recipe, where they differ from its defaults.
    """

    url: str
    blocks: Texts
    queries: Texts
    kinds: np.ndarray
    parts: np.ndarray
    model: str
    start: str | None
    truth: RetrainingResults | None
    fingerprint: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    initial: str | None = None

    @property
    def name(self) -> str:
        """The folder's base name."""
        return self.url.rstrip("/").rpartition("/")[2] or self.url

    def retrained(self) -> RetrainingResults:
        """Return the retraining results.

        Raises:
            StrideError: if there are none.
        """
        if self.truth is None:
            raise StrideError(
                f"{Store(self.url).display_url('')} holds no retraining_*.npz or lds_*.jsonl; make them with "
                "'python jobs/retrain.py', or import those of another project with 'python jobs/import_truth.py'."
            )
        return self.truth

    def lds(self, scores: np.ndarray) -> dict[str, list[float]]:
        """Return the LDS of (Q, N) scores and the ends of its interval, keyed by "part, kind".

        Raises:
            StrideError: if there are no retraining results.
        """
        truth = self.retrained()
        found = evaluate({"": subset_sums(scores, truth.subsets)}, truth, self.kinds, self.parts)
        figures = {f"{part}, {kind}": found.figure("", kind, part).lds for kind, part in found.cells}
        return {cell: [lds.value, lds.low, lds.high] for cell, lds in figures.items()}

    def problem(
        self,
        checkpoints: tuple[str, ...] = (),
        learning_rates: tuple[float, ...] = (),
        seed: int = 0,
        batch_tokens: int = 8192,
    ) -> Problem:
        """Return the input of an attribution method: everything except the retraining results."""
        return Problem(
            blocks=self.blocks,
            queries=self.queries,
            model=self.model,
            start=self.start or self.initial,
            checkpoints=checkpoints,
            learning_rates=learning_rates,
            seed=seed,
            batch_tokens=batch_tokens,
        )


def read_benchmark(url: str) -> Benchmark:
    """Read a benchmark's folder.

    Raises:
        StrideError: for a missing file or column, rows without tokens, or retraining results of other data.
    """
    store = Store(url)
    for needed in ("pool.parquet", "queries.parquet", "model/config.json"):
        if not store.exists(needed):
            raise StrideError(
                f"{store.display_url('')} is not a benchmark folder: {needed} is missing; it needs pool.parquet, "
                "queries.parquet and a model/ folder."
            )
    pool, questions = store.read_table("pool.parquet"), store.read_table("queries.parquet")
    # A loss needs a next token, so a query needs two tokens; a one-token block merely contributes nothing.
    blocks = _texts(pool, store.display_url("pool.parquet"), 1)
    queries = _texts(questions, store.display_url("queries.parquet"), 2)
    truth = read_truth(store)
    if truth is not None:
        truth.check(len(blocks), len(queries), store.display_url(""))
    return Benchmark(
        url=store.url,
        blocks=blocks,
        queries=queries,
        kinds=_labels(questions, "kind", store.display_url("queries.parquet")),
        parts=_labels(questions, "part", store.display_url("queries.parquet")),
        model=f"{store.url}/model",
        start=f"{store.url}/start" if store.exists("start/config.json") else None,
        truth=truth,
        fingerprint=_fingerprint(store, blocks, queries),
        hyperparameters=store.read_json("recipe.json", foreign=True) if store.exists("recipe.json") else {},
        initial=f"{store.url}/initial" if store.exists("initial/config.json") else None,
    )


def reread_benchmark(url: str, fingerprint: str) -> Benchmark:
    """Read a benchmark's folder in a worker.

    Raises:
        StrideError: if the folder has changed since the driver read it.
    """
    benchmark = read_benchmark(url)
    if benchmark.fingerprint != fingerprint:
        raise StrideError(f"{Store(url).display_url('')} changed meanwhile; run the command again.")
    return benchmark


def pool_texts(blocks: Blocks) -> Texts:
    """All blocks of a run in memory; prompts and padding are masked."""
    pool = blocks.batch(np.arange(len(blocks)))
    return Texts(pool.ids.astype(np.int32), np.ascontiguousarray(pool.mask))


def unretrained_benchmark(
    url: str, blocks: Texts, queries: Sequence[dict[str, Any]], model: str, start: str, fingerprint: str
) -> Benchmark:
    """Blocks and queries (rows of queries.SCHEMA) that are no benchmark's folder, as the input of recipes and methods.

    Queries have no kinds or parts, and there are no retraining results; ``start`` may be empty.
    """
    ids, mask = padded(queries, "cpu")
    texts = Texts(ids.numpy().astype(np.int32), mask.numpy(), np.array([len(row["token_ids"]) for row in queries]))
    labels = np.full(len(texts), ALL)
    return Benchmark(url, blocks, texts, labels, labels, model, start or None, None, fingerprint)


def put_files(store: Store, folder: str) -> None:
    """Publish the files of a local folder, such as a checkpoint's, in the order of their names."""
    for path in sorted(Path(folder).iterdir()):
        store.put(path.name, str(path))


def _texts(table: pa.Table, where: str, shortest: int) -> Texts:
    """Pad the column ``token_ids``, lists of any length, and ``loss_mask`` if there is one."""
    names = table.column_names
    if "token_ids" not in names:
        raise StrideError(f"{where} has no column token_ids (it has {', '.join(names)}).")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise StrideError(f"{where} has two columns named {twice!r}; rename one.")
    column = table["token_ids"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combine_chunks returns this for an empty column
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.list_(pa.int32()))
    kind = column.type
    if not _is_list(kind) or not pa.types.is_integer(kind.value_type):
        raise StrideError(f"{where}: token_ids must be lists of integers, not {kind}.")
    if not len(column):
        raise StrideError(f"{where} has no rows.")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0), dtype=np.int64)
    if lengths.min() < shortest:
        row = int(lengths.argmin())
        raise StrideError(f"{where}, row {row}: token_ids has {lengths[row]} tokens; it needs at least {shortest}.")
    values = pc.list_flatten(column)
    if values.null_count or (len(values) and not 0 <= pc.min(values).as_py() <= pc.max(values).as_py() < 2**31):
        raise StrideError(f"{where}: token_ids holds an empty, a negative or too large a token id.")
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(real.shape, dtype=np.int32)
    ids[real] = values.to_numpy(zero_copy_only=False)
    if "loss_mask" not in names:
        return Texts(ids, real)
    mask = np.zeros(real.shape, dtype=bool)
    mask[real] = _loss_masks(table["loss_mask"], lengths, where)
    # Like shard, which rejects a document without targets.
    if not (targets := mask[:, 1:].any(1) | (lengths < 2)).all():
        raise StrideError(f"{where}, row {int(targets.argmin())}: loss_mask leaves no token to be predicted.")
    return Texts(ids, mask, lengths)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _loss_masks(column: pa.ChunkedArray, lengths: np.ndarray, where: str) -> np.ndarray:
    """The column's values, one per token; raises StrideError unless they are lists of bool as long as token_ids."""
    kind = column.type
    if not _is_list(kind) or not pa.types.is_boolean(kind.value_type):
        raise StrideError(f"{where}: loss_mask must be lists of bool, not {kind}.")
    counts = np.asarray(pc.fill_null(pc.list_value_length(column), -1), dtype=np.int64)
    if (counts != lengths).any():
        row = int((counts != lengths).argmax())
        values = f"{counts[row]} values" if counts[row] >= 0 else "no value"
        raise StrideError(f"{where}, row {row}: loss_mask has {values} for {lengths[row]} tokens.")
    values = pc.list_flatten(column).combine_chunks()
    if values.null_count:
        raise StrideError(f"{where}: loss_mask has a null in place of true or false.")
    return np.asarray(values)


def _labels(table: pa.Table, column: str, where: str) -> np.ndarray:
    """Return the column as (Q,) str; all ``all`` if it is missing."""
    if column not in table.column_names:
        return np.full(table.num_rows, ALL)
    labels = table[column].to_pylist()
    empty = next((row for row, label in enumerate(labels) if not has_content(label)), None)
    if empty is not None:
        raise StrideError(f"{where}, row {empty}: {column} is empty; fill it or leave the column out.")
    if pa.types.is_nested(table[column].type):
        raise StrideError(f"{where}: {column} must be texts, not {table[column].type}.")
    return np.array([str(label) for label in labels])


def _fingerprint(store: Store, blocks: Texts, queries: Texts) -> str:
    """Hash the tokens, the architecture, and the model files' names and sizes; the weights may be gigabytes."""
    digest = hashlib.sha256()
    for texts in (blocks, queries):
        digest.update(repr(texts.ids.shape).encode() + texts.ids.tobytes() + texts.mask.tobytes())
        if texts.lengths is not None:
            digest.update(texts.lengths.tobytes())
    digest.update(store.read("model/config.json"))
    if store.exists("recipe.json"):
        digest.update(store.read("recipe.json"))
    for folder in ("model", "start", "initial"):
        for name in store.names(folder, ".safetensors"):
            digest.update(f"{folder}/{name} {store.fs.size(store.path(f'{folder}/{name}'))}\n".encode())
    return digest.hexdigest()[:16]
