"""Retraining results published by other projects, converted to ``retraining_*.npz``: Kronfluence, dattri, bergson.

A reader takes a folder as the project writes it and returns one seed. Each project has its own conventions:

| project | files | subsets | values, (S, Q) |
|---|---|---|---|
| kronfluence | ``losses.pt``, ``masks.pt`` (examples/wikitext/files) | masks (S, N), 1: trained on | losses |
| dattri | ``target_values_lds.pt``, ``indices_lds.pt``, also in ``lds/`` | rows trained on, (S, n) | minus the losses |
| dattri | ``gt.pt``, ``checkpoints/*/train_index.csv`` (experiments/gpt2_wikitext) | rows trained on | log-odds |
| bergson | ``subsets.json``, ``validation.csv``, ``summary.csv`` | rows left out | baseline minus loss |

dattri's values are means over the runs of a subset. Rows and queries are numbered in the order of the project's
datasets, so ``pool.parquet`` and ``queries.parquet`` must have that order. Files of ``torch.save`` are read without
running code from them.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.evaluate.retraining.finetune import FineTune
from stride_ray.evaluate.retraining.lds import spearman
from stride_ray.evaluate.retraining.results import (
    JSONL,
    NPZ,
    RetrainingResults,
    merge_seeds,
    npz_bytes,
    one_seed,
    row_numbers,
)
from stride_ray.models.causal_lm import load_model
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

# What the values of a file may be; log-odds are those of exp(−loss).
LOSS, NEGATIVE_LOSS, LOG_ODDS = VALUES = ("loss", "negative-loss", "log-odds")
# Below this rank correlation of the model's own losses with the imported ones, the summary warns.
_ALIKE = 0.5
# What numpy arrays need of a restricted unpickler. numpy 1 and 2 have other names for the function; an empty array
# calls bytes.
_rebuild = np.empty(0).__reduce__()[0]
_NUMPY: list[Any] = [
    *((_rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(bytes, np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")),
]


def import_results(
    benchmark: Benchmark, project: str, folders: Sequence[str], values: str | None = None
) -> dict[str, Any]:
    """Convert a project's results into ``retraining_<project>.npz`` in the benchmark's folder.

    Args:
        benchmark: pool and queries in the order of the project's datasets, and the model trained on that pool.
        project: a key of ``READERS``.
        folders: paths or fsspec URLs; several are several seeds of the same subsets.
        values: what the files hold, one of ``VALUES``; None: as the project documents it.

    Returns:
        subsets, seeds, files (written), agreement (rank correlation over queries of the model's own losses with the
        imported ones; None for fewer than three queries), and ``summary``, a paragraph with these figures.

    Raises:
        StrideError: for files of another format, pool or queries, or a benchmark that has other results already.
    """
    stores = [Store(folder) for folder in folders]
    where = [store.display_url("") for store in stores]
    if len(set(where)) < len(where):
        raise StrideError("A folder is given twice; its losses would count as two seeds.")
    seeds = []
    for store, place in zip(stores, where, strict=True):
        seeds.append(READERS[project](store, len(benchmark.blocks), values))
        _check_queries(seeds[-1], benchmark, place)
    names = (project,) if len(seeds) == 1 else tuple(f"{project}{number}" for number in range(len(seeds)))
    results = merge_seeds(seeds, names, where)
    target = Store(benchmark.url)
    files = _file_names(target, results)
    agreement = _agreement(benchmark, results)
    for number, file in enumerate(files):
        target.write(file, npz_bytes(results, number))
    return {
        "subsets": len(results.subsets),
        "seeds": len(seeds),
        "files": files,
        "agreement": agreement,
        "summary": _summary(benchmark, project, results, agreement, files),
    }


def kronfluence_results(store: Store, n_blocks: int, values: str | None = None) -> RetrainingResults:
    """Read the files of Kronfluence's WikiText example: numpy arrays in files of ``torch.save``.

    Raises:
        StrideError: for missing, unsafe or malformed files, or masks of another pool.
    """
    _require(store, ("losses.pt", "masks.pt"), "kronfluence")
    subsets = _masked_rows(_array(store, "masks.pt"), n_blocks, store.display_url("masks.pt"))
    return _seed(subsets, _array(store, "losses.pt"), values or LOSS, store.display_url("losses.pt"))


def dattri_results(store: Store, n_blocks: int, values: str | None = None) -> RetrainingResults:
    """Read the output of dattri's ``calculate_lds_ground_truth``, or the folder of its GPT-2 and WikiText experiment.

    The former's files have the names of the published benchmarks (``dattri.benchmark.load``).

    Raises:
        StrideError: for missing, unsafe or malformed files.
    """
    if store.exists("gt.pt") and not store.exists("target_values_lds.pt"):
        log_odds = _array(store, "gt.pt")
        names = [f"checkpoints/{number}/train_index.csv" for number in range(len(log_odds) if log_odds.ndim else 0)]
        subsets = [_comma_separated(store, name) for name in names]
        return _seed(subsets, log_odds, values or LOG_ODDS, store.display_url("gt.pt"))
    if not store.exists("target_values_lds.pt") and store.exists("lds/target_values_lds.pt"):
        store = store.child("lds")
    if not store.exists("target_values_lds.pt") and store.exists("metadata.yml"):
        raise StrideError(
            f"{store.display_url('')} holds retrained models and no target values; compute them with dattri's "
            "calculate_lds_ground_truth, and save its two tensors as target_values_lds.pt and indices_lds.pt."
        )
    _require(store, ("target_values_lds.pt", "indices_lds.pt"), "dattri")
    rows, where = _array(store, "indices_lds.pt"), store.display_url("indices_lds.pt")
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise StrideError(f"{where} must be row numbers, subsets × rows; it holds {rows.dtype} of shape {rows.shape}.")
    targets = _array(store, "target_values_lds.pt")
    return _seed(list(rows), targets, values or NEGATIVE_LOSS, store.display_url("target_values_lds.pt"))


def bergson_results(store: Store, n_blocks: int, values: str | None = None) -> RetrainingResults:
    """Read the run folder of bergson's ``magic`` or ``validate``, made with ``save_models: true``.

    Subsets that were not trained (``start``, ``stop``) are left out.

    Raises:
        StrideError: for missing, malformed or incomplete files, or documents that are not in the pool.
    """
    if values not in (None, LOSS):
        raise StrideError("bergson's files hold losses and their baselines; leave out --values.")
    _require(store, ("subsets.json",), "bergson")
    _check_removal(store)
    where = store.display_url("subsets.json")
    try:
        removed = json.loads(store.read_text("subsets.json"))
    except (ValueError, RecursionError) as error:
        raise StrideError(f"{where} is not valid JSON ({error}); was the file cut short?") from None
    if not isinstance(removed, list):
        raise StrideError(f"{where} must be a list with one list of documents per subset.")
    losses = _bergson_losses(store)
    last = max(losses)
    if last >= len(removed):
        raise StrideError(f"{where} has {len(removed)} subsets, and the validation has losses after subset {last}.")
    subsets = [_kept_rows(removed[number], n_blocks, f"{where}: subset {number}") for number in losses]
    return _seed(subsets, np.array(list(losses.values())), LOSS, store.display_url("validation.csv"))


# Readers by the name that --from takes.
READERS: dict[str, Callable[[Store, int, str | None], RetrainingResults]] = {
    "kronfluence": kronfluence_results,
    "dattri": dattri_results,
    "bergson": bergson_results,
}


def _require(store: Store, names: Sequence[str], project: str) -> None:
    """Raise StrideError if the folder lacks one of the files."""
    if missing := [name for name in names if not store.exists(name)]:
        raise StrideError(
            f"{store.display_url('')} has no {' and no '.join(missing)}; results from {project} need "
            f"{' and '.join(names)} in one folder."
        )


def _array(store: Store, name: str) -> np.ndarray:
    """Load a tensor or a numpy array from a file of ``torch.save`` without running code from it."""
    where, data = store.display_url(name), store.read(name)
    try:
        with torch.serialization.safe_globals(_NUMPY):
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if isinstance(found, torch.Tensor):
            found = found.detach()
            found = (found.double() if found.is_floating_point() else found).numpy()
    except Exception as error:  # pickle, zipfile, numpy and torch each raise their own types
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise StrideError(
                f"{where} calls {code[1]}, which is not part of a tensor or an array of numbers; none of it was run. "
                "Save the values as a plain tensor."
            ) from None
        raise StrideError(
            f"{where} is not a tensor or an array of numbers as torch.save writes it; is it complete, and not a Git "
            "LFS pointer?"
        ) from None
    if not isinstance(found, np.ndarray):
        raise StrideError(f"{where} holds a {type(found).__name__}; it needs one tensor or array.")
    return found


def _masked_rows(masks: np.ndarray, n_blocks: int, where: str) -> list[np.ndarray]:
    """The rows that each mask (S, N) of 0 and 1 marks."""
    if masks.ndim != 2 or masks.dtype.kind not in "biuf":
        raise StrideError(f"{where} must be masks, subsets × rows; it holds {masks.dtype} of shape {masks.shape}.")
    if masks.shape[1] != n_blocks:
        raise StrideError(
            f"{where} covers {masks.shape[1]} training sequences, and the pool has {n_blocks} rows; pool.parquet must "
            "hold the project's training sequences in their order."
        )
    odd = np.argwhere((masks != 0) & (masks != 1))
    if len(odd):
        subset, row = odd[0]
        raise StrideError(f"{where}: the mask of subset {subset} is {masks[subset, row]} at row {row}, not 0 or 1.")
    return [np.flatnonzero(mask) for mask in masks]


def _comma_separated(store: Store, name: str) -> np.ndarray:
    """The row numbers of a CSV file without a header."""
    words = [word.strip() for word in re.split(r"[,\n]", store.read_text(name))]
    odd = next((word for word in words if word and not word.isdecimal()), None)
    if odd is not None:
        raise StrideError(f"{store.display_url(name)} holds {odd[:30]!r}; it must hold row numbers only.")
    return row_numbers([int(word) for word in words if word], store.display_url(name))


def _kept_rows(removed: Any, n_blocks: int, what: str) -> np.ndarray:
    """The pool's rows without the removed ones."""
    rows = row_numbers(removed, what)
    if not len(rows):
        raise StrideError(f"{what} leaves out no document; remove it from subsets.json and from the validation.")
    if rows.min() < 0 or rows.max() >= n_blocks:
        raise StrideError(
            f"{what} leaves out document {rows.max() if rows.max() >= n_blocks else rows.min()}, and the pool has "
            f"{n_blocks} rows; pool.parquet must hold the project's training documents in their order, and scores per "
            "token (attribute_tokens) are not supported."
        )
    if len(np.unique(rows)) < len(rows):
        raise StrideError(f"{what} lists a document twice.")
    return np.setdiff1d(np.arange(n_blocks), rows)


