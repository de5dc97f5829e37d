"""Numbers that are not numbers: the one policy for blocks and queries whose loss, gradient or score is not finite.

Such a block or query fails alone: it gets a status and an error, is counted in the stage's summary, has no influence,
and is left out of every sum over others. Too many of them end the stage in a sentence (``check_failed_blocks``,
``check_failed_queries``), since then the model is at fault and not the text.

A number counts as finite only if its square can be summed over a pool in float32: a gradient of norm 1e20 is a number,
and its second moment is not. Example: of three blocks with gradients [1, 2], [nan, 0] and [1e20, 0], ``finite_rows``
passes the first.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.corpus.blocks import Blocks
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

# Largest norm of a vector that counts as finite: products of two of them, and sums of those, fit in float32.
LARGEST_NORM = 1e15
# A stage ends above this share of failed blocks (a single one is allowed in any pool), and of failed queries in a set
# of at least so many.
MAX_FAILED_BLOCKS, MAX_FAILED_QUERIES, MIN_QUERIES = 0.05, 0.5, 10
# Errors of a query and of a block.
NOT_FINITE = "its gradient is not finite; the model overflows on this text"
LOSS_NOT_FINITE = "its loss is not finite; the model overflows on this text"
RESPONSE_NOT_FINITE = "the response is not finite; the model overflows on this text"
BLOCK_NOT_FINITE = "its loss or gradient is not finite; the model overflows on this text"
UNUSABLE = (NOT_FINITE, LOSS_NOT_FINITE, RESPONSE_NOT_FINITE)

FAILED_BLOCKS = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("block_id", pa.uint64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)
FAILED_BLOCKS_FILE = "failed-blocks.parquet"


def finite_rows(parts: Iterable[Any]) -> Any:
    """Which of n rows are finite in all parts: (n,) bool on the parts' device.

    Args:
        parts: torch tensors (n, …) of floating-point numbers, at least one.
    """
    found: Any = None
    for part in parts:
        good = part.flatten(1).norm(dim=1) < LARGEST_NORM  # false for nan
        found = good if found is None else found & good
    return found


def finite_losses(losses: Any, mask: Any) -> Any:
    """Which of n sequences have a finite loss, or no target to have one of: (n,) bool tensor.

    Args:
        losses: (n,) tensor, nats.
        mask: (n, T) bool tensor, targets.
    """
    return losses.isfinite() | ~mask[:, 1:].any(1)


def fail(answer: dict[str, Any], error: str) -> None:
    """Give a query's row a failed status, in place; a loss that is not finite becomes null."""
    loss = answer.get("base_loss")
    answer |= {"status": "failed", "error": error}
    if "base_loss" in answer:
        answer["base_loss"] = loss if loss is not None and np.isfinite(loss) else None


def check_failed_blocks(failed: Sequence[int], total: int) -> int:
    """Count failed blocks among ``total``, given their ordinals.

    Raises:
        StrideError: all of them failed, or more than MAX_FAILED_BLOCKS and more than one.
    """
    count = len(failed)
    if count and (count == total or count > max(1, MAX_FAILED_BLOCKS * total)):
        raise StrideError(
            f"The losses or gradients of {count} of {total} blocks are not finite (the first: block {min(failed)}), "
            f"more than {MAX_FAILED_BLOCKS:.0%}; {_remedy('blocks', count == total)}"
        )
    return count


def check_failed_queries(answers: Iterable[Mapping[str, Any]]) -> None:
    """Check a set's rows with ``query_id`` and ``error``.

    Raises:
        StrideError: of MIN_QUERIES queries or more, more than MAX_FAILED_QUERIES failed since a number was not finite.
    """
    rows = list(answers)
    failed = [row["query_id"] for row in rows if row["error"] in UNUSABLE]
    if len(rows) >= MIN_QUERIES and len(failed) > MAX_FAILED_QUERIES * len(rows):
        raise StrideError(
            f"The losses or gradients of {len(failed)} of {len(rows)} queries are not finite (the first: "
            f"{failed[0]!r}), more than {MAX_FAILED_QUERIES:.0%}; {_remedy('queries', len(failed) == len(rows))}"
        )


def _remedy(what: str, every: bool) -> str:
    at_fault = "see whether the model's weights (model.path) are numbers" if every else f"inspect these {what}"
    return f"{at_fault}, or, if the model overflows on them, use model.dtype = float32 or bfloat16."


def write_failed_blocks(store: Store, blocks: Blocks, failed: Sequence[int]) -> None:
    """Write FAILED_BLOCKS for the given ordinals (ascending); no file if there are none."""
    if len(failed):
        known = blocks.take(failed, ["block_id", "source"])
        count = len(failed)
        columns = [
            pa.array(failed, pa.int64()),
            known["block_id"],
            known["source"],
            ["failed"] * count,
            [BLOCK_NOT_FINITE] * count,
        ]
        store.write_table(FAILED_BLOCKS_FILE, pa.table(columns, schema=FAILED_BLOCKS))


def failed_ordinals(store: Store) -> list[int]:
    """Ordinals that write_failed_blocks wrote to a folder, ascending."""
    if not store.exists(FAILED_BLOCKS_FILE):
        return []
    return store.read_table(FAILED_BLOCKS_FILE, ["ordinal"])["ordinal"].to_pylist()


def failed_blocks_note(count: int, where: str) -> str:
    """A sentence about failed blocks for a summary; empty if there are none."""
    which = f"{count} blocks have" if count > 1 else "1 block has"
    return f"{which} no influence: losses or gradients are not finite ({where})." if count else ""
