"""Batches of queries: validated against the model and padded to tensors."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from stride_ray.models.causal_lm import SplitModel
from stride_ray.runtime.errors import StrideError


def validate_query(model: SplitModel, row: dict[str, Any]) -> dict[str, Any]:
    """Return a query's ``query_id``, ``status`` and ``error``.

    A query fails if it, or what it is contrasted with, has no target, is longer than the context or has ids outside the
    vocabulary.
    """
    answer = {"query_id": row["query_id"], "status": row["status"], "error": row["error"]}
    if row["status"] == "ok":
        try:
            for text, _ in texts_of(row):
                _check_text(model, text)
        except StrideError as error:
            answer |= {"status": "failed", "error": str(error)}
    return answer


def texts_of(row: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """The texts (token_ids and loss_mask) whose losses make a query's, each with its sign.

    Example: a plain query is [(itself, 1)], a contrast also has (the other completion, −1).
    """
    other = row.get("contrast_ids")
    contrast = [] if other is None else [({"token_ids": other, "loss_mask": row["contrast_mask"]}, -1.0)]
    return [(row, 1.0), *contrast]


def refuse_contrasts(rows: Iterable[dict[str, Any]], what: str) -> None:
    """Raise StrideError if one of the queries is a contrast, which ``what`` cannot measure."""
    for row in rows:
        if row.get("contrast_ids") is not None:
            raise StrideError(
                f"Query {row['query_id']!r} is a contrast of two completions, and {what} measures the loss of one; "
                "leave out its 'rejected' or 'contrast' column in a query set for this."
            )


def signed_texts(rows: Sequence[dict[str, Any]], waiting: Sequence[int]) -> list[tuple[int, dict[str, Any], float]]:
    """The texts of the waiting rows with their row and sign, second completions last.

    So the batches of plain queries do not depend on contrasts among them.
    """
    found = [(order, i, *text) for i in waiting for order, text in enumerate(texts_of(rows[i]))]
    return [(i, text, sign) for _, i, text, sign in sorted(found, key=lambda each: each[0])]


def _check_text(model: SplitModel, text: dict[str, Any]) -> None:
    length, context = len(text["token_ids"]), model.context
    if length < 2 or not any(text["loss_mask"][1:]):
        raise StrideError("has no target token (its loss mask marks none after the first token)")
    model.check_ids(torch.tensor([text["token_ids"]]))
    if context is not None and length > context:
        raise StrideError(f"has {length} tokens; the model's context is {context}: shorten it")


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
