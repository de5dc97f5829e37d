"""Source retrieval: for a query taken from a document, do its top ten blocks include one of that document?

A necessary but not sufficient property, since lexical search has it too. Baselines are therefore TF-IDF, the same
responses recovered with a wrong membership matrix, and chance.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from scipy.stats import binomtest, hypergeom

from stride_ray.attribution.lasso.recovery import recover
from stride_ray.attribution.recover import lasso_options
from stride_ray.attribution.respond import respond_table
from stride_ray.attribution.responses import read_responses
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.documents import TokenizedDocument
from stride_ray.corpus.queries import SCHEMA, row
from stride_ray.evaluate.split_halves import TOP, most_helpful
from stride_ray.evaluate.word_counts import similar_blocks
from stride_ray.operators.membership import Membership, membership_of
from stride_ray.runtime.run import Run


@dataclass(frozen=True)
class Retrieval:
    """One method's result on one kind of query.

    Attributes:
        method: its name.
        kind: kind of the queries.
        hits: how often a block of the source was among the top ten.
        queries: number of queries.
        low: lower end of the share's 95 % Clopper–Pearson interval.
        high: its upper end.
    """

    method: str
    kind: str
    hits: float
    queries: int
    low: float
    high: float


def source_retrieval(run: Run, ids: np.ndarray, sources: list[str], kinds: list[str]) -> list[Retrieval]:
    """Measure how often a query's top ten blocks include one of its source.

    Args:
        run: with finished ``operators/``; a block's ``source`` is the document it was cut from.
        ids: (n, T) token ids of the queries; all tokens carry loss.
        sources: each query's document.
        kinds: each query's kind.

    Returns:
        Per method and kind: STRIDE, STRIDE with shuffled membership, TF-IDF over token uni- and bigrams (sublinear,
        as in scikit-learn), and chance (ten blocks drawn without replacement; hits is an expectation).
    """
    pool = Blocks(run.stage("blocks").store)
    pool_sources = np.array(pool.take(np.arange(len(pool)), ["source"])["source"].to_pylist())
    table = pa.Table.from_pylist(
        [
            row(f"{kind}-{i}", TokenizedDocument(source, source, x))
            for i, (x, source, kind) in enumerate(zip(ids, sources, kinds, strict=True))
        ],
        SCHEMA,
    )
    summary = respond_table(run, table, "retrieval")
    store = run.stage("responses", "retrieval").store
    responses = np.concatenate([read_responses(store, part)[1] for part in range(summary["parts"])])
    membership = membership_of(run.config)
    tops = {
        "STRIDE": _lasso_top(run, responses, membership, len(pool)),
        "STRIDE, shuffled membership": _lasso_top(
            run, responses, replace(membership, seed=membership.seed + 1_000_003), len(pool)
        ),
        "TF-IDF": similar_blocks(pool, ids, TOP),
    }
    found = []
    for kind in dict.fromkeys(kinds):
        chosen = [i for i, each in enumerate(kinds) if each == kind]
        for method, top in tops.items():
            hits = sum(bool((pool_sources[top[i]] == sources[i]).any()) for i in chosen)
            interval = binomtest(hits, len(chosen)).proportion_ci()
            found.append(Retrieval(method, kind, hits, len(chosen), interval.low, interval.high))
        blocks_of = [int((pool_sources == sources[i]).sum()) for i in chosen]
        chance = [1 - hypergeom(len(pool), count, TOP).pmf(0) for count in blocks_of]
        found.append(Retrieval("chance", kind, float(np.sum(chance)), len(chosen), np.nan, np.nan))
    return found


def _lasso_top(run: Run, responses: np.ndarray, membership: Membership, n_blocks: int) -> list[np.ndarray]:
    """Ordinals of each query's ten largest positive influences."""
    recovered = recover(responses, membership, n_blocks, **lasso_options(run.config.recover))
    return [most_helpful(each) for each in recovered]


def as_table(found: list[Retrieval]) -> str:
    """Format the results as Markdown, including the ratio to chance."""
    chance = {each.kind: each.hits for each in found if each.method == "chance"}
    lines = [
        "| queries | method | source in top 10 | 95 % interval | times chance |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        interval = "" if np.isnan(each.low) else f"{100 * each.low:.0f}–{100 * each.high:.0f} %"
        share = f"{each.hits:.3g} of {each.queries}"
        lines.append(f"| {each.kind} | {each.method} | {share} | {interval} | {each.hits / chance[each.kind]:.1f} |")
    return "\n".join(lines)
