"""Attribution of one query at a time, from memory: the stages respond, recover and rescore without files between them.

Everything that a query needs is loaded at the start: the model, the sites with their preconditioner, the sample of the
Gauss–Newton solve, and the operator rows (memory-mapped if the run is local). The result is that of ``attribute`` for a
file with this query alone; among several queries there, sums of floating-point numbers may differ in their last bits.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stride_ray.attribution.directions import DirectionSolver
from stride_ray.attribution.recover import solve_rows, take_estimates
from stride_ray.attribution.rescore import candidate_count, candidate_units
from stride_ray.attribution.respond import check_unfitted_blocks
from stride_ray.attribution.scoring import BlockScorer, precondition, wanted_scores
from stride_ray.attribution.site_responses import code_directions, merge_products, multiply
from stride_ray.attribution.tables import RECOVERY, Influence, ends_of, merge_influence, rank_tables
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.failures import failed_ordinals
from stride_ray.models.curvature.kfac import load_sites
from stride_ray.models.loading import measured_model_fingerprint
from stride_ray.models.query_batches import texts_of
from stride_ray.operators.one_bit import Queries, Rows
from stride_ray.operators.row_store import RowStore
from stride_ray.operators.sketched_rows import SKETCH
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.urls import redact_url
from stride_ray.serve.lexical import LexicalIndex


@dataclass(frozen=True)
class Attribution:
    """The influence of the pool on one query.

    Attributes:
        query: its row of tables.RECOVERY.
        influence, documents: its tables (tables.INFLUENCE, DOCUMENTS); empty if it failed.
        block_tokens: by ordinal the influence by token (T,) of the first and last blocks with exact influence, and of
            ``matches``.
        matches: the blocks that are nearest to the query's text by BM25, nearest first, with their exact influence:
            rows of tables.INFLUENCE, whose ``rank`` is that in ``influence``, or None.
        query_tokens: for the query's text, and for the other completion of a contrast, the influence of the helpful
            ones of these blocks together on the loss of each token (scoring.BlockScorer.query_token_influence); empty
            without such blocks.
    """

    query: dict[str, Any]
    influence: pa.Table
    documents: pa.Table
    block_tokens: dict[int, np.ndarray] = field(default_factory=dict)
    query_tokens: list[np.ndarray] = field(default_factory=list)
    matches: list[dict[str, Any]] = field(default_factory=list)


def servable_operators(run: Run) -> Stage:
    """The run's operators, checked to answer one query at a time.

    Raises:
        StrideError: they are not there, of another form, or older than the blocks or the model.
    """
    form = run.config.operators.form
    if form != "sites":
        raise StrideError(
            f"{redact_url(run.url)} has operators of the form {form!r}; only operators at all sites (operators.form = "
            "sites) answer one query at a time."
        )
    run.require("blocks")
    operators = run.require("operators", weights=measured_model_fingerprint(run.config))
    check_unfitted_blocks(run, operators.manifest())
    return operators


class Attributor:
    """Attributes queries to the blocks of a run.

    Example:
        >>> from stride_ray import Run
        >>> from stride_ray.corpus.queries import query_row
        >>> from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
        >>> from stride_ray.serve.attributor import Attributor
        >>> run = Run("mine")
        >>> row = query_row({"text": "The sea was calm."}, load_saved_tokenizer(run.store.child("blocks")))
        >>> Attributor(run).attribute(row).influence["rank"][0].as_py()
        1

    Args:
        run: with finished ``operators/`` at all sites.
        device: of the model.

    Raises:
        StrideError: as servable_operators.
    """

    def __init__(self, run: Run, device: str = "cpu") -> None:
        operators, config = servable_operators(run), run.config
        self.config, self.facts = config, operators.manifest()
        self.blocks, curvature = Blocks(run.stage("blocks").store), run.stage("curvature").store
        self.candidates = candidate_count(config, self.facts)
        self.scorer = BlockScorer(config, self.blocks, device, curvature)
        self.solver = DirectionSolver(config, self.blocks, device, curvature, self.scorer.sites)
        self.sketches = load_sites(operators.store, SKETCH, self.scorer.model.device)
        self.failed = set(failed_ordinals(operators.store))
        self.store, self.rows = RowStore(operators.store), list[Rows]()
        for part in self.store.facts["parts"]:
            rows, failed = self.store.read_finite(part)
            self.rows.append(rows)
            self.failed |= set(failed)
        self.lexical = LexicalIndex(self.blocks, self.facts["blocks"])
        self.solver.prepare()

    def attribute(
        self, query: dict[str, Any], candidates: int | None = None, tokens: int | None = None, matches: int = 0
    ) -> Attribution:
        """Attribute a query.

        Args:
            query: row of queries.SCHEMA.
            candidates: number of blocks to score exactly; None: as ``attribute`` does.
            tokens: number of blocks at either end to split by token; None: ``attribute.tokens``.
            matches: number of blocks to find by their text.
        """
        (answer,), directions = self.solver.directions([query])
        whole = {}
        if answer["status"] == "ok":
            self._estimate(answer, code_directions(self.sketches, [answer], dict(directions)))
        if answer["status"] == "ok":
            whole = precondition(self.scorer.sites, [answer], directions, [None])
        if answer["status"] != "ok":
            none = rank_tables([], [], self.blocks, self.config.attribute.negative_scale)
            return Attribution({key: answer.get(key) for key in RECOVERY.names}, *none)
        found = {name: x.to(self.scorer.model.device) for name, x in whole.items()}
        ordinals, scores = self._score(answer, found, self.candidates if candidates is None else candidates)
        merged = merge_influence(answer, ordinals, scores, self.config.attribute.top)
        name = answer["query_id"]
        influence, documents = rank_tables([name], [merged], self.blocks, self.config.attribute.negative_scale)
        ends = ends_of(influence, self.config.attribute.tokens if tokens is None else tokens)
        facts = {**answer, "nonzeros": influence.num_rows, "exact": int(merged.exact.sum())}
        row = {key: facts.get(key) for key in RECOVERY.names}
        block_tokens = dict(self.scorer.token_influence(found, ends))
        helpful = [ordinal for ordinal in ends if block_tokens[ordinal].sum() > 0]
        texts = [text for text, _ in texts_of(query)] if helpful else []
        query_tokens = self.scorer.query_token_influence(texts, helpful) if texts else []
        known = dict(zip(ordinals.tolist(), scores.tolist(), strict=True))
        nearest = self._matches(query, found, influence, known, matches) if matches else []
        # Apart from the others, whose last bits depend on the batch.
        further = [row["ordinal"] for row in nearest if row["ordinal"] not in block_tokens]
        block_tokens |= dict(self.scorer.token_influence(found, further))
        return Attribution(row, influence, documents, block_tokens, query_tokens, nearest)

    def _estimate(self, answer: dict[str, Any], codes: Queries) -> None:
        """Set the query's ``ordinals``, ``estimates`` and ``reliability``, and the diagnostics of a Lasso."""
        if answer["status"] != "ok":  # its sketch is not finite
            return
        of_blocks = self.facts["rows"] == "blocks"
        top, negative_scale = self.config.attribute.top if of_blocks else 0, self.config.attribute.negative_scale
        products = multiply(self.rows, 0, codes, self.store.starts, top, negative_scale)
        ((rows, response, answer["reliability"]),) = merge_products([products], top, negative_scale)
        if of_blocks:
            take_estimates(answer, rows, response, negative_scale)
        else:
            solve_rows(self.config, [answer], response[None], self.facts["blocks"], sorted(self.failed))

    def _matches(
        self,
        query: dict[str, Any],
        found: dict[str, torch.Tensor],
        influence: pa.Table,
        known: dict[int, float],
        count: int,
    ) -> list[dict[str, Any]]:
        """Attribution.matches, given the scores that are known by ordinal."""
        token_ids = [token for text, _ in texts_of(query) for token in text["token_ids"]]
        nearest = [at for at in self.lexical.nearest(token_ids, count + len(self.failed)) if at not in self.failed]
        nearest = nearest[:count]
        further = np.array(sorted(set(nearest) - known.keys()), np.int64)
        scored = self.scorer.scores(found, self.scorer.batches_at(further)).influence[0].double()
        known = {**known, **dict(zip(further.tolist(), scored.tolist(), strict=True))}
        at = np.array(sorted(nearest), np.int64)
        exact = Influence(at, np.array([known[i] for i in at.tolist()]), np.ones(len(at), bool))
        table, _ = rank_tables([query["query_id"]], [exact], self.blocks, self.config.attribute.negative_scale)
        ranks = dict(zip(influence["ordinal"].to_pylist(), influence["rank"].to_pylist(), strict=True))
        rows = {row["ordinal"]: {**row, "rank": ranks.get(row["ordinal"])} for row in table.to_pylist()}
        return [rows[ordinal] for ordinal in nearest]

    def _score(
        self, answer: dict[str, Any], found: dict[str, torch.Tensor], candidates: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Exact influence of the candidates: ordinals (n,) and influence (n,) float64, 0 if it is not finite."""
        ordinals, scores = [np.zeros(0, np.int64)], [np.zeros(0)]
        # The same batches as in rescore, so that the scores have the same bits.
        for unit in candidate_units((0,), [[answer]], candidates):
            assert unit.ordinals is not None
            kept = wanted_scores(self.scorer.scores(found, self.scorer.batches_at(unit.ordinals)).influence, unit)
            ordinals.append(kept["ordinals"][0].numpy())
            scores.append(kept["influence"][0].double().numpy())
        return np.concatenate(ordinals), np.concatenate(scores)
