"""Responses of operators at all sites: products of a query's direction (directions.py) with every operator row.

Each work unit scans a slice of the row store. If rows are subsets, all K products of a query are kept as input to the
Lasso; if rows are blocks, only the ``attribute.top`` of largest influence.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stride_ray.attribution.directions import (
    begin_directions,
    compute_directions,
    gradient_bytes,
    part_count,
    queries_per_unit,
    read_directions,
)
from stride_ray.attribution.responses import response_schema
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.failures import NOT_FINITE, check_failed_queries, fail, finite_rows
from stride_ray.models.curvature.kfac import load_sites
from stride_ray.models.curvature.sketch import whole_shape
from stride_ray.models.sites import Site, scale_negative
from stride_ray.operators.one_bit import Queries, Rows, estimate_inner_products, quantise_queries
from stride_ray.operators.row_store import RowStore
from stride_ray.operators.sketched_rows import SKETCH
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.config import Config
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, part_name
from stride_ray.runtime.storage import Store, tensor_bytes

# Maximum queries per pass over the rows.
MAX_QUERIES_PER_PASS = 256
# Bytes of rows per work unit, and the minimum number of units, which balances the load of few workers.
SLICE, SLICES = 2**28, 8
RESPONSES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("base_loss", pa.float32()),
        pa.field("rows", pa.list_(pa.int64()), nullable=False),
        pa.field("response", pa.list_(pa.float32()), nullable=False),
        pa.field("reliability", pa.float32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)


def respond_sites(
    run: Run, blocks: Blocks, curvature: Store, operators: Store, stage: Stage, name: str, actors: ActorPool
) -> None:
    """Compute the responses and write them to ``part-*.parquet``.

    ``response`` holds products with rows, in units of a block's mean influence on itself: all K products if rows are
    subsets (responses.response_schema), those with the listed ``rows`` if rows are blocks (RESPONSES). ``reliability``
    is the split-half reliability of the products over rows: with r the correlation of the two halves over all rows,
    2r / (1 + r) (Spearman–Brown). It estimates the squared correlation with products of unsketched gradients, without
    what the axes of a sketch leave out; it was too low rather than too high where both were known (RESULTS.md).

    Args:
        run: the run.
        blocks: the pool.
        curvature: the finished ``curvature/`` store, with the sites.
        operators: the finished row store.
        stage: ``responses/<name>``, begun, with ``queries.parquet``.
        name: the query set.
        actors: the actor pool.
    """
    config, table = run.config, stage.store.read_table("queries.parquet")
    parts = list(range(part_count(curvature, table.num_rows)))

    def code(missing: list[int]) -> Iterator[dict[str, Any]]:
        directions = begin_directions(run, table, name)
        compute_directions(config, blocks, curvature, directions, table.num_rows, actors)
        return actors.map(QueryCoder, (directions, operators, actors.device, stage), missing)

    coded = run_missing(stage, {code_name(part): part for part in parts}, code, "code", "parts")
    check_failed_queries(answer for marker in coded for answer in marker["answers"])
    store = RowStore(operators)
    several = MAX_QUERIES_PER_PASS // queries_per_unit(gradient_bytes(curvature))
    groups = [parts[at : at + several] for at in range(0, len(parts), several)]
    slices = list(enumerate(slice_parts(store.facts["parts"], store.facts["row_bytes"])))
    done = stage.done()
    open_groups = [group for group in groups if any(part_name(part) not in done for part in group)]
    units = {scan_name(group, each[0]): (group, *each) for group in open_groups for each in slices}
    scan = partial(actors.map, RowScanner, (config, operators, stage))
    run_missing(stage, units, scan, "multiply", "rows", lambda unit: sum(part["count"] for part in unit[2]))
    left = {part_name(part): (part, group, len(slices)) for group in open_groups for part in group}
    top = config.attribute.top if store.of_blocks else 0
    given = (stage, top, config.attribute.negative_scale)
    run_missing(stage, left, partial(actors.map_function, merge_slices, given), "gather", "parts")


def code_name(part: int) -> str:
    """Name of the file with a part's quantised sketches, and of its done marker."""
    return f"codes-{part:05d}"


def scan_name(group: list[int], index: int) -> str:
    """Name of the file with a group's products with a slice of the rows, and of its done marker."""
    return f"scan-{group[0]:05d}-{index:05d}"


