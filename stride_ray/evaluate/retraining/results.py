"""Retraining results, LDS's ground truth: losses of models retrained on subsets of the pool.

Two formats, each with one file per training seed: the benchmarks' ``retraining_<seed>.npz``, and the paper authors'
``lds_<tag>.jsonl``. This module also reads and writes attribution scores, ``.npz`` (dense or sparse) or ``.npy``.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line

NPZ, JSONL = ("retraining_", ".npz"), ("lds_", ".jsonl")
# Keys of an ``_meta`` header that may map pool rows to corpus rows.
POOL_KEYS = ("pool_indices", "pool", "pool_idx", "indices")


@dataclass(frozen=True)
class RetrainingResults:
    """Retraining results; every seed trained on the same subsets.

    Attributes:
        subsets: S arrays of pool rows (int64, ascending, unique); their lengths may differ.
        losses: (seeds, S, Q) float32, nats per token: query q's mean loss after training on subset s.
        names: the seeds' names.
    """

    subsets: tuple[np.ndarray, ...]
    losses: np.ndarray
    names: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of pool rows in the smallest and in the largest subset."""
        sizes = [len(rows) for rows in self.subsets]
        return min(sizes), max(sizes)

    @property
    def size_range(self) -> str:
        """``sizes`` in words: "800", or "799 to 801"."""
        smallest, largest = self.sizes
        return f"{smallest}" if smallest == largest else f"{smallest} to {largest}"

    def membership(self, n_blocks: int) -> np.ndarray:
        """Return the membership matrix, (S, N) bool: which pool rows each subset holds."""
        member = np.zeros((len(self.subsets), n_blocks), dtype=bool)
        for row, chosen in zip(member, self.subsets, strict=True):
            row[chosen] = True
        return member

    def check(self, n_blocks: int, n_queries: int, where: str = "the retraining results") -> None:
        """Raise StrideError if a subset has rows outside the pool or there is not one loss per query."""
        for number, rows in enumerate(self.subsets):
            if len(rows) and rows[-1] >= n_blocks:
                raise StrideError(
                    f"{where}: subset {number} holds pool row {rows[-1]}, and the pool has {n_blocks} rows; the "
                    "results belong to another pool."
                )
        if self.losses.shape[2] != n_queries:
            raise StrideError(
                f"{where}: {self.losses.shape[2]} losses a subset, and there are {n_queries} queries; the results "
                "belong to other queries."
            )


def read_truth(store: Store) -> RetrainingResults | None:
    """Read a folder's ``retraining_*.npz``, else its ``lds_*.jsonl``, seeds in natural order; None if it has neither.

    Raises:
        StrideError: for unreadable files, losses that are not finite, or seeds with different subsets.
    """
    for (start, ending), parse in ((NPZ, truth_from_npz), (JSONL, truth_from_jsonl)):
        names = [name for name in store.names("", ending) if name.startswith(start)]
        if names:
            names.sort(
                key=lambda name: [(not p.isdigit(), int(p) if p.isdigit() else p) for p in _natural_sort_key(name)]
            )
            seeds = [parse(store.read(name), store.display_url(name)) for name in names]
            tags = tuple(name[len(start) : -len(ending)] for name in names)
            return merge_seeds(seeds, tags, [store.display_url(name) for name in names])
    return None


def write_truth(store: Store, truth: RetrainingResults, pool_indices: Sequence[int] | np.ndarray) -> list[str]:
    """Publish ``retraining_<seed>.npz`` and ``lds_<seed>.jsonl`` per seed; returns the file names.

    Args:
        store: the folder.
        truth: the results.
        pool_indices: (N,) the corpus row of each pool row, for the authors' format.
    """
    written = []
    for number, name in enumerate(truth.names):
        for (start, ending), data in (
            (NPZ, npz_bytes(truth, number)),
            (JSONL, jsonl_bytes(truth, number, pool_indices)),
        ):
            store.write(f"{start}{name}{ending}", data)
            written.append(f"{start}{name}{ending}")
    return written


