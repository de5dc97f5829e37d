"""Baselines: other methods that score training blocks for queries, one file each, as a ``problem.Method``.

``METHODS`` lists them. Options default to each paper's or library's values; damping, ranks and smoothing were tuned on
the development queries of the ``continued`` benchmark only.
"""

import os
from dataclasses import dataclass, replace
from functools import partial

from stride_ray.evaluate.baselines import chance, postprocessing
from stride_ray.evaluate.baselines.gradient import astra, ekfac, ekfac_stages, graddot, less, logra, tracin, trak
from stride_ray.evaluate.baselines.lexical import bm25, dsir, tfidf
from stride_ray.evaluate.baselines.problem import Method
from stride_ray.evaluate.baselines.representation import airrep, embedding, featsim, rds
from stride_ray.runtime.options import SolveConfig


@dataclass(frozen=True)
class Baseline:
    """A method and its entry in the tables.

    Attributes:
        name: as printed in tables.
        run: the method with its defaults.
        lexical: it compares words and does not use the attributed model.
        note: a one-line description.
        checkpoints: it uses checkpoints of training, which the benchmark's recipe reproduces for it.
        variable: the environment variable that may name its encoder.
        ablation: only included if it is named, or ablations are requested.
    """

    name: str
    run: Method
    lexical: bool
    note: str
    checkpoints: bool = False
    variable: str = ""
    ablation: bool = False


def variable_set(name: str) -> dict[str, str]:
    """An environment variable with its value; empty if it is not set."""
    return {name: value} if (value := os.environ.get(name)) else {}


METHODS: dict[str, Baseline] = {
    "random": Baseline("random", chance.scores, False, "standard normal scores"),
    "tfidf": Baseline("TF-IDF", tfidf.scores, True, "cosine over token uni- and bigrams, sublinear"),
    "bm25": Baseline("BM25", bm25.scores, True, "Okapi over token uni- and bigrams"),
    "rds": Baseline("RDS", rds.scores, False, "cosine of the model's mean last-layer states"),
    "featsim": Baseline("FeatSim", featsim.scores, False, "cosine of the features that the model's head reads"),
    "embedding": Baseline(
        "embedding",
        embedding.scores,
        False,
        "cosine of another model's sentence embeddings",
        variable=embedding.VARIABLE,
    ),
    "graddot": Baseline("GradDot", graddot.scores, False, "inner product of loss gradients, all weight matrices"),
    "tracin": Baseline("TracIn", tracin.scores, False, "GradDot over the stages of training", True),
    "logra": Baseline("LoGRA", logra.scores, False, "influence on gradients projected to rank 64 per layer"),
    "trak": Baseline("TRAK", trak.scores, False, "linearised output function, over checkpoints", True),
    "less": Baseline("LESS", less.scores, False, "cosine of a gradient with Adam's step, over checkpoints", True),
    "ekfac": Baseline("EK-FAC", ekfac.scores, False, "influence functions, all weight matrices"),
    "ekfac_stages": Baseline(
        "EK-FAC, two stages", ekfac_stages.scores, False, "EK-FAC where training began and ended", True
    ),
    "ekfac_checkpoints": Baseline(
        "EK-FAC, over checkpoints",
        postprocessing.over_checkpoints(ekfac.scores),
        False,
        "a sum over ten checkpoints of training",
        True,
        ablation=True,
    ),
    "ekfac_lent": Baseline(
        "EK-FAC, with our post-processing",
        postprocessing.with_our_postprocessing(ekfac.scores),
        False,
        "measured where ours is, negative scores halved",
    ),
    "astra_lent": Baseline(
        "EK-FAC, with our post-processing and a solve",
        postprocessing.with_our_postprocessing(astra.scores),
        False,
        "the same, a query's gradient solved for as ours is",
    ),
    "astra_further": Baseline(
        "EK-FAC, with our post-processing, solved further",
        postprocessing.with_our_postprocessing(partial(astra.scores, options=astra.FURTHER)),
        False,
        "the same, with as many products and tokens as our most accurate setting",
    ),
    "logra_lent": Baseline(
        "LoGRA, with our post-processing",
        postprocessing.with_our_postprocessing(logra.scores),
        False,
        "measured where ours is, negative scores halved",
    ),
    "dsir": Baseline("DSIR", dsir.scores, True, "a corpus selector: log importance weights, query by query"),
    "airrep": Baseline(
        "AirRep",
        airrep.scores,
        False,
        "embeddings trained to predict influence; needs its encoder",
        variable=airrep.VARIABLE,
    ),
}


def _solved(damping: float) -> Method:
    solved = partial(astra.scores, options=SolveConfig(damping=damping))
    return postprocessing.with_our_postprocessing(solved, negative_scale=1.0)


def _damped(slug: str, note: str, factor: int, run: Method, name: str = "") -> dict[str, Baseline]:
    name = f"{name or METHODS[slug].name}, damping × {factor}"
    return {f"{slug}_damped{factor}": replace(METHODS[slug], name=name, note=note, run=run, ablation=True)}


# The right damping depends on how long a model was trained; a benchmark's development queries choose the factor. Our
# post-processing leaves negative scores whole here, as ours does for classifiers.
for _factor in (10, 100):
    _more = f"{_factor} times its usual damping"
    METHODS |= _damped("logra", _more, _factor, partial(logra.scores, damping=_factor * logra.DAMPING))
    METHODS |= _damped("trak", _more, _factor, partial(trak.scores, damping=_factor * trak.DAMPING))
    METHODS |= _damped("ekfac", _more, _factor, partial(ekfac.scores, damping=_factor * ekfac.DAMPING))
    _summed = postprocessing.over_checkpoints(METHODS[f"ekfac_damped{_factor}"].run)
    METHODS |= _damped("ekfac_checkpoints", f"a sum over ten checkpoints, {_more}", _factor, _summed)
for _factor in (1, 10, 100):
    METHODS |= _damped(
        "astra_lent",
        f"measured where ours is, solved with {_factor} times our damping",
        _factor,
        _solved(_factor * SolveConfig.damping),
        "EK-FAC, with our post-processing and a solve, negative scores whole",
    )
