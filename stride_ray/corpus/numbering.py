"""Assignment of ordinals to blocks, the second pass of shard.

A module of its own because tokenizer libraries take longer to import than a part takes to number.
"""

import time
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Stage, part_name
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line

# Temporary files are Arrow: as Parquet a part would take six times as long to write and read.
_SCAFFOLD = pa.ipc.IpcWriteOptions(compression="lz4")


def write_staged(store: Store, name: str, table: pa.Table) -> None:
    """Store a part's blocks until they get their ordinals."""
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, table.schema, options=_SCAFFOLD) as file:
        file.write_table(table)
    store.write(f"{name}.arrow", memoryview(buffer.getvalue()))


def read_staged(store: Store, name: str) -> pa.Table:
    """A part's blocks, as stored by ``write_staged``."""
    try:
        return pa.ipc.open_file(store.read(f"{name}.arrow")).read_all()
    except pa.ArrowInvalid as error:
        place = store.display_url(f"{name}.arrow")
        raise StrideError(f"{place} cannot be read ({first_line(error)}); delete its folder and run again.") from None


def with_ordinals(table: pa.Table, first: int) -> pa.Table:
    """The table with an ordinal column: ``first``, ``first + 1``, … in row order."""
    ordinals = pa.array(np.arange(first, first + table.num_rows, dtype=np.int64))
    return table.add_column(1, pa.field("ordinal", pa.int64(), nullable=False), ordinals)


def number_part(stage: Stage, staged: Stage, unit: tuple[int, int]) -> dict[str, Any]:
    """Assign ordinals to a part's blocks and publish the part; ``unit`` is its index and its first ordinal."""
    started = time.monotonic()
    index, first = unit
    name = part_name(index)
    marker = staged.store.read_json(f"_done/{name}.json")
    table = with_ordinals(read_staged(staged.store, name), first)
    content = stage.store.write_table(f"{name}.parquet", table)
    return stage.mark(
        name, started, counts=marker["counts"], max_token_id=marker["max_token_id"], first_ordinal=first, sha256=content
    )
