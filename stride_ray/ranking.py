"""Ranked tables of some queries, from exact scores, estimates, or both."""

import time
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.blocks import Blocks
from stride_ray.config import Config
from stride_ray.influence import RECOVERY, Influence, rank_tables
from stride_ray.run import Stage


def rank_unit(
    config: Config,
    blocks: Blocks,
    stage: Stage,
    scored: list[tuple[tuple[int, ...], str]],
    answers: list[list[dict[str, Any]]],
    part: int,
) -> dict[str, Any]:
    """Publish the tables of one part's queries; returns the marker.

    Args:
        config: of the run.
        blocks: the pool.
        stage: with the scores (scoring.ScoreWorker).
        scored: the group and the name of each file of scores; none: estimates alone.
        answers: by part, what is known of its queries: rows of RECOVERY, with ``ordinals`` and ``estimates`` where
            there are some.
        part: whose tables.
    """
    started = time.monotonic()
    mine = answers[part]
    found = list(_influences(config, stage, scored, answers, part))
    good = [answer["query_id"] for answer in mine if answer["status"] == "ok"]
    ranked, documents = rank_tables(good, found, blocks)
    each = iter(found)
    told = []
    for answer in mine:
        row = {key: answer.get(key) for key in RECOVERY.names}
        if answer["status"] == "ok":
            influence = next(each)
            row |= {"nonzeros": len(influence.ordinals), "exact": int(influence.exact.sum())}
        told.append(row)
    name = f"{part:05d}"
    stage.store.write_table(f"influence-{name}.parquet", ranked)
    stage.store.write_table(f"documents-{name}.parquet", documents)
    stage.store.write_table(f"recovery-{name}.parquet", pa.Table.from_pylist(told, RECOVERY))
    return stage.mark(
        name,
        started,
        queries=len(told),
        failed=len(told) - len(good),
        nonzeros=[len(influence.ordinals) for influence in found],
        exact=[int(influence.exact.sum()) for influence in found],
        unsolved=sum(answer.get("steps") == 0 for answer in mine if answer["status"] == "ok"),
        reliability=[answer.get("reliability") for answer in mine if answer["status"] == "ok"],
    )


def _influences(
    config: Config,
    stage: Stage,
    scored: list[tuple[tuple[int, ...], str]],
    answers: list[list[dict[str, Any]]],
    part: int,
) -> Any:
    """Influence on each of a part's queries that did not fail."""
    good = [answer for answer in answers[part] if answer["status"] == "ok"]
    group = next((group for group, _ in scored if part in group), (part,))
    before = sum(answer["status"] == "ok" for each in group if each < part for answer in answers[each])
    rows = slice(before, before + len(good))
    read = [stage.store.read_tensors(f"{name}.safetensors") for of, name in scored if of == group]
    ordinals = np.concatenate(
        [np.zeros((len(good), 0), np.int64), *(each["ordinals"][rows].numpy() for each in read)], 1
    )
    values = np.concatenate([np.zeros((len(good), 0)), *(each["influence"][rows].double().numpy() for each in read)], 1)
    for answer, at, weights in zip(good, ordinals, values, strict=True):
        yield merged(answer, at, weights, config.attribute.top, calibrate=config.operators.form != "sites")


def merged(
    answer: dict[str, Any], ordinals: np.ndarray, scores: np.ndarray, top: int, calibrate: bool = False
) -> Influence:
    """A query's influence: exact scores where they are finite, estimates for the other blocks, the ``top`` largest.

    Args:
        answer: with ``ordinals``, ascending, and ``estimates``, or neither.
        ordinals: (n,) blocks that were scored.
        scores: (n,) float64, nan where not for this query.
        top: how many are kept at most.
        calibrate: estimates are in another unit than scores; they are multiplied by the least-squares factor that
            the blocks with both give, if it is positive.
    """
    scored = np.isfinite(scores)
    ordinals, scores = ordinals[scored], scores[scored]
    estimated = np.asarray(answer.get("ordinals", ()), dtype=np.int64)
    estimates = np.asarray(answer.get("estimates", ()), dtype=np.float64)
    rest = ~np.isin(estimated, ordinals)
    if calibrate and not rest.all():
        both = np.isin(ordinals, estimated)
        same = estimates[np.searchsorted(estimated, ordinals[both])]
        factor = float(same @ scores[both]) / max(float(same @ same), 1e-300)
        estimates = estimates * (factor if factor > 0 else 1.0)
    at = np.concatenate([ordinals, estimated[rest]])
    weights = np.concatenate([scores, estimates[rest]])
    exact = np.arange(len(at)) < len(ordinals)
    kept = np.lexsort((at, -np.abs(weights)))[:top]
    kept = kept[weights[kept] != 0]
    kept = kept[np.argsort(at[kept])]
    return Influence(at[kept], weights[kept], exact[kept])
