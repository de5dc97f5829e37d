"""The influence channel: is an item's loss low, and does it depend on one block, unlike for control items?

It measures two quantities. The *contrast*: an item's influences (from ``attribute``, divided by their median absolute
value, which removes the item's overall scale) are compared with the controls' block by block. A block's contrast is how
many standard deviations its influence on the item lies above its mean influence on the controls; the item's contrast is
the largest. A block that moves every item, such as the only block with arithmetic in a corpus, has no contrast. A
control is compared with the other controls. The second quantity is the *loss*. The statistic combines log contrast and
negative loss, each standardised by the controls: a near-relative of a leaked item is tied to its block too, but the
model does not know its answer; an easy item has a low loss, but no block of its own. On development plantings
(RESULTS.md) these two separated leaks, while concentration, the top influence and means of several contrasts did not.

A finding is a suspicion: a near-relative of the item may cause one, and so may chance, at the stated rate. The test is
only as good as the controls: items of another kind, or harder ones, are not a valid comparison.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.attribution.attribute import influence_parts, mode_of, table_stage, write_tables
from stride_ray.contamination.influence.significance import p_values, standardised
from stride_ray.contamination.items import Item
from stride_ray.corpus.documents import Document
from stride_ray.corpus.queries import SCHEMA as QUERIES
from stride_ray.corpus.queries import failed, row
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.tokenization.encoding import encode
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.models.loading import measured_model_fingerprint
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage

TIES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("control", pa.bool_(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("loss", pa.float64()),
        pa.field("contrast", pa.float64()),
        pa.field("share", pa.float64()),
        pa.field("block_id", pa.uint64()),
        pa.field("ordinal", pa.int64()),
        pa.field("document_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("influence", pa.float64()),
    ]
)
# Minimum number of controls for a p-value. Lower bound on the contrast before its logarithm is taken.
MIN_CONTROLS, MIN_CONTRAST = 20, 1e-3


def checkpoint(run: Run) -> str:
    """Digest (16 hexadecimal digits) of what influence depends on besides the items: weights, settings and blocks.

    Raises:
        StrideError: the run has no blocks yet.
    """
    manifest = run.require("blocks").manifest()
    identity, weights = run.stage(table_stage(run)).identity, measured_model_fingerprint(run.config)
    return digest([mode_of(run), identity, manifest["fingerprint"], weights])


def item_ties(run: Run, stage: Stage, items: Sequence[Item], controls: Sequence[Item]) -> tuple[pa.Table, int]:
    """Return the contrasts of all items and controls (TIES); earlier nights' results are read from the state.

    Args:
        run: with blocks; attribution is exact or estimated, as the run is configured.
        stage: the state's folder for this checkpoint and these controls.
        items: items to test.
        controls: items to compare with.

    Returns:
        The table, and the number of items measured in this call.

    Raises:
        StrideError: attribution fails, or fewer than MIN_CONTROLS controls can be measured.
    """
    name = f"scan-{stage.identity}"
    if "controls" not in stage.done():
        table = _measure_ties(run, stage, f"{name}-controls", controls, True, f"{name}-controls")
        measured = len(table) - table["contrast"].null_count
        if measured < MIN_CONTROLS:
            why = next((error for error in table["error"].to_pylist() if error), "too few were given")
            raise StrideError(
                f"Only {measured} control items could be measured ({why}); give at least {MIN_CONTROLS} that the model "
                "can read."
            )
        _publish_ties(stage, "controls", table)
    seen = {key for marker in stage.done().values() for key in stage.store.read_json(f"{marker['unit']}.json")["keys"]}
    left = [item for item in items if item.key not in seen]
    if left:
        batch = f"items-{digest([item.key for item in left])}"
        _publish_ties(stage, batch, _measure_ties(run, stage, f"{name}-{batch}", left, False, f"{name}-controls"))
    found = pa.concat_tables([stage.store.read_table(f"{unit}.parquet") for unit in stage.done()])
    wanted = {item.key for item in items}
    chosen = [
        control or key in wanted for key, control in zip(*(found[c].to_pylist() for c in TIES.names[:2]), strict=True)
    ]
    return found.filter(pa.array(chosen)), len(left)


def item_p_values(ties: pa.Table) -> dict[str, float]:
    """Return each item's p-value against the controls, by key; 1 if it could not be measured.

    The statistic is the standardised log contrast minus the standardised loss (significance.standardised).
    """
    control = np.array(ties["control"].to_pylist(), bool)
    contrast, loss = (ties[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("contrast", "loss"))
    tied = standardised(np.log(np.maximum(contrast, MIN_CONTRAST)), control)
    statistic = tied - standardised(loss, control)
    p = p_values(statistic[~control], statistic[control])
    keys = [key for key, is_control in zip(ties["key"].to_pylist(), control, strict=True) if not is_control]
    return dict(zip(keys, p.tolist(), strict=True))


def _publish_ties(stage: Stage, unit: str, table: pa.Table) -> None:
    started = time.monotonic()
    stage.store.write_table(f"{unit}.parquet", table)
    stage.store.write_json(f"{unit}.json", {"keys": table["key"].to_pylist()})
    stage.mark(unit, started, items=table.num_rows)


def _measure_ties(run: Run, stage: Stage, name: str, items: Sequence[Item], control: bool, controls: str) -> pa.Table:
    """Attribute items as query set ``name`` and return their TIES, compared with the controls' query set."""
    write_tables(run, query_table(run, items), name)
    reference = _Reference(run, controls)
    rows = []
    for influence, recovery in influence_parts(run, name):
        by_item: dict[str, list[dict[str, Any]]] = {}
        for each in _finite(influence).to_pylist():
            by_item.setdefault(each["query_id"], []).append(each)
        for each in recovery.to_pylist():
            record = {"key": each["query_id"], "control": control, "error": each["error"], "loss": each["base_loss"]}
            if blocks := by_item.get(each["query_id"]):
                record |= reference.contrast(blocks, control)
            elif not each["error"]:
                record |= {"error": "no block has influence on it"}
            rows.append(record)
    order = {item.key: place for place, item in enumerate(items)}
    return pa.Table.from_pylist(sorted(rows, key=lambda r: order[r["key"]]), TIES)


