"""Shared parts of model passes over the pool: the base worker, token counts and the tokenizer check."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from stride_ray.corpus.blocks import Batch, Blocks
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.models.batch_size import rows_at_once
from stride_ray.models.download import local_model
from stride_ray.models.loading import load_run_model
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import progress
from stride_ray.runtime.run import Stage
from stride_ray.runtime.urls import redact_url

# Slices of a sample, independent of the number of workers: sums are taken in slice order.
SLICES = 16


def check_tokenizer(config: Config, blocks: Blocks) -> None:
    """Raise StrideError if the model is missing, or its tokenizer and the blocks' disagree on the token of an id."""
    for path in (config.model.path, config.model.start):
        if path and "://" not in path:
            local_model(path)
    if config.model.path in ("", config.corpus.tokenizer):
        return
    try:
        own = load_tokenizer(config.model.path)
    except StrideError:
        return  # the model has no tokenizer; ModelWorker checks the ids against its vocabulary
    used = load_tokenizer(blocks.store.child("tokenizer").url)
    names = {i: token for token, i in own.get_vocab().items()}
    strange = [(i, token) for token, i in used.get_vocab().items() if names.get(i, token) != token]
    if strange:
        i, token = min(strange)
        raise StrideError(
            f"Token {i} is {token!r} in the blocks' tokenizer ({redact_url(config.corpus.tokenizer)}) but {names[i]!r} "
            f"in the model's ({redact_url(config.model.path)}); shard into a new run directory with the model's own "
            "tokenizer (--model)."
        )


def covered_fingerprint(stage: Stage, blocks: Blocks) -> str:
    """Return the fingerprint of a stage's blocks: those that it used if it is finished, else the current pool."""
    now = blocks.manifest["fingerprint"]
    if stage.is_finished():
        then = stage.store.read_json("stage.json")["keys"].get("corpus")
        if then != now and then == blocks.beginning(stage.manifest()["blocks"]):
            return then
    return now


def token_counts(blocks: Blocks, actors: ActorPool) -> np.ndarray:
    """Count how often each token is a target (loss mask) in the pool: (largest id + 1,) int64."""
    parts = [part["name"] for part in blocks.manifest["parts"]]
    vocabulary = blocks.manifest["max_token_id"] + 1
    counted = progress(
        actors.map_function(count_tokens, (blocks, vocabulary), parts), "count", len(parts), "parts", lambda _: 1
    )
    return sum((found["counts"] for found in counted), np.zeros(vocabulary, dtype=np.int64))


def counts_of_logits(counts: np.ndarray, vocabulary: int) -> np.ndarray:
    """The token counts of the ``vocabulary`` tokens that the model predicts: cut, or padded with zeros, int64.

    Ids beyond the logits are those that the model only reads.
    """
    found = np.zeros(vocabulary, dtype=np.int64)
    found[: len(counts)] = counts[:vocabulary]
    return found


def count_tokens(blocks: Blocks, vocabulary: int, part: str) -> dict[str, Any]:
    """``token_counts`` of one part of the pool: {"counts": (vocabulary,) int64}."""
    index = [p["name"] for p in blocks.manifest["parts"]].index(part)
    first = sum(p["blocks"] for p in blocks.manifest["parts"][:index])
    last = first + blocks.manifest["parts"][index]["blocks"]
    counts = np.zeros(vocabulary, dtype=np.int64)
    for batch in blocks.batches(first, last, 4096):
        counts += np.bincount(batch.ids[batch.mask], minlength=vocabulary)
    return {"counts": counts}


def map_sample_slices(
    actors: ActorPool,
    make: Callable[..., Any],
    given: tuple[Any, ...],
    ordinals: np.ndarray,
    what: str,
    take: Callable[[dict[str, Any]], dict[str, Any]] = lambda found: found,
) -> list[dict[str, Any]]:
    """Map a worker over SLICES slices of a sample; returns the results, with keys ``index`` and ``blocks``, in order.

    ``take`` is applied to each result, in slice order and as early as possible; its return value replaces the result.
    """
    units = [(index, part) for index, part in enumerate(np.array_split(ordinals, SLICES)) if len(part)]
    results = map(take, in_order(actors.map(make, given, units)))
    return progress(results, what, len(ordinals), "blocks", lambda found: found["blocks"])


def in_order(results: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Reorder results by their ``index``, counted from 0, and yield each as soon as all before it have arrived."""
    waiting = dict[int, dict[str, Any]]()
    following = 0
    for found in results:
        waiting[found["index"]] = found
        del found  # release a large result before waiting for the next one
        while following in waiting:
            yield waiting.pop(following)
            following += 1


class ModelWorker:
    """Base class of workers that run the model over the pool, ``rows`` blocks at a time.

    A worker sees a snapshot of the pool from the start of the stage: blocks added later are ignored.

    Attributes:
        load: loads the model; by default load_run_model.
        rows: blocks per batch. ``tokens``: tokens per batch, for queries.
    """

    load = staticmethod(load_run_model)

    def __init__(self, config: Config, blocks: Blocks, device: str) -> None:
        self.config, self.blocks = config, blocks
        self.model = self.load(config, device)
        self.model.check_ids(torch.tensor([[self.blocks.manifest["max_token_id"]]]))
        context, length = self.model.context, blocks.block_tokens
        if context is not None and length > context:
            raise StrideError(
                f"Blocks have {length} tokens, more than the context of {redact_url(config.model.path)} ({context}); "
                "shard with a smaller corpus.block_tokens."
            )
        self.rows = rows_at_once(config, self.model, self.blocks.block_tokens)
        self.tokens = self.rows * self.blocks.block_tokens

    def batches_at(self, ordinals: np.ndarray) -> Iterator[Batch]:
        """Yield batches of up to ``rows`` blocks at arbitrary ordinals, in order."""
        for start in range(0, len(ordinals), self.rows):
            yield self.blocks.batch(ordinals[start : start + self.rows])

    def trimmed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask on the model's device, cut after the last target: later columns do not affect the loss."""
        columns = np.flatnonzero(batch.mask.any(0))
        length = max(2, int(columns.max()) + 1) if len(columns) else min(2, batch.mask.shape[1])
        return self.tensors(batch.ids[:, :length]), self.tensors(batch.mask[:, :length])

    def tensors(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array to the model's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)