def _check_removal(store: Store) -> None:
    """Raise StrideError if documents were trained on with another weight instead of being left out."""
    config = store.read_text("config.yaml") if store.exists("config.yaml") else ""
    weight = re.search(r"^\s*subset_weight:\s*(\S+)", config, re.M)
    if weight and weight[1] not in ("0", "0.0"):
        raise StrideError(
            f"{store.display_url('config.yaml')} has subset_weight: {weight[1]}; only results of leaving documents out "
            "(0.0) can be imported."
        )


def _bergson_losses(store: Store) -> dict[int, list[float]]:
    """Losses of each query by the number of the subset, ascending: baseline minus ``diff``, from all validation files.

    A run in parts has ``validation_<start>_<stop>.csv`` and ``summary_<start>_<stop>.csv`` for each part.
    """
    names = [name for name in store.names("", ".csv") if re.fullmatch(r"validation(_\d+_\d+)?\.csv", name)]
    if not names:
        raise StrideError(f"{store.display_url('')} has no validation.csv; results from bergson need it.")
    found: dict[int, dict[int, float]] = {}
    for name in names:
        summary = name.replace("validation", "summary")
        if not store.exists(summary):
            raise StrideError(
                f"{store.display_url('')} has no {summary}, which bergson writes after the last subset; finish the run."
            )
        baselines = {query: value for _, query, value, _ in _csv_rows(store, summary, "baseline_loss")}
        counts = {value for _, _, value, _ in _csv_rows(store, summary, "N")}
        rows = list(_csv_rows(store, name, "diff"))
        trained = len({subset for subset, *_ in rows})
        if counts != {trained}:
            raise StrideError(
                f"{store.display_url(name)} has losses after {trained} subsets, and {summary} counts "
                f"{max(counts, default=0):g}; was a file cut short?"
            )
        for subset, query, value, at in rows:
            if query not in baselines:
                raise StrideError(f"{at}: query {query} has no baseline_loss in {summary}.")
            if query in found.setdefault(subset, {}):
                raise StrideError(f"{at}: subset {subset} and query {query} have a row before; keep one of them.")
            found[subset][query] = baselines[query] - value
    return _complete(found, store.display_url(names[0]))