def query_table(run: Run, items: Sequence[Item]) -> pa.Table:
    """Tokenise items as queries (queries.SCHEMA) by key: question and answer as prompt and completion, else as text."""
    tokenizer = load_saved_tokenizer(run.store.child("blocks"))
    documents = [
        Document(item.key, item.set_name, prompt=f"{item.question}\n", answer=item.answer)
        if item.answer.strip()
        else Document(item.key, item.set_name, text=item.question)
        for item in items
    ]
    rows = [
        failed(item.key, each.sentence()) if isinstance(each, Rejected) else row(item.key, each)
        for item, each in zip(items, encode(documents, tokenizer), strict=True)
    ]
    return pa.Table.from_pylist(rows, QUERIES)


def _finite(part: pa.Table) -> pa.Table:
    """Return the rows of an influence table whose influence is finite; one NaN would turn every comparison into NaN."""
    return part.filter(pc.is_finite(part["influence"]))


class _Reference:
    """Mean and spread of each block's influence over the controls.

    Holds only blocks listed for some control; a block not listed for a control has influence 0 on it.
    """

    def __init__(self, run: Run, name: str) -> None:
        ordinals, values, queries = [], [], 0
        for part in (_finite(part) for part, _ in influence_parts(run, name)):
            ids = np.array(part["query_id"].to_pylist(), dtype=object)
            for query in dict.fromkeys(ids.tolist()):
                mine = ids == query
                influence = part["influence"].to_numpy()[mine]
                ordinals.append(part["ordinal"].to_numpy()[mine])
                values.append(influence / _median_magnitude(influence))
                queries += 1
        empty = np.zeros(0)
        self.count = max(queries, 1)
        self.ordinals, at = np.unique(np.concatenate([empty.astype(np.int64), *ordinals]), return_inverse=True)
        flat = np.concatenate([empty, *values])
        self.sums = np.bincount(at, flat, minlength=len(self.ordinals))
        self.squares = np.bincount(at, flat**2, minlength=len(self.ordinals))
        spread = _spread(self.sums, self.squares, self.count)
        # Regulariser added to every spread: that of a block listed for few controls is unreliable.
        self.floor = float(np.median(spread)) if len(spread) else 1.0

    def contrast(self, blocks: list[dict[str, Any]], control: bool) -> dict[str, Any]:
        """Return the largest contrast over an item's blocks (rows of the influence table), and its block.

        ``share`` is that block's |influence| over the sum of all |influence|. For a control the comparison is
        leave-one-out: its own values are removed from the statistics.
        """
        influence = np.array([each["influence"] for each in blocks])
        ordinals = np.array([each["ordinal"] for each in blocks], np.int64)
        values = influence / _median_magnitude(influence)
        at = np.minimum(np.searchsorted(self.ordinals, ordinals), max(0, len(self.ordinals) - 1))
        known = self.ordinals[at] == ordinals if len(self.ordinals) else np.zeros(len(ordinals), bool)
        sums = np.where(known, self.sums[at], 0.0) if len(self.ordinals) else np.zeros(len(ordinals))
        squares = np.where(known, self.squares[at], 0.0) if len(self.ordinals) else np.zeros(len(ordinals))
        count = self.count
        if control:
            sums, squares, count = sums - values, squares - values**2, max(1, count - 1)
        contrasts = (values - sums / count) / (_spread(sums, squares, count) + self.floor)
        best = int(np.argmax(contrasts))
        named = {name: blocks[best][name] for name in ("block_id", "ordinal", "document_id", "source", "influence")}
        share = float(abs(influence[best]) / np.abs(influence).sum())
        return {"contrast": float(contrasts[best]), "share": share, **named}


def _median_magnitude(influence: np.ndarray) -> float:
    """Return the median of |influence|; tiny instead of 0, since it is a divisor."""
    return float(np.median(np.abs(influence))) or 1e-30


def _spread(sums: np.ndarray, squares: np.ndarray, count: int) -> np.ndarray:
    """Return standard deviations from sums and sums of squares over ``count`` controls."""
    return np.sqrt(np.maximum(squares / count - (sums / count) ** 2, 0.0))
