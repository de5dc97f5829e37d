"""Stage respond: queries to response vectors, on an actor pool that holds the model and the operators.

Responses of operators at all sites are first-order (site_responses.py). The paper's forms have two modes. ``exact``
steers the model: the trunk runs once per query and the suffix once per operator, in batches bounded by a token budget.
``linear`` computes all K responses from one forward pass, plus a backward pass if J needs one. ``auto`` is linear for
the closed form, which is derived for it; otherwise it measures on a sample of queries whether the two modes agree.
"""

import sys
import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stride_ray.attribution.responses import response_schema
from stride_ray.attribution.site_responses import respond_sites
from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.failures import (
    LARGEST_NORM,
    LOSS_NOT_FINITE,
    RESPONSE_NOT_FINITE,
    check_failed_blocks,
    check_failed_queries,
    fail,
    write_failed_blocks,
)
from stride_ray.corpus.queries import check_name, fingerprint, read_queries
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.models.batch_size import rows_at_once
from stride_ray.models.loading import load_run_model, measured_model_fingerprint
from stride_ray.models.query_batches import batches, padded, signed_texts, texts_of, validate_query
from stride_ray.operators.row_store import RowStore
from stride_ray.operators.stored import load_operators
from stride_ray.runtime.actor_pool import shared_actor_pool
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import record_stage_costs
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, part_name
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line

# Queries per work unit: a killed worker loses the results of at most this many.
QUERIES_PER_UNIT = 16
# For auto: queries and operators measured in both modes, and the correlation from which linear replaces exact.
SAMPLE, SAMPLE_OPERATORS, MIN_CORRELATION = 8, 64, 0.99


def respond(run: Run, queries: str, name: str) -> dict[str, Any]:
    """Measure every query's response to every operator.

    Example:
        >>> from stride_ray import Run
        >>> from stride_ray.attribution.respond import respond
        >>> respond(Run("mine"), "queries.jsonl", "asked")["queries"]
        2

    Args:
        run: with finished ``operators/``.
        queries: path or URL of the queries (queries.read_queries).
        name: of the query set; also its folder's name.

    Returns:
        Counts ``queries``, ``failed`` and ``parts``; the ``mode`` that was used; ``correlation`` of the two modes, if
        auto measured it. For operators at all sites also ``not_finite``, the number of blocks that get no influence
        because their stored row is not finite, and ``reliability``, the median over queries.

    Raises:
        StrideError: a stage is missing or was made with other settings, another query set has this name, or the
            queries cannot be read.
    """
    run.require("operators")
    tokenizer = load_saved_tokenizer(run.store.child("blocks"))
    return respond_table(run, read_queries(queries, tokenizer), name)


def respond_table(run: Run, table: pa.Table, name: str) -> dict[str, Any]:
    """Like respond, for tokenised queries (queries.SCHEMA)."""
    check_name(name)
    weights = measured_model_fingerprint(run.config)
    operators = run.require("operators", weights=weights)
    facts = operators.manifest()
    # Rows may have been added since the first fit; then the manifest has the current corpus fingerprint.
    corpus = facts.get("corpus", operators.store.read_json("stage.json")["keys"]["corpus"])
    check_unfitted_blocks(run, facts)
    stage = run.begin("responses", name, corpus=corpus, queries=fingerprint(table), weights=weights)
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", table)
    if run.config.operators.form == "sites":
        return _respond_sites(run, operators.store, stage, name, table.num_rows)
    return _respond_steered(run, operators.store, stage, table)


def check_unfitted_blocks(run: Run, facts: dict[str, Any]) -> None:
    """Check for blocks that were sharded after the fit: an error if rows can be added for them, else a warning.

    Raises:
        StrideError: rows can be added; the message names the blocks and the command that adds their rows.
    """
    before, now = facts["blocks"], len(Blocks(run.stage("blocks").store))
    if before == now:
        return
    store = run.store.display_url("operators")
    which = f"Blocks {before:,} to {now - 1:,} were sharded after the fit and are not in {store}"
    if facts.get("rows") == "blocks":
        raise StrideError(f"{which}; add them with 'stride-ray fit', which keeps the rows that exist.")
    print(f"{which}: they get no influence. To include them, fit into a new run directory.", file=sys.stderr)


