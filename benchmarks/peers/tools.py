"""Commands of other attribution tools and of ours on one model, pool and queries, and readers for their scores."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stride_ray.attribution.attribute import read_influence
from stride_ray.evaluate.comparison.stride_variants import dense
from stride_ray.runtime.run import Run

# Tokens per batch in bergson's own quick start, and the context its command line requires for that.
BATCH_TOKENS = 4096
LOGRA = Path(__file__).with_name("logra.py")


@dataclass(frozen=True)
class ToolPaths:
    """Inputs and outputs of a tool, all of them local.

    Attributes:
        python: the interpreter of the peers' environment.
        model: a Hugging Face checkpoint.
        pool, queries: datasets of the ``datasets`` library with a column ``input_ids``.
        run: the tool's output folder, initially empty.
        config: a TOML file, for our own run on the same pool.
        asked: our own query file.
    """

    python: str
    model: str
    pool: str
    queries: str
    run: str
    config: str
    asked: str

    def bergson(self, verb: str, *arguments: str) -> list[str]:
        """Build a bergson command, which writes to a folder named after the verb."""
        command = [self.python, "-m", "bergson", verb, f"{self.run}/{verb}", "--model", self.model]
        return [*command, "--token_batch_size", str(BATCH_TOKENS), *arguments]

    def ours(self, verb: str, *arguments: str) -> list[str]:
        """Build a stride-ray command on the run."""
        call = "import sys; from stride_ray.cli.main import main; sys.exit(main())"
        return [sys.executable, "-c", call, verb, self.run, *arguments]


@dataclass(frozen=True)
class Tool:
    """A tool in one setting.

    Attributes:
        name: as printed in the table.
        commands: the commands for a pool, in order.
        scores: reads the resulting (Q, N) influence.
        ours: whether it is this package.
        further: the commands for another batch of queries on the same pool; None: not measured.
    """

    name: str
    commands: Callable[[ToolPaths], list[list[str]]]
    scores: Callable[[ToolPaths, int, int], np.ndarray]
    ours: bool = False
    further: Callable[[ToolPaths], list[list[str]]] | None = None


def _quick(place: ToolPaths) -> list[list[str]]:
    """The README's two commands, with batch queries instead of typed ones."""
    projected = ("--projection_dim", "16")
    asked = ("--query_path", f"{place.run}/build", "--unit_normalize")
    return [
        place.bergson("build", "--dataset", place.queries, *projected),
        place.bergson("score", "--dataset", place.pool, *asked, *projected),
    ]


def _trackstar(place: ToolPaths) -> list[list[str]]:
    # Chang et al. (2024) compare unit vectors, which is not bergson's default.
    given = ("--data.dataset", place.pool, "--query.dataset", place.queries, "--unit_normalize")
    return [place.bergson("trackstar", *given)]


def _ekfac(place: ToolPaths) -> list[list[str]]:
    # The first option fits the corrected eigenvalues, the second uses them.
    corrected = ("--method", "kfac", "--hessian_cfg.ev_correction", "--preprocess_cfg.ev_correction")
    return [place.bergson("ekfac", "--data.dataset", place.pool, "--query.dataset", place.queries, *corrected)]


def _ekfac_again(place: ToolPaths) -> list[list[str]]:
    """Keep the factors, repeat the rest."""
    clear = "import shutil, sys; [shutil.rmtree(path) for path in sys.argv[1:]]"
    of_queries = [f"{place.run}/ekfac/{name}" for name in ("query", "kfac_query", "scores")]
    return [[place.python, "-c", clear, *of_queries], *([*command, "--resume"] for command in _ekfac(place))]


def _logra(place: ToolPaths) -> list[list[str]]:
    return [[place.python, str(LOGRA), place.model, place.pool, place.queries, f"{place.run}/scores.npy"]]


def _batch(name: str, *options: str) -> Callable[[ToolPaths], list[list[str]]]:
    return lambda place: [place.ours("attribute", "--queries", place.asked, "--name", name, *options)]


def _ours(*options: str) -> Callable[[ToolPaths], list[list[str]]]:
    return lambda place: [
        place.ours("shard", "--config", place.config),
        *_batch("asked", *options)(place),
    ]


def _last_quarter(place: ToolPaths) -> list[list[str]]:
    return [[*command, "--set", "operators.layers=0.25"] for command in _ours("--exact")(place)]


def _bergson_scores(folder: str) -> Callable[[ToolPaths, int, int], np.ndarray]:
    def read(place: ToolPaths, queries: int, blocks: int) -> np.ndarray:
        where = Path(place.run, folder)
        facts = json.loads((where / "info.json").read_text())
        rows = np.memmap(where / "scores.bin", dtype=np.dtype(facts["dtype"]), mode="r", shape=(facts["num_rows"],))
        return np.stack([rows[f"score_{query}"][:blocks] for query in range(queries)]).astype(np.float32)

    return read


def _logra_scores(place: ToolPaths, queries: int, blocks: int) -> np.ndarray:
    return np.load(f"{place.run}/scores.npy", allow_pickle=False)


def _our_scores(place: ToolPaths, queries: int, blocks: int) -> np.ndarray:
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
