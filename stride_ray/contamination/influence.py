"""The influence channel: is an item's loss low, and tied to some block, as no control item's is?

Two things are measured. The *contrast*: an item's influences (as ``attribute`` gives them, divided by the median of
their size, which takes out how strongly the item pulls at all) are compared block by block with the controls', and a
contrast is how many standard deviations a block's influence on the item lies above its mean influence on controls; the
largest counts. A block that moves every item, such as one that happens to hold the only arithmetic of a corpus, has no
contrast. A control is compared with the other controls. And the *loss* itself. The statistic is the sum of both, each
measured in the controls' own spread: a near-relative of a leaked item is tied to its block too, but the model does not
know its answer; an easy item has a low loss, but no block of its own. That these two, and neither concentration nor the
top influence nor the means of several contrasts, tell leaks apart was found on development plantings (RESULTS.md).

Such a finding is a suspicion: a near-relative of the item may do the same, and so may chance, at the rate stated. It is
only as good as the controls: items of another kind, or harder ones, tell nothing.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.attribution.attribute import answer, mode_of, table_stage
from stride_ray.contamination.items import Item
from stride_ray.contamination.significance import p_values, standardised
from stride_ray.corpus.documents import Document
from stride_ray.corpus.queries import SCHEMA as QUERIES
from stride_ray.corpus.queries import failed, row
from stride_ray.corpus.readers import Rejected
from stride_ray.corpus.tokenizing import encode, load_tokenizer
from stride_ray.models.loading import measured_weights
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
# Controls that a p-value needs at the least. The smallest contrast that a logarithm is taken of.
LEAST, FAINT = 20, 1e-3


def checkpoint(run: Run) -> str:
    """What influence depends on beside the items: the run's weights, settings and blocks, as 16 hexadecimal digits.

    Raises:
        StrideError: where the run has no blocks yet.
    """
    manifest = run.require("blocks", "manifest.json", "stride-ray shard").store.read_json("manifest.json")
    identity, weights = run.stage(table_stage(run)).identity, measured_weights(run.config)
    return digest([mode_of(run), identity, manifest["fingerprint"], weights])


def item_ties(run: Run, stage: Stage, items: Sequence[Item], controls: Sequence[Item]) -> tuple[pa.Table, int]:
    """Every item's and control's contrast (TIES), measured where the state does not hold it yet.

    Args:
        run: with blocks; the attribution is the run's own, estimated or exact.
        stage: the state's folder of this checkpoint and these controls.
        items: to be asked about.
        controls: to compare with.

    Returns:
        The table, and how many items were measured now.

    Raises:
        StrideError: as attribution does, and where fewer than LEAST controls can be asked.
    """
    name = f"scan-{stage.identity}"
    if "controls" not in stage.done():
        table = _ties(run, stage, f"{name}-controls", controls, True, f"{name}-controls")
        known = table["contrast"].null_count
        if len(table) - known < LEAST:
            why = next((error for error in table["error"].to_pylist() if error), "too few were given")
            raise StrideError(
                f"Only {len(table) - known} control items can be asked of the model ({why}); give at least {LEAST}."
            )
        _publish(stage, "controls", table)
    seen = {key for marker in stage.done().values() for key in stage.store.read_json(f"{marker['unit']}.json")}
    left = [item for item in items if item.key not in seen]
    if left:
        batch = f"items-{digest([item.key for item in left])}"
        _publish(stage, batch, _ties(run, stage, f"{name}-{batch}", left, False, f"{name}-controls"))
    found = pa.concat_tables([stage.store.read_table(f"{unit}.parquet") for unit in stage.done()])
    wanted = {item.key for item in items}
    chosen = [
        control or key in wanted for key, control in zip(*(found[c].to_pylist() for c in TIES.names[:2]), strict=True)
    ]
    return found.filter(pa.array(chosen)), len(left)


def item_p_values(ties: pa.Table) -> dict[str, float]:
    """Each item's p-value against the controls, by key; 1 where it could not be asked.

    The statistic: how far log contrast lies above the controls' and loss below it (significance.standardised), added.
    """
    control = np.array(ties["control"].to_pylist(), bool)
    contrast, loss = (ties[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("contrast", "loss"))
    tied = standardised(np.log(np.maximum(contrast, FAINT)), control)
    statistic = tied - standardised(loss, control)
    p = p_values(statistic[~control], statistic[control])
    keys = [key for key, is_control in zip(ties["key"].to_pylist(), control, strict=True) if not is_control]
    return dict(zip(keys, p.tolist(), strict=True))


def _publish(stage: Stage, unit: str, table: pa.Table) -> None:
    started = time.monotonic()
    stage.store.write_table(f"{unit}.parquet", table)
    stage.store.write_json(f"{unit}.json", table["key"].to_pylist())
    stage.mark(unit, started, items=table.num_rows)


def _ties(run: Run, stage: Stage, name: str, items: Sequence[Item], control: bool, controls: str) -> pa.Table:
    """Attribute items under a query set's name, and compare them with the controls' query set."""
    answer(run, query_table(run, items), name)
    reference = _Reference(run, controls)
    rows = []
    asked = {item.key: item for item in items}
    for part, told in _parts(run, name):
        mine: dict[str, list[dict[str, Any]]] = {}
        for each in part.to_pylist():
            mine.setdefault(each["query_id"], []).append(each)
        for each in told.to_pylist():
            record = {"key": each["query_id"], "control": control, "error": each["error"], "loss": each["base_loss"]}
            if blocks := mine.get(each["query_id"]):
                record |= reference.contrast(blocks, control)
            elif not each["error"]:
                record |= {"error": "no block has influence on it"}
            rows.append(record)
    order = {key: place for place, key in enumerate(asked)}
    return pa.Table.from_pylist(sorted(rows, key=lambda r: order[r["key"]]), TIES)


def query_table(run: Run, items: Sequence[Item]) -> pa.Table:
    """Items as queries (queries.SCHEMA) by their keys: question as prompt and answer as completion, or the text."""
    tokenizer = load_tokenizer(run.store.child("blocks/tokenizer").url)
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


def _parts(run: Run, name: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Influence and recovery tables of a query set, a part at a time."""
    stage = run.stage(table_stage(run), name)
    for part in range(stage.store.read_json("manifest.json")["parts"]):
        read = (stage.store.read_table(f"{table}-{part:05d}.parquet") for table in ("influence", "recovery"))
        yield next(read), next(read)