def truth_from_npz(data: bytes, where: str) -> RetrainingResults:
    """Read one seed from ``subsets`` and ``losses`` (S, Q) float32.

    Args:
        data: the file's bytes. ``subsets`` is (S, n) int, or flat with ``offsets`` (S + 1): subset s is
            ``subsets[offsets[s]:offsets[s + 1]]``.
        where: the file's name, for messages.

    Raises:
        StrideError: if the arrays are missing or malformed.
    """
    arrays = _arrays(data, where)
    if "subsets" not in arrays or "losses" not in arrays:
        raise StrideError(f"{where} holds {', '.join(arrays) or 'nothing'}; it needs the arrays subsets and losses.")
    rows, losses = arrays["subsets"], arrays["losses"]
    if "offsets" in arrays:
        offsets = arrays["offsets"]
        whole = rows.ndim == offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 0
        if not whole or offsets[0] != 0 or offsets[-1] != len(rows):
            raise StrideError(f"{where}: offsets must run from 0 to the length of a flat subsets ({rows.size}).")
        if (np.diff(offsets) < 0).any():
            raise StrideError(f"{where}: offsets decrease at subset {int((np.diff(offsets) < 0).argmax())}.")
        subsets = np.split(rows, offsets[1:-1])
    elif rows.ndim == 2:
        subsets = list(rows)
    else:
        raise StrideError(f"{where}: subsets has shape {rows.shape}; it must be (S, n), or flat with offsets.")
    return one_seed(subsets, losses, where)