def _complete(found: dict[int, dict[int, float]], where: str) -> dict[int, list[float]]:
    """Order the losses by subset and query; StrideError if a subset lacks a query."""
    n_queries = max(max(losses) for losses in found.values()) + 1
    for subset, losses in found.items():
        if len(losses) < n_queries:
            missing = next(query for query in range(n_queries) if query not in losses)
            raise StrideError(f"{where}: subset {subset} has no row for query {missing}; was the run interrupted?")
    return {subset: [found[subset][query] for query in range(n_queries)] for subset in sorted(found)}


def _csv_rows(store: Store, name: str, column: str) -> Iterator[tuple[int, int, float, str]]:
    """Subset, query (0 if there is no such column), value and place of each row of one of bergson's CSV files."""
    where = store.display_url(name)
    text = store.read_text(name)
    if not text.endswith("\n"):
        raise StrideError(f"{where} does not end with a line break; was the file cut short?")
    rows = csv.DictReader(io.StringIO(text))
    try:
        if column not in (rows.fieldnames or ()):
            raise StrideError(f"{where} has no column {column}; it must be written by bergson's validate or magic.")
        for row in rows:
            at = f"{where}, line {rows.line_num}"
            try:
                subset, query = (int(row.get(key, "0")) for key in ("subset", "query"))
                value = float(row[column])
            except (TypeError, ValueError):
                raise StrideError(f"{at}, lacks a number; was the file cut short?") from None
            if subset < 0 or query < 0:
                raise StrideError(f"{at}, has a negative number of a subset or a query.")
            yield subset, query, value, at
    except csv.Error as error:
        raise StrideError(f"{where}, after line {rows.line_num}, is not valid CSV ({error}).") from None