class _Reference:
    """Mean and spread of each block's influence over the controls.

    Only blocks that some control's table names are held; a block that a table does not name has influence 0 there.
    """

    def __init__(self, run: Run, name: str) -> None:
        ordinals, values, queries = [], [], 0
        for part, _ in _parts(run, name):
            ids = np.array(part["query_id"].to_pylist(), dtype=object)
            for query in dict.fromkeys(ids.tolist()):
                mine = ids == query
                influence = part["influence"].to_numpy()[mine]
                ordinals.append(part["ordinal"].to_numpy()[mine])
                values.append(influence / _size(influence))
                queries += 1
        empty = np.zeros(0)
        self.count = max(queries, 1)
        self.ordinals, at = np.unique(np.concatenate([empty.astype(np.int64), *ordinals]), return_inverse=True)
        flat = np.concatenate([empty, *values])
        self.sums = np.bincount(at, flat, minlength=len(self.ordinals))
        self.squares = np.bincount(at, flat**2, minlength=len(self.ordinals))
        spread = _spread(self.sums, self.squares, self.count)
        # Added to every spread: that of a block that few controls name is not known.
        self.floor = float(np.median(spread)) if len(spread) else 1.0

    def contrast(self, blocks: list[dict[str, Any]], control: bool) -> dict[str, Any]:
        """The largest contrast of an item's blocks (rows of the influence table), and the block that has it.

        ``share`` is that block's share of the sum of all influences' sizes. A control's own values are taken out of
        what it is compared with.
        """
        influence = np.array([each["influence"] for each in blocks])
        ordinals = np.array([each["ordinal"] for each in blocks], np.int64)
        values = influence / _size(influence)
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


def _size(influence: np.ndarray) -> float:
    return float(np.median(np.abs(influence))) or 1e-30


def _spread(sums: np.ndarray, squares: np.ndarray, count: int) -> np.ndarray:
    return np.sqrt(np.maximum(squares / count - (sums / count) ** 2, 0.0))