def slice_parts(parts: list[dict[str, Any]], row_bytes: int) -> list[list[dict[str, Any]]]:
    """Split the store's parts into consecutive slices of about SLICE bytes; at least SLICES, parts permitting."""
    total = sum(part["count"] for part in parts) * row_bytes
    count = min(len(parts), max(SLICES, -(-total // SLICE)))
    return [[parts[i] for i in some] for some in np.array_split(np.arange(len(parts)), count)]


class QueryCoder:
    """Sketches the directions of a part's queries and writes them at four bits per coordinate, with the statuses."""

    def __init__(self, directions: Stage, operators: Store, device: str, stage: Stage) -> None:
        self.directions, self.responses = directions, stage
        self.sketches = load_sites(operators, SKETCH, device)

    def __call__(self, part: int) -> dict[str, Any]:
        """Process one part; returns its done marker."""
        started = time.monotonic()
        answers, directions = read_directions(self.directions, part)
        coded = code_directions(self.sketches, answers, directions)
        tensors = {each.name: torch.from_numpy(getattr(coded, each.name)) for each in fields(Queries)}
        self.responses.store.write(f"{code_name(part)}.safetensors", tensor_bytes(tensors))
        return self.responses.mark(code_name(part), started, answers=answers)


def code_directions(
    sketches: tuple[Site, ...], answers: list[dict[str, Any]], directions: dict[str, torch.Tensor]
) -> Queries:
    """Sketch and quantise the directions of some queries.

    Args:
        sketches: the sketched sites of the operators, on their device.
        answers: the queries' statuses; one whose sketch is not finite is marked failed here and left out.
        directions: by site (q, F, D) float32, of the queries without "failed"; emptied.
    """
    rows = [i for i, answer in enumerate(answers) if answer["status"] == "ok"]
    sections = []
    for site in sketches:
        J = directions.pop(site.name, None)
        none = torch.zeros(0, math.prod(whole_shape(site)))
        sections.append(none if J is None else site.whiten(J.to(site.W_in.device)).flatten(1).cpu() / site.scale)
    finite = finite_rows(sections)
    for i, good in zip(rows, finite.tolist(), strict=True):
        if not good:
            fail(answers[i], NOT_FINITE)
    return quantise_queries([section[finite].numpy() for section in sections])


def read_codes(store: Store, parts: list[int]) -> Queries:
    """Read the quantised sketches of the queries that did not fail, over several parts, in order."""
    read = [store.read_tensors(f"{code_name(part)}.safetensors") for part in parts]
    return Queries(*(np.concatenate([each[f.name].numpy() for each in read]) for f in fields(Queries)))


class RowScanner:
    """Multiplies a group's queries with a slice of the rows; writes the kept products and half moments."""

    def __init__(self, config: Config, operators: Store, stage: Stage) -> None:
        self.top, self.negative_scale, self.stage = config.attribute.top, config.attribute.negative_scale, stage
        self.rows = RowStore(operators)
        self.group: list[int] = []

    def __call__(self, unit: tuple[list[int], int, list[dict[str, Any]]]) -> dict[str, Any]:
        """Process one unit (group, slice index, the slice's parts); returns its done marker."""
        started = time.monotonic()
        group, index, parts = unit
        if group != self.group:
            self.group, self.queries = group, read_codes(self.stage.store, group)
        failed = list[int]()

        def finite_rows_of_parts() -> Iterator[Rows]:
            for part in parts:
                rows, spoilt = self.rows.read_finite(part)
                failed.extend(spoilt)
                yield rows

        top = self.top if self.rows.of_blocks else 0
        kept = multiply(
            finite_rows_of_parts(), parts[0]["first"], self.queries, self.rows.starts, top, self.negative_scale
        )
        name = scan_name(group, index)
        self.stage.store.write(f"{name}.safetensors", tensor_bytes(kept))
        return self.stage.mark(name, started, rows=sum(part["count"] for part in parts), not_finite=failed)


def multiply(
    parts: Iterable[Rows], first: int, queries: Queries, starts: np.ndarray, top: int, negative_scale: float
) -> dict[str, torch.Tensor]:
    """Multiply queries with consecutive rows.

    Args:
        parts: the rows, part by part.
        first: number of the first row.
        queries: Q queries.
        starts: starts of the sections (RowStore.starts).
        top: number of products to keep per query, those of largest influence; 0: all.
        negative_scale: factor of negative influence in this order.

    Returns:
        ``rows`` (Q, n) int64 and ``values`` (Q, n) float32, the kept products, and ``moments`` (half_moments) of all.
    """
    values, moments = [], np.zeros((len(queries), 6))
    for rows in parts:
        halves = estimate_inner_products(rows, queries, starts)
        moments += half_moments(halves)
        values.append(halves.sum(2).astype(np.float32))
    found = torch.from_numpy(np.concatenate([np.zeros((len(queries), 0), np.float32), *values], 1))
    numbers = torch.arange(first, first + found.shape[1]).expand(found.shape)
    if 0 < top < found.shape[1]:
        # Ties are broken by row number, independently of the slicing.
        order = scale_negative(found, negative_scale).abs().argsort(dim=1, descending=True, stable=True)[:, :top]
        found, numbers = found.gather(1, order), numbers.gather(1, order)
    return {"rows": numbers.contiguous(), "values": found, "moments": torch.from_numpy(moments)}


def half_moments(halves: np.ndarray) -> np.ndarray:
    """Reduce the two halves (a, b) of n products, (Q, n, 2), to n, Σa, Σb, Σa², Σb² and Σab per query: (Q, 6)."""
    a, b = halves[..., 0], halves[..., 1]
    n = np.full(len(a), float(a.shape[1]))
    return np.stack([n, a.sum(1), b.sum(1), (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)], 1)


def reliability(moments: np.ndarray) -> np.ndarray:
    """Split-half reliability 2r / (1 + r) from half_moments, 0 if r ≤ 0: (Q,)."""
    n, a, b, aa, bb, ab = moments.T
    spread = np.sqrt(np.maximum((n * aa - a * a) * (n * bb - b * b), 0.0))
    r = np.divide(n * ab - a * b, spread, out=np.zeros(len(n)), where=spread > 0)
    return np.where(r > 0, 2 * r / (1 + r), 0.0)


def merge_products(
    slices: list[dict[str, torch.Tensor]], top: int, negative_scale: float
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Merge the products of each query (``multiply``) over slices of the rows, in order.

    Args:
        slices: the products by slice.
        top: number of products to keep per query; 0: all.
        negative_scale: as for ``multiply``.

    Yields:
        Per query: ascending row numbers (n,) int64, products (n,) float32, and split-half reliability over all rows.
    """
    numbers = np.concatenate([each["rows"].numpy() for each in slices], 1)
    values = np.concatenate([each["values"].numpy() for each in slices], 1)
    moments: Any = sum(each["moments"].numpy() for each in slices)
    for number, value, reliable in zip(numbers, values, reliability(moments), strict=True):
        size = scale_negative(torch.from_numpy(value), negative_scale).abs().numpy()
        order = np.sort(np.lexsort((number, -size))[: top or None])
        order = order[np.argsort(number[order], kind="stable")]
        yield number[order], value[order], reliable


def merge_slices(stage: Stage, top: int, negative_scale: float, unit: tuple[int, list[int], int]) -> dict[str, Any]:
    """Merge one part's responses over all slices and write its table; returns the done marker.

    Args:
        stage: ``responses/<name>``, with the products of all slices.
        top: number of largest responses to keep per query; 0: all.
        negative_scale: factor of negative responses in this order.
        unit: index of the part, the parts of its group, and the number of slices.
    """
    started = time.monotonic()
    part, group, slices = unit
    markers = stage.done()
    answers = [markers[code_name(each)]["answers"] for each in group]
    before = sum(a["status"] == "ok" for each, some in zip(group, answers, strict=True) if each < part for a in some)
    mine = answers[group.index(part)]
    at = slice(before, before + sum(answer["status"] == "ok" for answer in mine))
    read = [stage.store.read_tensors(f"{scan_name(group, index)}.safetensors") for index in range(slices)]
    found = merge_products([{key: each[key][at] for key in each} for each in read], top, negative_scale)
    rows = []
    for answer in mine:
        row = {**answer, "rows": [], "response": [], "reliability": None}
        if answer["status"] == "ok":
            row["rows"], row["response"], row["reliability"] = next(found)
        rows.append(row)
    n_rows = sum(each["rows"].shape[1] for each in read)
    schema = RESPONSES if top else response_schema(n_rows).append(RESPONSES.field("reliability"))
    for row in rows if not top else ():
        row["response"] = row["response"] if len(row["response"]) else np.full(n_rows, np.nan, np.float32)
    digest = stage.store.write_table(f"{part_name(part)}.parquet", pa.Table.from_pylist(rows, schema))
    failed = sum(row["status"] != "ok" for row in rows)
    agree = [float(row["reliability"]) for row in rows if row["status"] == "ok"]
    return stage.mark(part_name(part), started, queries=len(rows), failed=failed, reliability=agree, sha256=digest)