def truth_from_jsonl(data: bytes, where: str) -> RetrainingResults:
    """Read one seed from the authors' lines: a ``_meta`` header, then ``train_subset`` and ``test_loss`` per subset.

    Without ``train_subset``, ``train_subset_global`` is used, if the header maps pool rows to corpus rows.

    Raises:
        StrideError: naming the invalid line.
    """
    subsets: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    pool: list[Any] = []
    local: dict[int, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        at = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StrideError(f"{at}, is not valid JSON ({error}); was the file cut short?") from None
        if not isinstance(row, dict):
            raise StrideError(f"{at}, is not a JSON object.")
        if "_meta" in row:
            meta = row["_meta"] if isinstance(row["_meta"], dict) else {}
            pool, local = next((meta[key] for key in POOL_KEYS if isinstance(meta.get(key), list)), []), {}
            continue
        if "train_subset" in row:
            chosen = row_numbers(row["train_subset"], f"{at}: train_subset")
        elif "train_subset_global" in row and pool:
            local = local or _places(pool, where)
            corpus_rows = row_numbers(row["train_subset_global"], f"{at}: train_subset_global").tolist()
            strangers = [each for each in corpus_rows if each not in local]
            if strangers:
                raise StrideError(f"{at}: corpus row {strangers[0]} is not in the pool of the _meta header.")
            chosen = np.array([local[each] for each in corpus_rows], np.int64)
        else:
            raise StrideError(f"{at}, has no train_subset; each line after the _meta header needs one.")
        if not isinstance(row.get("test_loss"), list):
            raise StrideError(f"{at}, has no test_loss; it needs a list with one loss per query.")
        if losses and len(row["test_loss"]) != len(losses[0]):
            raise StrideError(f"{at}: {len(row['test_loss'])} losses, and {len(losses[0])} in the lines before it.")
        subsets.append(chosen)
        losses.append(_loss_values(row["test_loss"], f"{at}: test_loss"))
    if not subsets:
        raise StrideError(f"{where} holds no subset; it needs a line each.")
    return one_seed(subsets, np.stack(losses), where)


def row_numbers(values: Any, what: str) -> np.ndarray:
    """Convert a list of row numbers to int64; StrideError for anything else, and for what int64 does not hold."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        raise StrideError(f"{what} must be a flat list of row numbers.")
    odd = next((each for each in values if each != each or not -(2**63) <= each < 2**63 or each != int(each)), None)
    if odd is not None:
        raise StrideError(f"{what} holds {str(odd)[:30]}, which is no row number.")
    return np.array(list(map(int, values)), np.int64)


def _loss_values(values: list[Any], what: str) -> np.ndarray:
    """A JSON list of losses as float64; null is nan, and a number beyond float64 infinite."""
    if not set(map(type, values)) <= {int, float, type(None)}:
        raise StrideError(f"{what} must be a flat list of numbers.")

    def value(each: float | None) -> float:
        try:
            return np.nan if each is None else float(each)
        except OverflowError:
            return np.inf

    return np.array(list(map(value, values)), np.float64)


def _places(pool: list[Any], where: str) -> dict[int, int]:
    """The pool row of each corpus row that a ``_meta`` header lists."""
    corpus_rows = row_numbers(pool, f"{where}: the pool of the _meta header").tolist()
    found = {corpus: index for index, corpus in enumerate(corpus_rows)}
    if len(found) < len(corpus_rows):
        twice = next(each for index, each in enumerate(corpus_rows) if found[each] != index)
        raise StrideError(f"{where}: the pool of the _meta header lists corpus row {twice} twice.")
    return found


def npz_bytes(truth: RetrainingResults, seed: int) -> bytes:
    """Encode one seed for ``truth_from_npz``, deterministically."""
    arrays = {"losses": truth.losses[seed]}
    if len({len(rows) for rows in truth.subsets}) == 1:
        arrays["subsets"] = np.stack(truth.subsets).astype(np.int32)
    else:
        arrays["subsets"] = np.concatenate(truth.subsets).astype(np.int32)
        arrays["offsets"] = np.cumsum([0, *map(len, truth.subsets)], dtype=np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: arrays[name] for name in sorted(arrays)})
    return buffer.getvalue()


def jsonl_bytes(truth: RetrainingResults, seed: int, pool_indices: Sequence[int] | np.ndarray) -> bytes:
    """Encode one seed in the authors' format; float32 losses are written in full, so they round-trip bit for bit."""
    pool = np.asarray(pool_indices, dtype=np.int64)
    lines: list[dict[str, Any]] = [
        {"_meta": {"tag": truth.names[seed], "pool_size": len(pool), "pool_indices": pool.tolist()}}
    ]
    for rows, losses in zip(truth.subsets, truth.losses[seed], strict=True):
        lines.append(
            {
                "train_subset": rows.tolist(),
                "train_subset_global": pool[rows].tolist(),
                "test_loss": losses.astype(np.float64).tolist(),
            }
        )
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def read_scores(store: Store, name: str) -> Any:
    """Read attribution scores (Q, N): a dense array, or a scipy CSR array if the file holds a sparse matrix.

    Accepts ``.npy``, ``.npz`` with the array ``scores`` (or a single array), and ``scipy.sparse.save_npz``'s output.

    Raises:
        StrideError: for any other content, or values that are not finite.
    """
    data, where = store.read(name), store.display_url(name)
    arrays = _arrays(data, where, single=name.endswith(".npy"))
    if {"data", "indptr", "format", "shape"} <= arrays.keys():
        scores: Any = _sparse(data, where)
        values = scores.data
    else:
        key = "scores" if "scores" in arrays else next(iter(arrays), "")
        if not key or (key != "scores" and len(arrays) > 1):
            raise StrideError(f"{where} holds {', '.join(arrays) or 'nothing'}; it needs one array, named scores.")
        scores = values = arrays[key]
    if scores.ndim != 2 or values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        got = f"{scores.dtype} of shape {scores.shape}"
        raise StrideError(f"{where}: scores must be finite numbers, queries × blocks; got {got}.")
    return scores


def write_scores(store: Store, name: str, scores: Any) -> None:
    """Publish scores (Q, N), dense or scipy sparse, as a float32 ``.npz`` for ``read_scores``."""
    buffer = io.BytesIO()
    if scipy.sparse.issparse(scores):
        scipy.sparse.save_npz(buffer, scipy.sparse.csr_array(scores, dtype=np.float32))
    else:
        np.savez_compressed(buffer, scores=np.asarray(scores, np.float32))
    store.write(name, buffer.getvalue())


def one_seed(subsets: Sequence[np.ndarray], losses: np.ndarray, where: str) -> RetrainingResults:
    """Sort each subset's rows and validate one seed's content: losses are (S, Q).

    Raises:
        StrideError: beginning with ``where``, if shapes differ, a loss is not finite, or a subset repeats a row.
    """
    if losses.ndim != 2 or len(losses) != len(subsets):
        raise StrideError(f"{where}: {len(subsets)} subsets, and losses of shape {losses.shape}; it must be (S, Q).")
    if not len(subsets):
        raise StrideError(f"{where} holds no subset; it needs at least one.")
    if losses.dtype.kind not in "iuf":
        raise StrideError(f"{where}: losses must be numbers, not {losses.dtype}.")
    with np.errstate(over="ignore"):
        losses = losses.astype(np.float32)
    if not np.isfinite(losses).all():
        row, column = (int(each[0]) for each in np.nonzero(~np.isfinite(losses)))
        raise StrideError(
            f"{where}: the loss of query {column} after subset {row} is not finite; train it again or leave it out."
        )
    tidy = []
    for number, rows in enumerate(subsets):
        if rows.ndim != 1 or not (len(rows) == 0 or np.issubdtype(rows.dtype, np.integer)):
            raise StrideError(f"{where}: subset {number} must be a flat list of pool rows.")
        ascending = np.sort(rows.astype(np.int64))
        if len(rows) and (ascending[0] < 0 or (np.diff(ascending) == 0).any()):
            raise StrideError(f"{where}: subset {number} has a negative or a repeated pool row.")
        tidy.append(ascending)
    return RetrainingResults(tuple(tidy), losses[None], ("seed0",))


def merge_seeds(seeds: list[RetrainingResults], tags: tuple[str, ...], where: list[str]) -> RetrainingResults:
    """Join the seeds; ``tags`` are their names, ``where`` their files for messages.

    Raises:
        StrideError: if their subsets or their numbers of queries differ.
    """
    first = seeds[0]
    for each, name in zip(seeds, where, strict=True):
        pairs = zip(first.subsets, each.subsets, strict=False)
        different = next((i for i, (a, b) in enumerate(pairs) if not np.array_equal(a, b)), None)
        if different is not None or len(each.subsets) != len(first.subsets):
            what = f"at subset {different}" if different is not None else "in their number"
            raise StrideError(f"{name} and {where[0]} differ {what}; all seeds must train on the same subsets.")
        if each.losses.shape != first.losses.shape:
            raise StrideError(
                f"{name} has losses of {each.losses.shape[2]} queries and {where[0]} of {first.losses.shape[2]}; all "
                "seeds must have the same queries."
            )
    return RetrainingResults(first.subsets, np.concatenate([each.losses for each in seeds]), tags)


def _arrays(data: bytes, where: str, single: bool = False) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file; with ``single``, the one of an ``.npy`` file under the name scores."""
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        arrays = {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except Exception as error:  # of bad bytes, numpy, zipfile and zlib raise a dozen classes
        raise StrideError(f"{where} cannot be read as numpy arrays: {first_line(error)}") from None
    if single != ("" in arrays):
        held, needed = ("an archive of arrays", "y") if single else ("a single array", "z")
        raise StrideError(f"{where} is {held}; it must be an .np{needed} file.")
    return {"scores": arrays[""]} if single else arrays


def _sparse(data: bytes, where: str) -> scipy.sparse.csr_array:
    """A sparse matrix of ``scipy.sparse.save_npz``, whose indices scipy itself would use unchecked."""
    try:
        found = scipy.sparse.load_npz(io.BytesIO(data))
        if hasattr(found, "check_format"):
            found.check_format(full_check=True)
        return scipy.sparse.csr_array(found)
    except Exception as error:  # scipy raises several classes too
        raise StrideError(f"{where} cannot be read as a sparse matrix: {first_line(error)}") from None


def _natural_sort_key(name: str) -> list[str]:
    """Split a name at digit boundaries, for natural order: seed10 after seed9."""
    return [piece for piece in re.split(r"(\d+)", name) if piece]
