"""Other attribution tools and ours as commands on one model, pool and queries, and the scores that each leaves."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stride_ray.attribution.attribute import read_influence
from stride_ray.evaluate.comparison.stride_variants import dense
from stride_ray.runtime.run import Run

# Tokens of a batch in bergson's own quick start, and the context that lets its command line have them.
BATCH_TOKENS = 4096
LOGRA = Path(__file__).with_name("logra.py")


@dataclass(frozen=True)
class Place:
    """Where a tool finds its inputs and leaves its outputs, all of them local folders.

    Attributes:
        python: the interpreter of the peers' environment.
        model: a Hugging Face checkpoint.
        pool, queries: datasets of the ``datasets`` library with a column ``input_ids``.
        run: made by the tool, empty before.
        config: of our own run on the same pool, a TOML file.
        asked: our own file of queries.
    """

    python: str
    model: str
    pool: str
    queries: str
    run: str
    config: str
    asked: str

    def bergson(self, verb: str, *arguments: str) -> list[str]:
        """A command of bergson's, which leaves its output in a folder of its name."""
        command = [self.python, "-m", "bergson", verb, f"{self.run}/{verb}", "--model", self.model]
        return [*command, "--token_batch_size", str(BATCH_TOKENS), *arguments]

    def ours(self, verb: str, *arguments: str) -> list[str]:
        """A command of ours on the run."""
        call = "import sys; from stride_ray.cli.main import main; sys.exit(main())"
        return [sys.executable, "-c", call, verb, self.run, *arguments]


@dataclass(frozen=True)
class Tool:
    """A tool in one setting.

    Attributes:
        name: as the table prints it.
        commands: what is run for a pool, one after the other.
        scores: (Q, N) influence that it left.
        ours: whether it is this package.
        further: what is run for another batch of queries on the same pool; None: all but what is kept by itself.
    """

    name: str
    commands: Callable[[Place], list[list[str]]]
    scores: Callable[[Place, int, int], np.ndarray]
    ours: bool = False
    further: Callable[[Place], list[list[str]]] | None = None


def _quick(place: Place) -> list[list[str]]:
    """The README's two commands, with batch queries in place of typed ones."""
    projected = ("--projection_dim", "16")
    asked = ("--query_path", f"{place.run}/build", "--unit_normalize")
    return [
        place.bergson("build", "--dataset", place.queries, *projected),
        place.bergson("score", "--dataset", place.pool, *asked, *projected),
    ]


def _trackstar(place: Place) -> list[list[str]]:
    # Chang et al. (2024) compare unit vectors, which bergson does not do by itself.
    given = ("--data.dataset", place.pool, "--query.dataset", place.queries, "--unit_normalize")
    return [place.bergson("trackstar", *given)]


def _ekfac(place: Place) -> list[list[str]]:
    # The first has the corrected eigenvalues fitted, the second has them used.
    corrected = ("--method", "kfac", "--hessian_cfg.ev_correction", "--preprocess_cfg.ev_correction")
    return [place.bergson("ekfac", "--data.dataset", place.pool, "--query.dataset", place.queries, *corrected)]


def _ekfac_again(place: Place) -> list[list[str]]:
    """The factors are kept, the rest is done again."""
    clear = "import shutil, sys; [shutil.rmtree(path) for path in sys.argv[1:]]"
    of_queries = [f"{place.run}/ekfac/{name}" for name in ("query", "kfac_query", "scores")]
    return [[place.python, "-c", clear, *of_queries], *([*command, "--resume"] for command in _ekfac(place))]


def _logra(place: Place) -> list[list[str]]:
    return [[place.python, str(LOGRA), place.model, place.pool, place.queries, f"{place.run}/scores.npy"]]


def _batch(name: str, *options: str) -> Callable[[Place], list[list[str]]]:
    return lambda place: [place.ours("attribute", "--queries", place.asked, "--name", name, *options)]


def _ours(*options: str) -> Callable[[Place], list[list[str]]]:
    return lambda place: [
        place.ours("shard", "--config", place.config),
        *_batch("asked", *options)(place),
    ]


def _last_quarter(place: Place) -> list[list[str]]:
    return [[*command, "--set", "operators.layers=0.25"] for command in _ours("--exact")(place)]


def _bergson_scores(folder: str) -> Callable[[Place, int, int], np.ndarray]:
    def read(place: Place, queries: int, blocks: int) -> np.ndarray:
        where = Path(place.run, folder)
        facts = json.loads((where / "info.json").read_text())
        rows = np.memmap(where / "scores.bin", dtype=np.dtype(facts["dtype"]), mode="r", shape=(facts["num_rows"],))
        return np.stack([rows[f"score_{query}"][:blocks] for query in range(queries)]).astype(np.float32)

    return read


def _logra_scores(place: Place, queries: int, blocks: int) -> np.ndarray:
    return np.load(f"{place.run}/scores.npy", allow_pickle=False)


def _our_scores(place: Place, queries: int, blocks: int) -> np.ndarray:
    return dense(read_influence(Run(place.run), "asked"), queries, blocks)


TOOLS = (
    Tool("bergson, quick start", _quick, _bergson_scores("score")),
    Tool("bergson, TrackStar", _trackstar, _bergson_scores("trackstar/scores")),
    Tool("bergson, EK-FAC", _ekfac, _bergson_scores("ekfac/scores"), further=_ekfac_again),
    Tool("dattri, LoGRA", _logra, _logra_scores),
    Tool("STRIDE", _ours(), _our_scores, ours=True, further=_batch("again")),
    Tool("STRIDE, exact", _ours("--exact"), _our_scores, ours=True, further=_batch("again", "--exact")),
    Tool("STRIDE, exact, last quarter of the layers", _last_quarter, _our_scores, ours=True),
)
