"""An accuracy benchmark: a pool, queries, the model trained on the pool, and what retraining on subsets of it gave.

A folder at any fsspec URL: ``pool.parquet`` (``token_ids``), ``queries.parquet`` (``token_ids``, and ``kind`` and
``part`` where there are several), ``model/``, ``start/`` where training on the pool began from a checkpoint, and the
retraining results (see ``truth``). Lengths may vary; other columns do not matter.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.evaluate.retraining.lds import ALL, evaluate, subset_sums
from stride_ray.evaluate.retraining.results import Truth, read_truth
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in memory; models stay where they are.

    Attributes:
        url: the folder.
        blocks: the pool, N sequences, rows in the order of ``pool.parquet``.
        queries: Q sequences.
        kinds: (Q,) str, each query's kind; ``all`` where the file does not say.
        parts: (Q,) str, each query's part (development or report); ``all`` where the file does not say.
        model: the folder of the model trained on the whole pool.
        start: the folder of the model that training began from; None where it began from random weights.
        truth: the retraining results; None where there are none yet.
        fingerprint: sixteen hexadecimal digits that change with the tokens, the architecture or the model files' sizes.
    """

    url: str
    blocks: Texts
    queries: Texts
    kinds: np.ndarray
    parts: np.ndarray
    model: str
    start: str | None
    truth: Truth | None
    fingerprint: str

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.url.rstrip("/").rpartition("/")[2] or self.url

    def retrained(self) -> Truth:
        """The retraining results.

        Raises:
            StrideError: where there are none.
        """
        if self.truth is None:
            raise StrideError(
                f"{Store(self.url).name_of('')} holds no retraining_*.npz or lds_*.jsonl; make them with "
                "'python jobs/retrain.py'."
            )
        return self.truth

    def lds(self, scores: np.ndarray) -> dict[str, list[float]]:
        """LDS of (Q, N) scores, with its interval's ends, by "part, kind".

        Raises:
            StrideError: where there are no retraining results.
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
        """What an attribution method is given: everything but the retraining results."""
        return Problem(
            blocks=self.blocks,
            queries=self.queries,
            model=self.model,
            start=self.start,
            checkpoints=checkpoints,
            learning_rates=learning_rates,
            seed=seed,
            batch_tokens=batch_tokens,
        )


def read_benchmark(url: str) -> Benchmark:
    """Read a benchmark's folder.

    Raises:
        StrideError: for a missing file or column, rows without tokens, or retraining results of something else.
    """
    store = Store(url)
    for needed in ("pool.parquet", "queries.parquet", "model/config.json"):
        if not store.exists(needed):
            raise StrideError(
                f"{store.name_of('')} is no benchmark: it has no {needed}; it needs pool.parquet, queries.parquet and "
                "a model/ folder."
            )
    pool, questions = store.read_table("pool.parquet"), store.read_table("queries.parquet")
    # A loss needs a next token, so a query needs two; a shorter block just teaches nothing.
    blocks = _texts(pool, store.name_of("pool.parquet"), 1)
    queries = _texts(questions, store.name_of("queries.parquet"), 2)
    truth = read_truth(store)
    if truth is not None:
        truth.check(len(blocks), len(queries), store.name_of(""))
    return Benchmark(
        url=store.url,
        blocks=blocks,
        queries=queries,
        kinds=_labels(questions, "kind", store.name_of("queries.parquet")),
        parts=_labels(questions, "part", store.name_of("queries.parquet")),
        model=f"{store.url}/model",
        start=f"{store.url}/start" if store.exists("start/config.json") else None,
        truth=truth,
        fingerprint=_fingerprint(store, blocks, queries),
    )


def reread_benchmark(url: str, fingerprint: str) -> Benchmark:
    """Read a benchmark's folder in a worker.

    Raises:
        StrideError: where the folder is not what the driver saw.
    """
    benchmark = read_benchmark(url)
    if benchmark.fingerprint != fingerprint:
        raise StrideError(f"{Store(url).name_of('')} changed meanwhile; run the command again.")
    return benchmark


def _texts(table: pa.Table, where: str, shortest: int) -> Texts:
    """The column ``token_ids``, lists of any length, padded."""
    if "token_ids" not in table.column_names:
        raise StrideError(f"{where} has no column token_ids (it has {', '.join(table.column_names)}).")
    column = table["token_ids"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # what combine_chunks gives for an empty column
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.list_(pa.int32()))
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
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
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int32)
    ids[mask] = values.to_numpy(zero_copy_only=False)
    return Texts(ids, mask)


def _labels(table: pa.Table, column: str, where: str) -> np.ndarray:
    """(Q,) str; all alike where the column is missing."""
    if column not in table.column_names:
        return np.full(table.num_rows, ALL)
    labels = table[column].to_pylist()
    if None in labels:
        raise StrideError(f"{where}, row {labels.index(None)}: {column} is empty; fill it or leave the column out.")
    return np.array([str(label) for label in labels])


def _fingerprint(store: Store, blocks: Texts, queries: Texts) -> str:
    """Of the tokens, the architecture, and names and sizes of the models' files (weights may be gigabytes)."""
    digest = hashlib.sha256()
    for texts in (blocks, queries):
        digest.update(repr(texts.ids.shape).encode() + texts.ids.tobytes() + texts.mask.tobytes())
    digest.update(store.read("model/config.json"))
    for folder in ("model", "start"):
        for name in store.names(folder, ".safetensors"):
            digest.update(f"{folder}/{name} {store.fs.size(store.path(f'{folder}/{name}'))}\n".encode())
    return digest.hexdigest()[:16]