def _seed(subsets: Sequence[np.ndarray], values_SQ: np.ndarray, meaning: str, where: str) -> RetrainingResults:
    """One seed with losses in nats from values of any meaning."""
    found = one_seed(subsets, values_SQ, where)
    empty = next((number for number, rows in enumerate(found.subsets) if not len(rows)), None)
    if empty is not None:
        raise StrideError(f"{where}: subset {empty} is empty; remove it here and from the file of the subsets.")
    values = found.losses.astype(np.float64)
    losses = {LOSS: values, NEGATIVE_LOSS: -values, LOG_ODDS: np.logaddexp(0, -values)}[meaning]
    odd = np.argwhere(losses[0] < 0)
    if len(odd):
        subset, query = odd[0]
        others = " or ".join(f"--values {each}" for each in VALUES if each != meaning)
        raise StrideError(
            f"{where} holds {values[0, subset, query]:g} for query {query} after subset {subset}, which cannot be a "
            f"{meaning.replace('-', ' ')}; if the values are something else, name it with {others}."
        )
    return replace(found, losses=losses.astype(np.float32))


def _check_queries(results: RetrainingResults, benchmark: Benchmark, where: str) -> None:
    """Raise StrideError if the results are not of as many queries, or hold rows outside the pool."""
    if results.losses.shape[2] == 1 < len(benchmark.queries):
        raise StrideError(
            f"{where} has one loss per subset, and there are {len(benchmark.queries)} queries; the results must be "
            "per query (bergson: query.aggregation none)."
        )
    results.check(len(benchmark.blocks), len(benchmark.queries), where)


def _file_names(store: Store, results: RetrainingResults) -> list[str]:
    """One file per seed; StrideError if the folder has other results, which would be read as further seeds."""
    files = [f"{NPZ[0]}{name}{NPZ[1]}" for name in results.names]
    present = [name for start, end in (NPZ, JSONL) for name in store.names("", end) if name.startswith(start)]
    if others := [name for name in present if name not in files]:
        raise StrideError(
            f"{store.display_url(others[0])} already exists; import into a copy of the benchmark without its results."
        )
    return files


def _agreement(benchmark: Benchmark, results: RetrainingResults) -> float | None:
    """Rank correlation over queries of the losses of ``model/`` with the mean imported ones.

    About 1 if rows and model are the project's. Queries in another order would otherwise go unnoticed and give an LDS
    of about 0.
    """
    losses_Q = results.losses.mean((0, 1))
    if len(losses_Q) < 3:
        return None
    recipe, model = FineTune(benchmark, batch=4), load_model(benchmark.model).model
    recipe.check_texts(model)
    return float(spearman(recipe.losses(model)[None], losses_Q[None])[0])


def _summary(
    benchmark: Benchmark, project: str, results: RetrainingResults, agreement: float | None, files: list[str]
) -> str:
    n_seeds, n_subsets, n_queries = results.losses.shape
    text = (
        f"{n_subsets} subsets of {results.size_range} of {len(benchmark.blocks)} blocks, {n_seeds} seed(s) from "
        f"{project}. Mean loss of {n_queries} queries {results.losses.mean():.4f}; between subsets a query's loss "
        f"varies by {results.losses.mean(0).std(0).mean():.4f} (standard deviation, mean over queries). "
    )
    if agreement is not None:
        text += f"Over queries, these losses correlate with those of model/ by {agreement:.2f}. "
        if agreement < _ALIKE:
            text += "That is low: check the order of queries.parquet and that model/ is the project's model. "
    return text + f"Written to {Store(benchmark.url).display_url('')}: {', '.join(files)}."
