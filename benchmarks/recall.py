"""Recall of shortlists as the pool grows: share of the exact best blocks, from estimates by row size, TF-IDF, and both.

A benchmark's pool is extended with blocks of other texts in random order, so that its first n blocks form a pool of n
blocks for every n. A single pass computes each block's exact influence on every query and, from the same gradients,
one-bit rows of several sizes and their products. The result equals one pass per size (test_recall).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stride_ray.attribution.directions import begin_directions, compute_directions, part_count, read_directions
from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.shard import shard
from stride_ray.evaluate.baselines.lexical import tfidf
from stride_ray.evaluate.baselines.problem import Texts
from stride_ray.evaluate.comparison.stride_variants import query_table, settings
from stride_ray.evaluate.retraining.benchmark import Benchmark, read_benchmark
from stride_ray.models.curvature.eigenvalues import EIGENVALUES, load_ekfac
from stride_ray.models.curvature.kfac import SITES, begin_curvature, finish_curvature, load_sites
from stride_ray.models.curvature.principal_axes import principal_axes
from stride_ray.models.curvature.sketch import sketch_sites
from stride_ray.models.loading import load_measured_model, measured_model_fingerprint
from stride_ray.models.pool_worker import ModelWorker
from stride_ray.models.sites import scale_negative, site_gradients
from stride_ray.operators.one_bit import estimate_inner_products, pack_rows, quantise_queries, word_starts
from stride_ray.operators.site_fit import coordinates_in, shapes_of
from stride_ray.runtime.actor_pool import shared_actor_pool
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store, tensor_bytes

EXACT, WORDS = "exact", "TF-IDF"
BEST = (10, 50)
CANDIDATES = (10, 25, 50, 100, 400, 1600)


def measure_recall(
    benchmark_url: str, texts: Sequence[str], folder: str, sizes: Sequence[int], row_bytes: Sequence[int]
) -> dict[str, Any]:
    """Measure the share of the exact best blocks among each source's candidates, by pool size.

    Args:
        benchmark_url: its pool comes first; its queries and model are used.
        texts: inputs of shard that extend the pool.
        folder: outputs are kept there, so a second run resumes.
        sizes: pool sizes; the largest is measured, the others are prefixes of it.
        row_bytes: bytes per block's row, several sizes.

    Returns:
        ``rows``: blocks, source (bytes per block, TF-IDF, or both), and by "best of candidates" the mean over queries.

    Raises:
        StrideError: for too few texts, or as shard.
    """
    benchmark, store = read_benchmark(benchmark_url), Store(folder)
    run = filled_pool(benchmark, texts, store, max(sizes))
    blocks = Blocks(run.stage("blocks").store)
    curvature = begin_curvature(run, blocks, measured_model_fingerprint(run.config))
    stage = Stage(run.store.child("recall"), blocks.manifest["fingerprint"])
    ranges = blocks.cut(unit_count(len(blocks)))
    units = {f"scores-{i:05d}": (f"scores-{i:05d}", *ends) for i, ends in enumerate(ranges)}
    questions = query_table(benchmark.queries)
    with shared_actor_pool(run.config, len(units)) as actors:
        finish_curvature(run.config, blocks, curvature, actors)
        directions = begin_directions(run, questions, "recall")
        compute_directions(run.config, blocks, curvature.store, directions, len(questions), actors)
        given = (run.config, blocks, actors.device, curvature.store, directions, stage, tuple(row_bytes))
        run_missing(stage, units, partial(actors.map, RecallWorker, given), "recall", "units")
    read = [stage.store.read_tensors(f"{name}.safetensors") for name in units]
    scores = {key: torch.cat([each[key] for each in read], 1).numpy() for key in read[0]}
    return {
        "benchmark": benchmark.name,
        "queries": len(benchmark.queries),
        "rows": recalls(run, benchmark, scores, sizes),
    }


def filled_pool(benchmark: Benchmark, texts: Sequence[str], store: Store, size: int) -> Run:
    """Make a run whose blocks are the benchmark's pool and then other texts' in random order, ``size`` in total."""
    given = settings(benchmark, store, ComputeConfig(), {})
    changes = {key: value for key, value in given.items() if key not in ("corpus.columns", "corpus.layout")}
    others = Run(f"{store.url}/texts", changes={**changes, "corpus.input": list(texts)})
    shard(others)
    found = Blocks(others.stage("blocks").store)
    wanted = size - len(benchmark.blocks)
    if len(found) < wanted:
        raise StrideError(f"The texts make {len(found)} blocks, and {wanted} are needed; give more, or smaller sizes.")
    order = np.random.default_rng(0).permutation(len(found))[:wanted]
    if not store.exists("pool.parquet"):
        rows = [benchmark.blocks.tokens(i) for i in range(len(benchmark.blocks))] + list(found.batch(order).ids)
        store.write_table("pool.parquet", pa.table({"token_ids": pa.array(rows, pa.list_(pa.int32()))}))
    run = Run(f"{store.url}/run", changes={**given, "corpus.input": [f"{store.url}/pool.parquet"]})
    shard(run)
    return run


class RecallWorker(ModelWorker):
    """Publishes the exact influence of some blocks on all queries, and the estimates from rows of every size."""

    load = staticmethod(load_measured_model)

    def __init__(
        self,
        config: Config,
        blocks: Blocks,
        device: str,
        curvature: Store,
        directions: Stage,
        stage: Stage,
        row_bytes: tuple[int, ...],
    ) -> None:
        super().__init__(config, blocks, device)
        sites = load_sites(curvature, SITES, "cpu")
        self.stage, self.sites = stage, tuple(site.to(self.model.device) for site in sites)
        shares = curvature.read_json("manifest.json")["sites"]
        axes = principal_axes(sites, load_ekfac(curvature, EIGENVALUES, "cpu"))
        self.sketches = {}
        for size in row_bytes:
            coordinates = max(len(sites), coordinates_in(size, len(sites)))
            sketches = sketch_sites(sites, shapes_of(sites, axes, shares, coordinates), config.seed, axes)
            self.sketches[size] = [sketch.to(self.model.device) for sketch in sketches]
        self._code(directions, part_count(curvature, len(directions.store.read_table("queries.parquet"))))

    def _code(self, directions: Stage, parts: int) -> None:
        solved: dict[str, list[Tensor]] = {}
        sections: dict[int, list[list[np.ndarray]]] = {size: [[] for _ in self.sites] for size in self.sketches}
        for part in range(parts):
            answers, found = read_directions(directions, part)
            failed = next((answer for answer in answers if answer["status"] != "ok"), None)
            if failed:
                raise StrideError(f"Query {failed['query_id']} of the benchmark: {failed['error']}")
            for at, site in enumerate(self.sites):
                J = found[site.name].to(self.model.device)
                solved.setdefault(site.name, []).append(site.precondition(J).flatten(1))
                for size, sketches in self.sketches.items():
                    sections[size][at].append((sketches[at].whiten(J).flatten(1) / sketches[at].scale).cpu().numpy())
        self.solved = {name: torch.cat(pieces) for name, pieces in solved.items()}
        self.codes = {
            size: quantise_queries([np.concatenate(pieces) for pieces in each]) for size, each in sections.items()
        }

    def __call__(self, unit: tuple[str, int, int]) -> dict[str, Any]:
        """Process one unit; returns its marker."""
        started = time.monotonic()
        name, first, last = unit
        found: dict[str, list[Tensor]] = {}
        negative_scale = self.config.attribute.negative_scale
        for batch in self.blocks.batches(first, last, self.rows):
            sections: dict[int, list[np.ndarray]] = {size: [] for size in self.sketches}
            total: Any = 0.0
            for at, (site, J) in enumerate(site_gradients(self.model, self.sites, *self.trimmed(batch))[0]):
                total = total + self.solved[site.name] @ J.flatten(1).T / site.scale
                for size, sketches in self.sketches.items():
                    sections[size].append(sketches[at].whiten(J).flatten(1).cpu().numpy())
            found.setdefault(EXACT, []).append(scale_negative(total, negative_scale).cpu())
            for size, each in sections.items():
                starts = word_starts([z.shape[1] for z in each])
                estimates = estimate_inner_products(pack_rows(each), self.codes[size], starts).sum(2)
                estimates = scale_negative(torch.from_numpy(estimates).float(), negative_scale)
                found.setdefault(str(size), []).append(estimates)
        self.stage.store.write(f"{name}.safetensors", tensor_bytes({k: torch.cat(v, 1) for k, v in found.items()}))
        return self.stage.mark(name, started)


def recalls(
    run: Run, benchmark: Benchmark, scores: dict[str, np.ndarray], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Compute the table's rows."""
    pool = Blocks(run.stage("blocks").store)
    rows = []
    for n in sorted(sizes):
        batch = pool.batch(np.arange(n))
        words = tfidf.scores(replace(benchmark.problem(), blocks=Texts(batch.ids, batch.mask)))
        best = _ordered(scores[EXACT][:, :n], max(BEST))
        listed = {WORDS: _ordered(words, max(CANDIDATES))}
        for size in sorted((key for key in scores if key != EXACT), key=int):
            listed[size] = _ordered(scores[size][:, :n], max(CANDIDATES))
        for source, mine in listed.items():
            rows.append({"blocks": n, "source": source, **_shares(best, mine)})
            if source != WORDS:
                rows.append(
                    {"blocks": n, "source": f"{source} and {WORDS}", **_shares(best, _interleave(mine, listed[WORDS]))}
                )
    return rows


