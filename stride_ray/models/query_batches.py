"""Batches of queries: validated against the model and padded to tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stride_ray.models.causal_lm import SplitModel
from stride_ray.runtime.errors import StrideError


def validate_query(model: SplitModel, row: dict[str, Any]) -> dict[str, Any]:
    """Return a query's ``query_id``, ``status`` and ``error``.

    A query fails if it has no target, is longer than the context or has ids outside the vocabulary.
    """
    answer = {"query_id": row["query_id"], "status": row["status"], "error": row["error"]}
    if row["status"] == "ok":
        length, context = len(row["token_ids"]), model.context
        try:
            if length < 2 or not any(row["loss_mask"][1:]):
                raise StrideError("has no target token (its loss mask marks none after the first token)")
            model.check_ids(torch.tensor([row["token_ids"]]))
            if context is not None and length > context:
                raise StrideError(f"has {length} tokens; the model's context is {context}: shorten it")
        except StrideError as error:
            answer |= {"status": "failed", "error": str(error)}
    return answer


def batches(rows: Sequence[dict[str, Any]], waiting: list[int], tokens: int) -> Iterator[list[int]]:
    """Split the waiting rows, in order, into batches of at most ``tokens`` padded tokens (at least one row each)."""
    while waiting:
        longest, batch = 0, list[int]()
        for i in waiting:
            longest = max(longest, len(rows[i]["token_ids"]))
            if batch and longest * (len(batch) + 1) > tokens:
                break
            batch.append(i)
        waiting = waiting[len(batch) :]
        yield batch


def padded(rows: Sequence[dict[str, Any]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids (B, T) int64 and target masks (B, T) bool."""
    longest = max(len(row["token_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row["token_ids"])] = torch.tensor(row["token_ids"])
        mask[i, : len(row["loss_mask"])] = torch.tensor(row["loss_mask"])
    return ids.to(device), mask.to(device)
