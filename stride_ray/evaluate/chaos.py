"""Does a run that is struck again and again end with the bytes of one that was left alone?

A cluster of several nodes is started on this machine, a driver runs all stages on it, and at random moments a node is
removed without grace, a worker or the driver is killed, sometimes twice in a row. A driver that died is started again,
as a scheduler would. Every data file is then compared with the undisturbed run's.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from tqdm import tqdm

from stride_ray.attribute import attribute
from stride_ray.blocks import Blocks
from stride_ray.config import ComputeConfig
from stride_ray.distribute import connected
from stride_ray.errors import StrideError
from stride_ray.fit import fit
from stride_ray.influence import recover_influence
from stride_ray.quickstart import PROMPTS
from stride_ray.respond import respond
from stride_ray.run import Run
from stride_ray.select import select
from stride_ray.shard import shard
from stride_ray.small import train_model, train_tokenizer

NODE, WORKER, DRIVER = KINDS = ("node", "worker", "driver")
NODES, NAME = 2, "asked"
# Stages in order, by the folder whose being there says that the stage has begun.
STAGES = {"shard": "blocks", "fit": "operators", "respond": "responses", "recover": "influence", "exact": "exact"}
# Seconds that a round may take; strikes in one, at most; seconds until a removed node is replaced, at most.
LIMIT, STRIKES, ABSENT = 900.0, 3, 5.0
# The corpus: modules of the standard library, in pieces of so many letters; how often every prompt is asked.
MODULES, PIECE, COPIES = ("difflib.py", "json/decoder.py", "json/encoder.py", "textwrap.py", "string.py"), 800, 8
_ADDRESSES = itertools.count()
_SUFFIXES = (".parquet", ".safetensors", ".jsonl")


@dataclass(frozen=True)
class Round:
    """One disturbed run.

    Attributes:
        strikes: what was struck and in which stage, in order.
        drivers: how many it took.
        seconds: from the first driver's start to the last one's end.
        different: data files that differ, are missing or are too many; empty is what is wanted.
        failure: why it did not end, or empty.
    """

    strikes: tuple[tuple[str, str], ...]
    drivers: int
    seconds: float
    different: tuple[str, ...]
    failure: str = ""

    @property
    def equal(self) -> bool:
        """Whether it ended with the undisturbed run's bytes."""
        return not self.different and not self.failure


def chaos(out: str, rounds: int, seed: int = 0) -> list[Round]:
    """Run undisturbed once, then ``rounds`` times disturbed; prints a line a round.

    Args:
        out: a local folder; the corpus, the model and the undisturbed run are made there, and stay. So do the folders
            of rounds that differ; the others are removed.
        rounds: how many.
        seed: of what is struck when.

    Raises:
        StrideError: the undisturbed run fails.
    """
    root = Path(out).resolve()
    root.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [_node(cluster) for _ in range(NODES)]
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        os.environ["RAY_ADDRESS"] = cluster.address
        prepare(root)
        plain, seconds = root / "undisturbed", root / "undisturbed.seconds"
        if not seconds.exists():
            shutil.rmtree(plain, ignore_errors=True)
            began = time.monotonic()
            if _driver(root, plain, environment).wait(LIMIT):
                raise StrideError(f"The undisturbed run failed; see {plain}.log.")
            seconds.write_text(str(time.monotonic() - began))
        wanted, length = data_files(plain), float(seconds.read_text())
        found = []
        for number in tqdm(range(rounds), desc="chaos", unit=" rounds", file=sys.stderr):
            rng = random.Random(f"{seed}/{number}")
            found.append(_round(root, root / f"round-{number:03d}", rng, length, wanted, cluster, nodes, environment))
            tqdm.write(f"round {number}: {told(found[-1])}")
        return found
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        cluster.shutdown()


def _node(cluster: Cluster) -> Any:
    """A node more, at an address of its own: a driver works for the node of its address, and its is the head's."""
    return cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{2 + next(_ADDRESSES) % 250}")


def prepare(root: Path) -> None:
    """Corpus, tokenizer, model and queries; what is there stays."""
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
    """Options that give every stage many small units."""
    return {
        "corpus.input": [str(root / "corpus.jsonl")],
        "corpus.tokenizer": str(root / "tokenizer"),
        "corpus.block_tokens": 64,
        "corpus.shard_mb": 0.002,
        "model.path": str(root / "model"),
        "membership.subsets": 64,
        "compute.batch_tokens": 1024,
        "compute.workers": NODES,
        "select.tokens": 0.3,
    }


