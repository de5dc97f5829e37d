"""Stage respond: queries to response vectors, through a pool of actors that each hold the model and the operators.

Operators at every site respond to first order (site_responses.py). For the paper's forms there are two modes:
``exact`` steers: a query's trunk runs once and the suffix once per operator, in batches bounded by a token budget.
``linear`` takes all K responses from one forward (and a backward where J needs one). ``auto`` is linear for the closed
form, whose operators are made for it, and else measures on a sample of queries whether the two agree.
"""

import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stride_ray.attribution.responses import response_schema
from stride_ray.attribution.site_responses import respond_sites
from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.queries import check_name, fingerprint, read_queries
from stride_ray.corpus.tokenizing import load_tokenizer
from stride_ray.models.batch_size import rows_at_once
from stride_ray.models.loading import load_run_model, measured_weights
from stride_ray.models.query_batches import batches, checked, padded
from stride_ray.operators.row_store import RowStore
from stride_ray.operators.stored import load_operators
from stride_ray.runtime.actor_pool import shared_actor_pool
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import costed
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage, part_name, tolerate_concurrent_finish
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import progress
from stride_ray.runtime.urls import first_line

# Queries in a unit of work: what a killed worker loses at most.
UNIT = 16
# What auto measures both ways: queries, operators, and the correlation from which on linear stands for exact.
SAMPLE, OPERATORS, ALIKE = 8, 64, 0.99


def respond(run: Run, queries: str, name: str) -> dict[str, Any]:
    """Measure every query's response to every operator.

    Args:
        run: with finished ``operators/``.
        queries: where they are (queries.read_queries).
        name: of the query set, a folder's name.

    Returns:
        Counts: ``queries``, ``failed``; the ``mode`` used; where auto measured it, the ``correlation`` of the two.

    Raises:
        StrideError: for a missing stage, other settings, another query set of that name, or unreadable queries.
    """
    run.require("operators", "metadata.json", "stride-ray fit")
    tokenizer = load_tokenizer(run.store.child("blocks/tokenizer").url)
    return respond_table(run, read_queries(queries, tokenizer), name)


def respond_table(run: Run, table: pa.Table, name: str) -> dict[str, Any]:
    """As respond, for a table of tokenised queries (queries.SCHEMA)."""
    check_name(name)
    weights = measured_weights(run.config)
    operators = run.require("operators", "metadata.json", "stride-ray fit", weights=weights)
    facts = operators.store.read_json("metadata.json")
    # What rows were added for since the fit began is told by the rows alone.
    corpus = facts.get("corpus", operators.store.read_json("stage.json")["keys"]["corpus"])
    check_unfitted_blocks(run, facts)
    stage = run.begin("responses", name, corpus=corpus, queries=fingerprint(table), weights=weights)
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", table)
    if run.config.operators.form == "sites":
        return _respond_sites(run, operators.store, stage, name, table.num_rows)
    return _respond_steered(run, operators.store, stage, table)


def check_unfitted_blocks(run: Run, facts: dict[str, Any]) -> None:
    """Refuse a pool with blocks that have no rows and may be given some; say so where they may not.

    Raises:
        StrideError: naming them, and the command that adds them.
    """
    before, now = facts["blocks"], len(Blocks(run.stage("blocks").store))
    if before == now:
        return
    store = run.store.name_of("operators")
    which = f"Blocks {before:,} to {now - 1:,} were sharded after the fit and are not in {store}"
    if facts.get("rows") == "blocks":
        raise StrideError(f"{which}; add them with 'stride-ray fit', which keeps what is there.")
    print(f"{which}: no answer names them. To have them in, fit into a new run directory.", file=sys.stderr)


def _respond_sites(run: Run, operators: Store, stage: Stage, name: str, queries: int) -> dict[str, Any]:
    """Products with the rows of operators at every site."""
    if not stage.store.exists("manifest.json"):
        with (
            tolerate_concurrent_finish(stage, "manifest.json"),
            costed(stage),
            shared_actor_pool(run.config, unit_count(len(RowStore(operators)))) as actors,
        ):
            blocks, curvature = Blocks(run.stage("blocks").store), run.stage("curvature").store
            respond_sites(run, blocks, curvature, operators, stage, name, actors)
            markers = [marker for unit, marker in stage.done().items() if unit.startswith("part-")]
            reliable = [each for marker in markers for each in marker["reliability"]]
            summary = {
                "queries": queries,
                "failed": sum(marker["failed"] for marker in markers),
                "mode": "linear",
                "parts": len(markers),
                "reliability": float(np.median(reliable)) if reliable else None,
            }
            stage.store.write_json("manifest.json", summary)
    stage.clear_tensors()
    return stage.store.read_json("manifest.json")