def _ordered(scores: np.ndarray, count: int) -> np.ndarray:
    """Columns with the largest absolute scores per row, (Q, count)."""
    return np.argsort(-np.abs(scores), axis=1, kind="stable")[:, :count]


def _interleave(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Interleave two ranked lists per row, without duplicates."""
    found = []
    for pair in zip(one, two, strict=True):
        mixed = np.stack(pair, 1).ravel()
        found.append(mixed[np.sort(np.unique(mixed, return_index=True)[1])][: len(pair[0])])
    return np.stack(found)


def _shares(best: np.ndarray, candidates: np.ndarray) -> dict[str, float]:
    """By "best of candidates", the mean share of the best blocks among the first candidates."""
    found = {}
    for top in BEST:
        for count in CANDIDATES:
            if count >= top:
                inside = [np.isin(b[:top], c[:count]).mean() for b, c in zip(best, candidates, strict=True)]
                found[f"{top} of {count}"] = float(np.mean(inside))
    return found


def table(found: dict[str, Any]) -> str:
    """Format the result as Markdown: shares of the exact best 10 and 50."""
    cells = [f"{top} of {count}" for top in BEST for count in CANDIDATES if count >= top]
    lines = [f"| blocks | source | {' | '.join(cells)} |", "|---" * (2 + len(cells)) + "|"]
    for row in found["rows"]:
        source = row["source"] if row["source"].startswith(WORDS) else f"{row['source']} bytes a block"
        source = source.replace(f" and {WORDS} bytes a block", f" bytes a block and {WORDS} in turns")
        lines.append(f"| {row['blocks']:,} | {source} | {' | '.join(f'{row[cell]:.3f}' for cell in cells)} |")
    return "\n".join(lines)
