"""Chaos test: does a run with repeated failures produce the same bytes as an undisturbed one?

A cluster of several nodes runs on this machine, and a driver runs all stages on it. At random moments a node is removed
ungracefully, or a worker or the driver is killed, sometimes twice in a row. A driver that died is restarted, as a
scheduler would. Every data file is then compared with the undisturbed run's.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from tqdm import tqdm

from stride_ray.attribution.attribute import attribute
from stride_ray.attribution.recover import recover_estimates
from stride_ray.attribution.rescore import rescore
from stride_ray.attribution.respond import respond
from stride_ray.cli.quickstart import PROMPTS
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.shard import shard
from stride_ray.models.builtin.toy import train_model, train_tokenizer
from stride_ray.operators.fit import fit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import connected
from stride_ray.selection.select import select

NODE, WORKER, DRIVER = KINDS = ("node", "worker", "driver")
NODES, NAME = 2, "asked"
# Ray's titles of processes that do our work: Ray Data's workers, pool actors, tasks. Ray's own processes (agents,
# without which a node ends; actors that count) are spared.
OURS = ("ray::MapWorker", "ray::_PoolActor", "ray::_task")
# Stages in order, with the folder whose existence shows that the stage has begun.
STAGES = {
    "shard": "blocks",
    "curvature": "curvature",
    "fit": "operators",
    "respond": "responses",
    "recover": "estimates",
    "rescore": "influence",
    "exact": "exact",
    "select": "chosen",
}
# Time limit of a round in seconds; maximum strikes per round; maximum seconds until a removed node is replaced; maximum
# seconds from the file that triggers a strike to the strike.
LIMIT, STRIKES, ABSENT, DELAY = 900.0, 3, 5.0, 1.0
# The corpus: modules of the standard library; characters per piece; copies of every prompt.
MODULES, PIECE, COPIES = ("difflib.py", "json/decoder.py", "json/encoder.py", "textwrap.py", "string.py"), 800, 8
_SUFFIXES = (".parquet", ".safetensors", ".jsonl")


@dataclass(frozen=True)
class Round:
    """One disturbed run.

    Attributes:
        strikes: target (node, driver, or the name of a worker's task or actor) and stage of each strike, in order.
        drivers: number of driver processes started.
        seconds: from the first driver's start to the last one's end.
        different: data files that differ, are missing or are extra; empty on success.
        failure: why the run did not finish, or empty.
    """

    strikes: tuple[tuple[str, str], ...]
    drivers: int
    seconds: float
    different: tuple[str, ...]
    failure: str = ""

    @property
    def equal(self) -> bool:
        """Whether it produced the undisturbed run's bytes."""
        return not self.different and not self.failure


def chaos(out: str, rounds: int, seed: int = 0) -> list[Round]:
    """Run once undisturbed, then ``rounds`` times disturbed; prints a line per round.

    Args:
        out: a local folder for the corpus, the model, the undisturbed run and a record of each round. All are kept,
            so a second command runs only the missing rounds. Run folders are kept for rounds that differ, and removed
            otherwise.
        rounds: how many.
        seed: for targets and times of strikes.

    Raises:
        StrideError: the undisturbed run fails.
    """
    root = Path(out).resolve()
    root.mkdir(parents=True, exist_ok=True)
    store, nodes = Store(str(root)), _Nodes()
    try:
        os.environ["RAY_ADDRESS"] = nodes.cluster.address
        prepare(root)
        plain = root / "undisturbed"
        if not (plain / "chosen").exists() and _driver(root, plain).wait(LIMIT):
            raise StrideError(f"The undisturbed run failed; see {plain}.log.")
        found = []
        for number in tqdm(range(rounds), desc="chaos", unit=" rounds", file=sys.stderr):
            record = f"seed-{seed}-round-{number:03d}.json"
            if not store.exists(record):
                rng = random.Random(f"{seed}/{number}")
                made = _round(root, plain, root / f"round-{number:03d}", rng, nodes)
                store.write_json(record, asdict(made))
            found.append(_restored(store.read_json(record)))
            tqdm.write(f"round {number}: {describe(found[-1])}")
        return found
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        nodes.cluster.shutdown()


def _restored(facts: dict[str, Any]) -> Round:
    strikes = tuple((kind, stage) for kind, stage in facts.pop("strikes"))
    return Round(strikes=strikes, different=tuple(facts.pop("different")), **facts)


class _Nodes:
    """A cluster on this machine: a head that runs no work, and NODES one-CPU nodes that come and go.

    Every node has its own address, because a driver attaches to the node with its address; the driver's is the head's.
    """

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._addresses = (f"127.0.0.{2 + at % 250}" for at in itertools.count())
        self._alive, self._back = list[Any](), list[float]()
        for _ in range(NODES):
            self._add()

    def _add(self) -> None:
        self._alive.append(self.cluster.add_node(num_cpus=1, node_ip_address=next(self._addresses)))

    def replace(self, now: float = float("inf")) -> None:
        """Add back the nodes that are due."""
        while self._back and now > self._back[0]:
            self._back.pop(0)
            self._add()

    def strike(self, kind: str, rng: random.Random, driver: subprocess.Popen[bytes], now: float) -> str:
        """Kill a process or node of the given kind; returns its name, or an empty string if there is none."""
        if kind == DRIVER:
            driver.kill()
            driver.wait()
            return DRIVER
        if kind == NODE:
            if not self._alive:
                return ""
            self.cluster.remove_node(self._alive.pop(rng.randrange(len(self._alive))), allow_graceful=False)
            self._back = sorted([*self._back, now + rng.uniform(0, ABSENT)])
            return NODE
        # The cluster's workers are children of its raylets, which this process started.
        titled = [(_title(each), each) for each in psutil.Process().children(recursive=True)]
        busy = [(title, each) for title, each in titled if title.startswith(OURS)]
        if not busy:
            return ""
        title, process = rng.choice(busy)
        process.kill()
        return title.removeprefix("ray::").split("(")[0].split()[0]


def prepare(root: Path) -> None:
    """Make corpus, tokenizer, model and queries; existing ones are kept."""
    corpus = root / "corpus.jsonl"
    if not corpus.exists():
        library = Path(sysconfig.get_paths()["stdlib"])
        texts = [(library / name).read_text("utf-8") for name in MODULES]
        pieces = [text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)]
        corpus.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), "utf-8")
    train_tokenizer((json.loads(line)["text"] for line in corpus.open(encoding="utf-8")), root / "tokenizer")
    run = Run(str(root / "trained"), changes=settings(root))
    with connected(ComputeConfig()):
        shard(run)
    train_model(Blocks(run.stage("blocks").store), root / "tokenizer", root / "model", 1)
    rows = ({"id": str(i), "text": text} for i, text in enumerate([*PROMPTS.values()] * COPIES))
    (root / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def settings(root: Path) -> dict[str, Any]:
    """Options that split every stage into many small units."""
    return {
        "corpus.input": [str(root / "corpus.jsonl")],
        "corpus.tokenizer": str(root / "tokenizer"),
        "corpus.block_tokens": 64,
        "corpus.shard_mb": 0.002,
        # Half a round would be spent on solving for directions, whose units are the same with less in each.
        "solve.tokens": 512,
        "model.path": str(root / "model"),
        "membership.subsets": 64,
        "compute.batch_tokens": 1024,
        "compute.workers": NODES,
        "select.tokens": 0.3,
    }


def drive(root: str, folder: str) -> None:
    """Run all stages in order, as the driver."""
    run = Run(folder, changes=settings(Path(root)))
    queries = f"{root}/queries.jsonl"
    with connected(run.config.compute), open(os.devnull, "w") as nowhere:
        shard(run, nowhere)
        fit(run)
        respond(run, queries, NAME)
        recover_estimates(run, NAME)
        rescore(run, NAME)
        exact = Run(folder, changes={"attribute.exact": True})
        attribute(exact, queries, NAME, nowhere)
        select(exact, [NAME], f"{folder}/chosen")


def data_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every data file of a run by name; markers and records are skipped because they contain times."""
    paths = (path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def describe(found: Round) -> str:
    """Describe a round in one line."""
    struck = ", ".join(f"{kind} in {stage}" for kind, stage in found.strikes) or "nothing was struck"
    end = "equal" if found.equal else found.failure or f"{len(found.different)} files differ: {found.different[:5]}"
    return f"{struck}; {found.drivers} driver(s), {found.seconds:.0f} s; {end}"


def counted(rounds: list[Round]) -> dict[str, int]:
    """Count strikes by target and stage."""
    return dict(sorted(Counter(f"{kind} in {stage}" for each in rounds for kind, stage in each.strikes).items()))


def _driver(root: Path, folder: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from benchmarks.chaos import drive; drive(*sys.argv[1:])"
    with open(f"{folder}.log", "ab") as log:
        command = [sys.executable, "-c", code, str(root), str(folder)]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _round(root: Path, plain: Path, folder: Path, rng: random.Random, nodes: _Nodes) -> Round:
    """Start the driver, strike at the drawn moments, restart it if it dies, compare with the undisturbed run."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.log").unlink(missing_ok=True)
    # Strikes are triggered by a stage's number of files plus a short delay: wall time depends on the machine's load.
    stages = sorted(rng.choices(range(len(STAGES)), k=rng.randint(1, STRIKES)))
    folders = [[*STAGES.values()][at] for at in stages]
    moments = [(each, rng.randrange(_written(plain / each))) for each in folders]
    if rng.random() < 0.5:
        moments.append(moments[-1])  # twice in a row
    began, driver, drivers, strikes, failure = time.monotonic(), _driver(root, folder), 1, [], ""
    due: float | None = None
    while not failure:
        passed = time.monotonic() - began
        nodes.replace(passed)
        if driver.poll() is not None:
            if driver.returncode == 0:
                break
            if driver.returncode > 0:
                failure = f"the driver ended with {driver.returncode}, see {folder}.log"
            driver, drivers = _driver(root, folder), drivers + 1
        if moments and due is None and _reached(folder, *moments[0]):
            due = passed + rng.uniform(0, DELAY)
        if due is not None and passed > due:
            stage = _stage(folder)
            if struck := nodes.strike(rng.choice(KINDS), rng, driver, passed):
                strikes.append((struck, stage))
                moments.pop(0)
                due = None
        if passed > LIMIT:
            failure = f"it did not end within {LIMIT:.0f} s, see {folder}.log"
        time.sleep(0.02)
    if driver.poll() is None:
        driver.kill()
    driver.wait()
    nodes.replace()
    files = data_files(folder)
    different = tuple(sorted({name for name, _ in files.items() ^ data_files(plain).items()}))
    found = Round(tuple(strikes), drivers, time.monotonic() - began, different, failure)
    if found.equal:
        shutil.rmtree(folder)
        Path(f"{folder}.log").unlink()
    return found


def _written(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _reached(folder: Path, stage: str, files: int) -> bool:
    return (folder / stage).exists() and _written(folder / stage) >= files


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _stage(folder: Path) -> str:
    begun = [stage for stage, name in STAGES.items() if (folder / name).exists()]
    return begun[-1] if begun else "start"
