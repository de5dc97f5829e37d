"""Time and memory as the pool grows: the whole pipeline on synthetic text of any size, and shard against a peer.

Blocks are short and the model is tiny with random weights, so that a laptop can hold a million blocks: this measures
how stages scale, not the speed of a large model (see ``speed``). Every size runs in its own process.
"""

import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.speed import Shape, random_model
from stride_ray.attribution.attribute import attribute
from stride_ray.cli.plan import STAGES, plan
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.shard import shard
from stride_ray.models.builtin.toy import VOCABULARY, train_tokenizer
from stride_ray.operators.fit import fit
from stride_ray.runtime.costs import COST_FILE
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

BLOCK_TOKENS, SUBSETS, DEGREE, QUERIES, ASKED = 32, 1000, 10, 64, "asked"
# Number of synthetic words, range of their letters, words per document, documents per file.
WORDS, LETTERS, DOCUMENT, FILE = 2000, (2, 9), 200, 20_000
SHAPE = Shape(layers=2, split=1, width=32, inner=64, heads=2, shared=2, vocabulary=VOCABULARY)
_TOO_MANY = 1.15  # tokens of text over tokens needed for the blocks


def words(seed: int = 0) -> np.ndarray:
    """Generate synthetic words, (WORDS,) str."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return np.array(["".join(rng.choice(letters, rng.integers(*LETTERS))) for _ in range(WORDS)])


def write_text(folder: Path, tokens: int, tokenizer: Any) -> None:
    """Write JSON Lines documents of synthetic Zipf-distributed words, at least ``tokens`` tokens, unless complete."""
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known, rng = words(), np.random.default_rng(1)
    odds = 1 / np.arange(1, WORDS + 1)
    odds /= odds.sum()
    sample = " ".join(rng.choice(known, 20_000, p=odds))
    per_document = DOCUMENT * len(tokenizer(sample)["input_ids"]) / 20_000
    documents = int(_TOO_MANY * tokens / per_document) + 1
    for index, start in enumerate(range(0, documents, FILE)):
        drawn = rng.choice(known, (min(FILE, documents - start), DOCUMENT), p=odds)
        lines = (json.dumps({"text": " ".join(row)}) + "\n" for row in drawn)
        (folder / f"part-{index:04d}.jsonl").write_text("".join(lines), "utf-8")
    (folder / "complete").touch()


def prepare(root: Path) -> Any:
    """Make tokenizer, tiny random model and queries; returns the tokenizer."""
    root.mkdir(parents=True, exist_ok=True)
    known, rng = words(), np.random.default_rng(2)
    train_tokenizer((" ".join(rng.choice(known, DOCUMENT)) for _ in range(500)), root / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    if not (root / "model" / "config.json").exists():
        random_model(SHAPE, "cpu", "float32").model.save_pretrained(root / "model")
        tokenizer.save_pretrained(root / "model")
    rng = np.random.default_rng(3)  # a second run does not draw for the tokenizer
    queries = [{"id": str(i), "text": " ".join(rng.choice(known, 10))} for i in range(QUERIES)]
    (root / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries), "utf-8")
    return tokenizer


def run_size(root: str, blocks: int) -> None:
    """Run all stages in both modes on about ``blocks`` blocks; finished stages are kept."""
    base, run = Path(root), Path(root) / f"run-{blocks}"
    options = {
        "corpus.input": [str(base / f"text-{blocks}" / "*.jsonl")],
        "corpus.tokenizer": str(base / "model"),
        "corpus.block_tokens": BLOCK_TOKENS,
        "corpus.shard_mb": 8,
        "model.path": str(base / "model"),
        "membership.subsets": SUBSETS,
        "membership.degree": DEGREE,
    }
    made = Run(str(run), changes=options)
    shard(made)
    queries = str(base / "queries.jsonl")
    fit(made)
    attribute(made, queries, ASKED, sys.stderr)
    attribute(Run(str(run), changes={"attribute.exact": True}), queries, ASKED, sys.stderr)


def measure(folder: str, sizes: list[int]) -> dict[str, Any]:
    """Run every size and report the growth between sizes, and the predictions of ``plan`` from the smallest.

    Returns:
        ``runs``: per size, N and per stage seconds and peak MB of a worker and of the driver; ``growth``: per step and
        stage, ratios of seconds and of worker memory; ``plan``: per larger size and stage, predicted over real seconds.
    """
    root = Path(folder).resolve()
    tokenizer = prepare(root)
    runs = []
    for size in tqdm(sorted(sizes), desc="scale", unit=" sizes", file=sys.stderr):
        write_text(root / f"text-{size}", size * BLOCK_TOKENS, tokenizer)
        code = "import sys; from benchmarks.scale import run_size; run_size(sys.argv[1], int(sys.argv[2]))"
        if subprocess.run([sys.executable, "-c", code, str(root), str(size)]).returncode:
            raise StrideError(f"The run of {size} blocks failed; what it said is above.")
        runs.append(_found(root / f"run-{size}"))
    steps = list(itertools.pairwise(runs))
    growth = [
        {stage: {key: after[stage][key] / before[stage][key] for key in ("seconds", "worker_mb")} for stage in STAGES}
        for before, after in ((one["stages"], two["stages"]) for one, two in steps)
    ]
    foretold = []
    for found in runs[1:]:
        pilot = Run(str(root / f"run-{min(sizes)}"))
        expected = plan(pilot, ASKED, found["blocks"], QUERIES, found["workers"])
        ratios = {each.stage: each.seconds / found["stages"][each.stage]["seconds"] for each in expected}
        whole = sum(each.seconds for each in expected) / sum(each["seconds"] for each in found["stages"].values())
        foretold.append({"blocks": found["blocks"], **ratios, "together": whole})
    return {"runs": runs, "growth": growth, "plan": foretold}


def _found(folder: Path) -> dict[str, Any]:
    run, stages, workers = Run(str(folder)), dict[str, Any](), 1
    for stage, named in STAGES.items():
        cost = run.stage(stage, ASKED if named else "").store.read_json(COST_FILE)
        workers = max(workers, *(each["workers"] for each in cost["phases"].values()))
        worker_mb = max(each["peak_mb"] for each in cost["phases"].values())
        stages[stage] = {"seconds": cost["wall"], "worker_mb": worker_mb, "driver_mb": cost["driver_mb"]}
    return {"blocks": len(Blocks(run.stage("blocks").store)), "workers": workers, "stages": stages}


def table(found: dict[str, Any]) -> str:
    """Format the result as Markdown."""
    lines = ["| blocks | stage | seconds | × the size before | worker MB | × | driver MB | foretold / real |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for index, run in enumerate(found["runs"]):
        for stage, each in run["stages"].items():
            grown = found["growth"][index - 1][stage] if index else {"seconds": 1.0, "worker_mb": 1.0}
            foretold = f"{found['plan'][index - 1][stage]:.2f}" if index else ""
            lines.append(
                f"| {run['blocks']:,} | {stage} | {each['seconds']:.1f} | {grown['seconds']:.2f} | {each['worker_mb']} "
                f"| {grown['worker_mb']:.2f} | {each['driver_mb']} | {foretold} |"
            )
    return "\n".join(lines)


def measure_shard(folder: str, blocks: int, block_tokens: int, workers: int) -> dict[str, Any]:
    """Tokens per second from JSON Lines to blocks in Parquet: shard, and ``datasets.map`` with as many processes.

    Both use the same tokenizer, join documents by its end-of-text token and cut them into blocks. For comparison, the
    tokenizer alone is also timed, called with lists of texts in as many processes.
    """
    import datasets

    root = Path(folder).resolve()
    tokenizer = prepare(root)
    text = root / f"text-{blocks}x{block_tokens}"
    write_text(text, blocks * block_tokens, tokenizer)
    files = sorted(str(path) for path in text.glob("*.jsonl"))
    end = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        stream = [i for ids in tokenizer(batch["text"])["input_ids"] for i in (*ids, end)]
        whole = len(stream) // block_tokens * block_tokens
        return {"token_ids": [stream[at : at + block_tokens] for at in range(0, whole, block_tokens)]}

    def ours() -> int:
        shutil.rmtree(root / "shard", ignore_errors=True)
        options = {
            "corpus.input": files,
            "corpus.tokenizer": str(root / "tokenizer"),
            "corpus.block_tokens": block_tokens,
            "compute.workers": workers,
        }
        return int(shard(Run(str(root / "shard"), changes=options))["tokens"])

    def theirs() -> int:
        shutil.rmtree(root / "peer", ignore_errors=True)
        loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(root / "peer"))
        mapped = loaded.map(encode, batched=True, num_proc=workers, remove_columns=["text"])
        mapped.to_parquet(str(root / "peer" / "blocks.parquet"))
        return len(mapped) * block_tokens

    rates = {}
    for name, work in (("shard", ours), ("datasets", theirs)):
        began = time.perf_counter()
        rates[name] = work() / (time.perf_counter() - began)
    shutil.rmtree(root / "peer")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as processes:
        alone = processes.map(_tokenizer_rate, [str(root / "tokenizer")] * workers, itertools.cycle(files[:workers]))
        rates["tokenizer"] = sum(alone)
    return {
        "blocks": blocks,
        "block_tokens": block_tokens,
        "workers": workers,
        "tokens_per_second": rates,
        "ratio_datasets": rates["shard"] / rates["datasets"],
        "ratio_tokenizer": rates["shard"] / rates["tokenizer"],
    }


def _tokenizer_rate(folder: str, file: str) -> float:
    """Tokens per second of a tokenizer on a file's texts, a thousand at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in Path(file).read_text("utf-8").splitlines()]
    tokenizer(texts[:1000])
    began = time.perf_counter()
    tokens = sum(sum(map(len, tokenizer(texts[at : at + 1000])["input_ids"])) for at in range(0, len(texts), 1000))
    return tokens / (time.perf_counter() - began)