def _respond_steered(run: Run, operators: Store, stage: Stage, table: pa.Table) -> dict[str, Any]:
    """Responses of the paper's forms."""
    method = operators.read_json("metadata.json")["method"]
    mode = "linear" if run.config.respond.mode == "auto" and method == "closed_form" else run.config.respond.mode
    units = [(index, start) for index, start in enumerate(range(0, table.num_rows, UNIT))]
    done = stage.done()
    missing = [unit for unit in units if part_name(unit[0]) not in done]
    if missing:
        with costed(stage), shared_actor_pool(run.config, len(missing)) as actors:
            given = (run.config, run.store, stage, actors.device)
            if mode == "auto" and "modes" not in done:
                stage.remember(
                    progress(actors.map(Comparer, given, [(0, 0)]), "compare modes", 1, "samples", lambda _: 1)
                )
            total = sum(min(UNIT, table.num_rows - start) for _, start in missing)
            results = actors.map(Responder, (*given, _chosen(stage, mode)), missing)
            stage.remember(progress(results, "respond", total, "queries", lambda marker: marker["queries"]))
    done = stage.done()
    summary = {
        "queries": table.num_rows,
        "failed": sum(done[part_name(index)]["failed"] for index, _ in units),
        "mode": _chosen(stage, mode),
        "parts": len(units),
        **({"correlation": done["modes"]["correlation"]} if mode == "auto" else {}),
    }
    stage.store.write_json("manifest.json", summary)
    return summary


def _chosen(stage: Stage, mode: str) -> str:
    """The mode; for auto what the measurement says, exact where there was nothing to measure."""
    if mode != "auto":
        return mode
    correlation = stage.done()["modes"]["correlation"]
    return "linear" if correlation is not None and correlation >= ALIKE else "exact"


class Responder:
    """Answers units of queries; makes one Parquet file per unit."""

    def __init__(self, config: Config, root: Store, stage: Stage, device: str, mode: str = "") -> None:
        self.config, self.stage, self.mode = config, stage, mode
        self.model = load_run_model(config, device)
        self.operators, _ = load_operators(root.child("operators"), self.model.device)
        self.queries = stage.store.read_table("queries.parquet")
        length = Blocks(root.child("blocks")).block_tokens
        self.tokens = length * rows_at_once(config, self.model, length)

    def __call__(self, unit: tuple[int, int]) -> dict[str, Any]:
        """Do one unit; returns its marker or findings."""
        started = time.monotonic()
        index, start = unit
        rows = self.queries.slice(start, UNIT).to_pylist()
        unknown = np.full(len(self.operators.A), np.nan, np.float32)
        answers = [{**checked(self.model, row), "response": unknown} for row in rows]
        if self.mode == "linear":
            self._linear(rows, answers)
        else:
            for row, answer in zip(rows, answers, strict=True):
                if answer["status"] == "ok":
                    self._exact(row, answer)
        name, schema = part_name(index), response_schema(len(self.operators.A))
        digest = self.stage.store.write_table(f"{name}.parquet", pa.Table.from_pylist(answers, schema))
        failed = sum(answer["status"] != "ok" for answer in answers)
        return self.stage.mark(name, started, queries=len(rows), failed=failed, sha256=digest)

    def _linear(self, rows: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
        """Batches of queries, padded on the right, up to the token budget."""
        waiting = [i for i, answer in enumerate(answers) if answer["status"] == "ok"]
        for batch in batches(rows, waiting, self.tokens):
            ids, mask = padded([rows[i] for i in batch], self.model.device)
            losses = self.model.losses(self.model.trunk(ids), ids, mask)
            found = self.operators.linear(self.model, ids, mask)
            for i, loss, response in zip(batch, losses.tolist(), found.cpu().numpy(), strict=True):
                _fill(answers[i], loss, response)

    def _exact(self, row: dict[str, Any], answer: dict[str, Any]) -> None:
        ids, mask = padded([row], self.model.device)
        everyone = torch.arange(len(self.operators.A), device=self.model.device)
        try:
            base, found = self.operators.exact(self.model, ids[0], mask[0], everyone, self.tokens)
        except torch.OutOfMemoryError as error:
            answer |= {"status": "failed", "error": f"out of memory: {first_line(error)}; lower compute.batch_tokens"}
            return
        _fill(answer, base, found.cpu().numpy())


class Comparer(Responder):
    """Measures how well exact and linear responses agree: the mean over queries of their correlation."""

    def __call__(self, unit: tuple[int, int]) -> dict[str, Any]:
        """Take the first SAMPLE queries that can be asked, and OPERATORS operators; returns the marker."""
        started = time.monotonic()
        K, device = len(self.operators.A), self.model.device
        some = torch.linspace(0, K - 1, min(K, OPERATORS), device=device).round().long()
        found: list[float] = []
        for row in self.queries.to_pylist():
            if len(found) == SAMPLE:
                break
            if checked(self.model, row)["status"] == "ok":
                ids, mask = padded([row], device)
                linear = self.operators.linear(self.model, ids, mask)[0, some]
                exact = self.operators.exact(self.model, ids[0], mask[0], some, self.tokens)[1]
                found.append(float(torch.corrcoef(torch.stack([linear, exact]).double())[0, 1]))
        correlation = float(np.mean(found)) if found and np.isfinite(found).all() else None
        return self.stage.mark("modes", started, correlation=correlation, queries=len(found), operators=len(some))


def _fill(answer: dict[str, Any], loss: float, response: np.ndarray) -> None:
    if np.isfinite(response).all() and np.isfinite(loss):
        answer |= {"base_loss": loss, "response": response}
    else:
        answer |= {"status": "failed", "error": "the response is not finite; the model overflows on this text"}
