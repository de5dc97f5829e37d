"""Response vectors on disk: written by stage respond, read by stage recover."""

from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.corpus.blocks import fixed_lists
from stride_ray.corpus.failures import LARGEST_NORM, RESPONSE_NOT_FINITE, fail
from stride_ray.runtime.run import part_name
from stride_ray.runtime.storage import Store


def response_schema(subsets: int) -> pa.Schema:
    """Schema of ``responses/<name>/part-*.parquet`` for operators of ``subsets`` subsets.

    ``response`` holds K float32 per query: nats in exact mode, inner products with J in linear mode, NaN if the query
    failed.
    """
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
    """Read a response part: its rows without the vectors, and the vectors (rows, K) float32, 0 for failed queries.

    A query whose stored responses are not finite gets the status "failed".
    """
    table = store.read_table(f"{part_name(part)}.parquet")
    width = table.schema.field("response").type.list_size
    responses = fixed_lists(table["response"], width, np.nan).copy()
    rows = table.drop_columns(["response"]).to_pylist()
    for row, response in zip(rows, responses, strict=True):
        if row["status"] == "ok" and not (np.abs(response) < LARGEST_NORM).all():
            fail(row, RESPONSE_NOT_FINITE)
        if row["status"] != "ok":
            response[:] = 0.0
    return rows, responses