def _respond_sites(run: Run, operators: Store, stage: Stage, name: str, queries: int) -> dict[str, Any]:
    """Responses of operators at all sites: products of query directions with operator rows."""
    if not stage.is_finished():
        with (
            stage.ignore_errors_if_finished(),
            record_stage_costs(stage),
            shared_actor_pool(run.config, unit_count(len(RowStore(operators)))) as actors,
        ):
            blocks, curvature = Blocks(run.stage("blocks").store), run.stage("curvature").store
            respond_sites(run, blocks, curvature, operators, stage, name, actors)
            done = stage.done()
            markers = [marker for unit, marker in done.items() if unit.startswith("part-")]
            scans = [marker for unit, marker in done.items() if unit.startswith("scan-")]
            failed = {ordinal for marker in scans for ordinal in marker["not_finite"]}
            check_failed_blocks(sorted(failed), len(blocks))
            write_failed_blocks(stage.store, blocks, sorted(failed))
            reliable = [each for marker in markers for each in marker["reliability"]]
            summary = {
                "queries": queries,
                "failed": sum(marker["failed"] for marker in markers),
                "not_finite": len(failed),
                "mode": "linear",
                "parts": len(markers),
                "reliability": float(np.median(reliable)) if reliable else None,
            }
            stage.finish(summary)
    stage.clear_tensors()
    return stage.manifest()


def _respond_steered(run: Run, operators: Store, stage: Stage, table: pa.Table) -> dict[str, Any]:
    """Responses of the paper's forms."""
    method = operators.read_json("manifest.json")["method"]
    mode = "linear" if run.config.respond.mode == "auto" and method == "closed_form" else run.config.respond.mode
    if stage.is_finished():
        return stage.manifest()
    starts = range(0, table.num_rows, QUERIES_PER_UNIT)
    units = {part_name(index): (index, start) for index, start in enumerate(starts)}
    with record_stage_costs(stage), shared_actor_pool(run.config, len(units)) as actors:
        given, measured = (run.config, run.store, stage, actors.device), dict[str, Any]()
        if mode == "auto":
            compare = partial(actors.map, ModeComparison, given)
            (compared,) = run_missing(stage, {"modes": (0, 0)}, compare, "compare modes", "samples")
            measured = {"correlation": compared["correlation"]}
            # Exact if no query could be compared.
            mode = "linear" if (measured["correlation"] or 0.0) >= MIN_CORRELATION else "exact"
        respond_to = partial(actors.map, Responder, (*given, mode))
        markers = run_missing(
            stage, units, respond_to, "respond", "queries", lambda unit: min(QUERIES_PER_UNIT, table.num_rows - unit[1])
        )
    check_failed_queries(answer for marker in markers for answer in marker["answers"])
    failed = sum(marker["failed"] for marker in markers)
    facts = {"queries": table.num_rows, "failed": failed, "mode": mode, "parts": len(units)}
    return stage.finish({**facts, **measured})


