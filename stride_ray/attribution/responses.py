"""Responses on disk: respond writes them, recover reads them."""

from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.corpus.blocks import fixed_lists
from stride_ray.runtime.run import part_name
from stride_ray.runtime.storage import Store


def response_schema(subsets: int) -> pa.Schema:
    """Schema of responses/<name>/part-*.parquet: nats (exact mode), inner products with J (linear), NaN if failed."""
    return pa.schema(
        [
            pa.field("query_id", pa.string(), nullable=False),
            pa.field("base_loss", pa.float32()),
            pa.field("response", pa.list_(pa.float32(), subsets), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
        ]
    )


def read_responses(store: Store, part: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Read a response part: its rows without the vectors, and the vectors (rows, K) float32, 0 for failed queries."""
    table = store.read_table(f"{part_name(part)}.parquet")
    width = table.schema.field("response").type.list_size
    responses = np.nan_to_num(fixed_lists(table["response"], width, np.nan))
    return table.drop_columns(["response"]).to_pylist(), responses