def drive(root: str, folder: str) -> None:
    """What the driver does: all stages, one after the other."""
    run = Run(folder, changes={**settings(Path(root)), "attribute.mode": "amortised"})
    queries = f"{root}/queries.jsonl"
    with connected(run.config.compute), open(os.devnull, "w") as nowhere:
        shard(run, nowhere)
        fit(run)
        respond(run, queries, NAME)
        recover_influence(run, NAME)
        exact = Run(folder, changes={"attribute.mode": "exact"})
        attribute(exact, queries, NAME, nowhere)
        select(exact, [NAME], f"{folder}/chosen")


def data_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every data file of a run by its name; markers and records hold times."""
    paths = (path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def told(found: Round) -> str:
    """A round in a line."""
    struck = ", ".join(f"{kind} in {stage}" for kind, stage in found.strikes) or "nothing was struck"
    end = "equal" if found.equal else found.failure or f"{len(found.different)} files differ: {found.different[:5]}"
    return f"{struck}; {found.drivers} driver(s), {found.seconds:.0f} s; {end}"


def counted(rounds: list[Round]) -> dict[str, int]:
    """How often what was struck in which stage."""
    return dict(sorted(Counter(f"{kind} in {stage}" for each in rounds for kind, stage in each.strikes).items()))


def _driver(root: Path, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    code = "import sys; from stride_ray.evaluate.chaos import drive; drive(*sys.argv[1:])"
    with open(f"{folder}.log", "ab") as log:
        command = [sys.executable, "-c", code, str(root), str(folder)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _round(
    root: Path,
    folder: Path,
    rng: random.Random,
    length: float,
    wanted: dict[str, str],
    cluster: Cluster,
    nodes: list[Any],
    environment: dict[str, str],
) -> Round:
    """Start the driver, strike at the drawn moments, start it again where it died, compare."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.log").unlink(missing_ok=True)
    moments = sorted(rng.uniform(0, length) for _ in range(rng.randint(1, STRIKES)))
    if rng.random() < 0.5:
        moments.append(moments[-1])  # twice in a row
    began, driver, drivers, strikes, failure = time.monotonic(), _driver(root, folder, environment), 1, [], ""
    back = list[float]()  # when removed nodes are replaced
    while not failure:
        passed = time.monotonic() - began
        if back and passed > back[0]:
            back.pop(0)
            nodes.append(_node(cluster))
        if driver.poll() is not None:
            if driver.returncode == 0:
                break
            if driver.returncode > 0:
                failure = f"the driver ended with {driver.returncode}, see {folder}.log"
            driver, drivers = _driver(root, folder, environment), drivers + 1
        if moments and passed > moments[0]:
            moments.pop(0)
            kind = rng.choice(KINDS)
            if _strike(kind, rng, driver, cluster, nodes):
                strikes.append((kind, _stage(folder)))
            if kind == NODE and len(nodes) + len(back) < NODES:
                back.append(passed + rng.uniform(0, ABSENT))
        if passed > LIMIT:
            failure = f"it did not end within {LIMIT:.0f} s, see {folder}.log"
        time.sleep(0.02)
    if driver.poll() is None:
        driver.kill()
    driver.wait()
    for _ in back:
        nodes.append(_node(cluster))
    files = data_files(folder)
    different = tuple(sorted({name for name, _ in files.items() ^ wanted.items()}))
    found = Round(tuple(strikes), drivers, time.monotonic() - began, different, failure)
    if found.equal:
        shutil.rmtree(folder)
        Path(f"{folder}.log").unlink()
    return found


def _strike(kind: str, rng: random.Random, driver: subprocess.Popen[bytes], cluster: Cluster, nodes: list[Any]) -> bool:
    """Kill one; False where there is none of the kind."""
    if kind == DRIVER:
        driver.kill()
        driver.wait()
        return True
    if kind == NODE:
        if not nodes:
            return False
        cluster.remove_node(nodes.pop(rng.randrange(len(nodes))), allow_graceful=False)
        return True
    # Workers of this cluster are children of its raylets, which this process has started.
    mine = psutil.Process().children(recursive=True)
    busy = [each for each in mine if _title(each).startswith("ray::") and "IDLE" not in _title(each)]
    if not busy:
        return False
    rng.choice(busy).kill()
    return True


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _stage(folder: Path) -> str:
    begun = [stage for stage, name in STAGES.items() if (folder / name).exists()]
    if (folder / "chosen").exists():
        return "select"
    return begun[-1] if begun else "start"