class Responder:
    """Computes the responses of a unit of queries and writes them to one Parquet file."""

    def __init__(self, config: Config, root: Store, stage: Stage, device: str, mode: str = "") -> None:
        self.config, self.stage, self.mode = config, stage, mode
        self.model = load_run_model(config, device)
        self.operators, _ = load_operators(root.child("operators"), self.model.device)
        self.queries = stage.store.read_table("queries.parquet")
        length = Blocks(root.child("blocks")).block_tokens
        self.tokens = length * rows_at_once(config, self.model, length)

    def __call__(self, unit: tuple[int, int]) -> dict[str, Any]:
        """Process one unit; returns its done marker."""
        started = time.monotonic()
        index, start = unit
        rows = self.queries.slice(start, QUERIES_PER_UNIT).to_pylist()
        unknown = np.full(len(self.operators.A), np.nan, np.float32)
        answers = [{**validate_query(self.model, row), "response": unknown} for row in rows]
        if self.mode == "linear":
            self._linear(rows, answers)
        else:
            for row, answer in zip(rows, answers, strict=True):
                if answer["status"] == "ok":
                    self._exact(row, answer)
        name, schema = part_name(index), response_schema(len(self.operators.A))
        digest = self.stage.store.write_table(f"{name}.parquet", pa.Table.from_pylist(answers, schema))
        failed = sum(answer["status"] != "ok" for answer in answers)
        statuses = [{key: answer[key] for key in ("query_id", "error")} for answer in answers]
        return self.stage.mark(name, started, queries=len(rows), failed=failed, answers=statuses, sha256=digest)

    def _linear(self, rows: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
        """Fill in linear responses, in right-padded batches within the token budget."""
        texts = signed_texts(rows, [i for i, answer in enumerate(answers) if answer["status"] == "ok"])
        for batch in batches([text for _, text, _ in texts], list(range(len(texts))), self.tokens):
            self._linear_batch(texts, answers, batch)

    def _linear_batch(
        self, texts: list[tuple[int, dict[str, Any], float]], answers: list[dict[str, Any]], batch: list[int]
    ) -> None:
        """Fill in a batch of texts; one that does not fit in memory is halved, and a query that does not fit fails."""
        halves: list[list[int]] = []
        try:
            ids, mask = padded([texts[k][1] for k in batch], self.model.device)
            losses = self.model.losses(self.model.trunk(ids), ids, mask)
            found = self.operators.linear(self.model, ids, mask)
            for k, loss, response in zip(batch, losses.tolist(), found.cpu().numpy(), strict=True):
                i, _, sign = texts[k]
                _add_response(answers[i], sign, loss, response)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                fail(answers[texts[batch[0]][0]], _out_of_memory_message(error))
            else:
                halves = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        # Not inside the handler: there the exception's traceback keeps the failed batch's tensors alive.
        for half in halves:
            self._linear_batch(texts, answers, half)

    def _exact(self, row: dict[str, Any], answer: dict[str, Any]) -> None:
        """Fill in one query's exact responses to all operators; a query that does not fit in memory fails."""
        everyone = torch.arange(len(self.operators.A), device=self.model.device)
        for text, sign in texts_of(row):
            ids, mask = padded([text], self.model.device)
            try:
                base, found = self.operators.exact(self.model, ids[0], mask[0], everyone, self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                fail(answer, _out_of_memory_message(error))
                return
            _add_response(answer, sign, base, found.cpu().numpy())


class ModeComparison(Responder):
    """Measures the agreement of exact and linear responses: their correlation, averaged over queries."""

    def __call__(self, unit: tuple[int, int]) -> dict[str, Any]:
        """Compare both modes on SAMPLE valid queries and SAMPLE_OPERATORS operators; returns the done marker."""
        started = time.monotonic()
        K, device = len(self.operators.A), self.model.device
        some = torch.linspace(0, K - 1, min(K, SAMPLE_OPERATORS), device=device).round().long()
        found: list[float] = []
        for row in self.queries.to_pylist():
            if len(found) == SAMPLE:
                break
            if validate_query(self.model, row)["status"] == "ok":
                ids, mask = padded([row], device)
                linear = self.operators.linear(self.model, ids, mask)[0, some]
                exact = self.operators.exact(self.model, ids[0], mask[0], some, self.tokens)[1]
                alike = float(torch.corrcoef(torch.stack([linear, exact]).double())[0, 1])
                # NaN if a response is not finite; such a query is left out of the comparison.
                found += [alike] if np.isfinite(alike) else []
        correlation = float(np.mean(found)) if found else None
        return self.stage.mark("modes", started, correlation=correlation, queries=len(found), operators=len(some))


def _add_response(answer: dict[str, Any], sign: float, loss: float, response: np.ndarray) -> None:
    """Set a query's base loss and response (K,), or add a contrast's, or set the error if one is not finite."""
    if answer["status"] != "ok":
        return
    if not np.isfinite(loss):
        fail(answer, LOSS_NOT_FINITE)
    elif not (np.abs(response) < LARGEST_NORM).all():
        fail(answer, RESPONSE_NOT_FINITE)
    elif "base_loss" in answer:
        answer |= {"base_loss": answer["base_loss"] + sign * loss, "response": answer["response"] + sign * response}
    else:
        answer |= {"base_loss": loss, "response": response}


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the host ran out of memory; for the host, torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _out_of_memory_message(error: BaseException) -> str:
    return f"out of memory: {first_line(error)}; lower compute.batch_tokens"
