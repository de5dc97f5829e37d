"""STRIDE's settings as methods of the comparison, each through the real pipeline in its own run directory.

``VARIANTS`` lists them; adding a variant takes one line. A variant's scores are what a user gets from the commands:
blocks, fitted operators if the setting needs them, and the published influence table, with zero for blocks not listed.
"""

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.attribution.attribute import read_influence, write_tables
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.documents import TokenizedDocument
from stride_ray.corpus.queries import SCHEMA, row
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.baselines.gradient import astra
from stride_ray.evaluate.baselines.problem import AVERAGED, Texts, spaced, standardised
from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.operators.fit import fit
from stride_ray.runtime.config import Config, digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig, SolveConfig
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers

# The query set's name in each run, and the folder of the run that shards the pool for all variants.
QUERIES, BLOCKS = "queries", "blocks"


@dataclass(frozen=True)
class Variant:
    """One setting of STRIDE.

    Attributes:
        name: as printed in tables.
        changes: options that differ from the defaults, ``{"section.key": value}``.
        default: the default configuration.
        paper: the method as published in the paper.
        plus: a baseline whose scores are added; both are standardised per query first.
        checkpoints: at most how many checkpoints of training are measured, in place of one model on the way to the
            end; their scores are divided by their standard deviation and added.
        ablation: only included if ablations are requested.
        note: a one-line description.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    default: bool = False
    paper: bool = False
    plus: str = ""
    checkpoints: int = 0
    ablation: bool = False
    note: str = ""

    @property
    def slug(self) -> str:
        """The name in files."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def identity(self) -> str:
        """Hash of the whole configuration, sixteen hexadecimal digits, without ``compute`` options and ``plus``."""
        flat = {"checkpoints": self.checkpoints} if self.checkpoints else {}
        flat |= Config().updated(self.changes, self.name).flat()
        return digest({key: value for key, value in flat.items() if not key.startswith("compute.")})


# The published method; with these steps it takes minutes on two cores for 1,600 blocks and 100 queries.
PUBLISHED: dict[str, Any] = {
    "operators.form": "gate",
    "operators.rank": 16,
    "fit.method": "train",
    "fit.steps": 200,
    "respond.mode": "exact",
    "recover.row_scaling": False,
    "recover.penalty_ratio": 0.1,
    "recover.nonnegative": False,
    "attribute.candidates": 0,
}
ABLATION_STEPS = 100
TRAINED: dict[str, Any] = {
    **PUBLISHED,
    "operators.form": "matrix",
    "fit.steps": ABLATION_STEPS,
    "respond.mode": "linear",
}


def _ablation(name: str, **changes: Any) -> Variant:
    note = (
        f"trained with few steps ({ABLATION_STEPS}), linear responses; else form matrix, rank 16, stability KL, split "
        "0.62, regular membership"
    )
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return Variant(f"STRIDE trained, {name}", {**TRAINED, **given}, ablation=True, note=note)


# The paper's operator forms, fitted in closed form: one pass, Lasso, no rescoring.
FORMS: dict[str, Any] = {
    "operators.form": "logit",
    "recover.penalty_ratio": 0.1,
    "recover.nonnegative": False,
    "attribute.candidates": 0,
}
EVERY_MAP: dict[str, Any] = {"attribute.exact": True, "operators.sites": "all"}
FURTHER: dict[str, Any] = {"solve.steps": astra.FURTHER.steps, "solve.tokens": astra.FURTHER.tokens}
SUBSETS: dict[str, Any] = {"operators.rows": "subsets", "operators.budget_gb": 0.0232, "attribute.candidates": 0}


def _exact(name: str, **changes: Any) -> Variant:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return Variant(
        f"STRIDE exact, {name}", {"attribute.exact": True, **given}, ablation=True, note="every block exactly"
    )


def _closed_form_ablation(name: str, **changes: Any) -> Variant:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    note = "closed-form operators, one pass, Lasso; what faster or slower responses and forms do to accuracy"
    return Variant(f"STRIDE, {name}", {**FORMS, **given}, ablation=True, note=note)


VARIANTS: tuple[Variant, ...] = (
    Variant("STRIDE", default=True, note="one-bit operators at every site, 13 candidates exact; no option turned"),
    Variant("STRIDE exact", {"attribute.exact": True}, note="every block exactly, a pass over the pool a batch"),
    Variant("STRIDE exact, every map", EVERY_MAP, note="every block exactly, at every linear map"),
    Variant("STRIDE, estimates alone", {"attribute.candidates": 0}, note="no candidate is rescored"),
    Variant("STRIDE, subsets", SUBSETS, note="K = 1000 operators of subsets in 25 MB, Lasso; no candidate is rescored"),
    Variant(
        "STRIDE, subsets, 100 candidates", {**SUBSETS, "attribute.candidates": 100}, ablation=True, note="rescored"
    ),
    Variant("STRIDE, logit", FORMS, note="closed-form operators in logit space, Lasso"),
    Variant("STRIDE + TF-IDF", plus="tfidf", note="standardised sum"),
    Variant("STRIDE as published", PUBLISHED, paper=True, note="rank-16 gates, 200 steps of the trained loop"),
    _ablation("base"),
    _ablation("stability logit penalty", fit__stability_form="logit_penalty"),
    _ablation("stability hidden norm", fit__stability_form="hidden_norm"),
    _ablation("no stability", fit__stability=0.0),
    _ablation("no linearity", fit__linearity=0.0),
    _ablation("rank 4", operators__rank=4),
    _ablation("rank 64", operators__rank=64),
    _ablation("split 0.25", model__split=0.25),
    _ablation("split 0.9", model__split=0.9),
    _ablation("Bernoulli membership", membership__form="bernoulli"),
    _exact("last half of the layers", operators__layers=0.5),
    _exact("last quarter of the layers", operators__layers=0.25),
    _exact("bfloat16", model__dtype="bfloat16"),
    _exact("unsolved", solve__steps=0),
    _exact("solved further", **FURTHER),
    _exact("every map, solved further", **EVERY_MAP, **FURTHER),
    *(
        Variant(
            f"STRIDE exact, over checkpoints{f', damping x {factor}' if factor > 1 else ''}",
            {
                "attribute.exact": True,
                "attribute.negative_scale": 1.0,
                "solve.damping": SolveConfig().damping * factor,
            },
            checkpoints=AVERAGED,
            ablation=True,
            note=f"a run at each of {AVERAGED} checkpoints of training, negative scores whole",
        )
        for factor in (1, 10, 100)
    ),
    Variant("STRIDE, unsolved", {"solve.steps": 0}, ablation=True, note="the Kronecker factors alone"),
    *(
        Variant(
            f"{name}, negative scores whole, damping x {factor}",
            {**changes, "solve.damping": SolveConfig().damping * factor, "attribute.negative_scale": 1.0},
            ablation=True,
            note="for classifiers trained for many epochs",
        )
        for name, changes in (("STRIDE", {}), ("STRIDE exact", {"attribute.exact": True}))
        for factor in (1, 10, 100)
    ),
    *(
        Variant(
            f"STRIDE, {size} kB a block, {candidates} candidates",
            {
                "operators.rows": "blocks",
                "operators.budget_gb": size * 1e3 * 1600 / 2**30,
                "attribute.candidates": candidates,
            },
            ablation=True,
            note="what bytes and candidates do to accuracy; sizes are for a pool of 1,600 blocks",
        )
        for size in (0.3, 1, 5, 10, 20, 48)
        for candidates in (0, 10, 25, 100, 400)
    ),
    *(
        Variant(
            f"STRIDE, subsets of {size} kB, {candidates} candidates",
            {**SUBSETS, "operators.budget_gb": size * 1e6 / 2**30, "attribute.candidates": candidates},
            ablation=True,
            note="K = 1000",
        )
        for size in (1, 5, 20, 100)
        for candidates in (0, 100)
    ),
    _closed_form_ablation("logit, exact responses", respond__mode="exact"),
    _closed_form_ablation("matrix, rank 16", operators__form="matrix", operators__rank=16),
    _closed_form_ablation(
        "matrix, rank 16, exact responses", operators__form="matrix", operators__rank=16, respond__mode="exact"
    ),
    _closed_form_ablation("gate, rank 16", operators__form="gate", operators__rank=16),
)


def shard_pool(benchmark: Benchmark, runs: Store, compute: ComputeConfig) -> None:
    """Shard the benchmark's pool into ``runs``/blocks; every variant's run copies it.

    Raises:
        StrideError: as shard, or if the blocks are not the pool's rows one by one.
    """
    runs.remove(BLOCKS)
    run = Run(f"{runs.url}/{BLOCKS}", changes=settings(benchmark, runs, compute, {}))
    shard(run)
    check_blocks(Blocks(run.stage("blocks").store), benchmark)


def score(
    benchmark: Benchmark, variant: Variant, runs: Store, compute: ComputeConfig, checkpoints: Sequence[str] = ()
) -> tuple[np.ndarray, int, str]:
    """Score one variant in its own run under ``runs``, replacing an existing run.

    Args:
        benchmark: its pool was sharded by ``cut_pool``.
        variant: the setting; ``plus`` is left to the caller.
        runs: the folder of all runs.
        compute: where to run.
        checkpoints: folders of models during training, in order, for a variant that is measured there.

    Returns:
        (Q, N) float32 influence, zero for pairs not in the table; the workers' largest resident memory in MiB, times
        the number of workers; and remarks.

    Raises:
        StrideError: as fit and answer, or if the blocks are not the pool's rows.
    """
    if variant.checkpoints:
        return _score_over_checkpoints(benchmark, variant, runs, compute, checkpoints)
    runs.remove(variant.slug)
    changes, remarks = dict(variant.changes), []
    n_blocks = len(benchmark.blocks)
    settled = Config().updated(changes)
    of_subsets = settled.operators.form != "sites" or settled.operators.rows == "subsets"
    if of_subsets and n_blocks < settled.membership.subsets:
        changes["membership.subsets"] = n_blocks
        remarks.append(f"{n_blocks} subsets, as many as blocks")
    run = Run(f"{runs.url}/{variant.slug}", changes=settings(benchmark, runs, compute, changes))
    copy_folder(runs.child(f"{BLOCKS}/blocks"), run.store.child("blocks"))
    check_blocks(Blocks(run.stage("blocks").store), benchmark)
    if not run.config.attribute.exact and not fit(run)["learned"]:
        remarks.append("the fit says that it learned nothing")
    write_tables(run, query_table(benchmark.queries), QUERIES)
    failed = [each for each in read_influence(run, QUERIES, "recovery").to_pylist() if each["status"] != "ok"]
    if failed:
        remarks.append(f"{len(failed)} queries failed and count as zeros: {failed[0]['error']}")
    found = dense(read_influence(run, QUERIES), len(benchmark.queries), n_blocks)
    return found, peak_mb(run) * allocate_workers(compute, n_blocks).workers, "; ".join(remarks)


def _score_over_checkpoints(
    benchmark: Benchmark, variant: Variant, runs: Store, compute: ComputeConfig, folders: Sequence[str]
) -> tuple[np.ndarray, int, str]:
    """``score`` at ``variant.checkpoints`` of the folders, evenly spaced and with the last."""
    total = np.zeros((len(benchmark.queries), len(benchmark.blocks)))
    peaks, remarks = list[int](), dict[str, None]()
    for folder in spaced(folders, variant.checkpoints):
        there = {"model.path": folder, "model.start": ""}
        one = replace(variant, checkpoints=0, changes={**variant.changes, **there})
        found, peak, remark = score(benchmark, one, runs, compute)
        total += standardised(found)
        peaks.append(peak)
        remarks |= {remark: None} if remark else {}
    return total.astype(np.float32), max(peaks), "; ".join(remarks)


def settings(benchmark: Benchmark, runs: Store, compute: ComputeConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Build a run's options: the benchmark's files, where to run, and a variant's changes."""
    where = {f"compute.{name}": value for name, value in vars(compute).items()}
    columns = ("token_ids",) if benchmark.blocks.lengths is None else ("token_ids", "loss_mask")
    corpus = {
        "corpus.input": [f"{benchmark.url}/pool.parquet"],
        "corpus.columns": {name: name for name in columns},
        "corpus.layout": "split",
        "corpus.block_tokens": max(2, benchmark.blocks.ids.shape[1]),
        "corpus.tokenizer": _tokenizer(benchmark, runs),
    }
    model = {"model.path": benchmark.model, "model.start": benchmark.start or benchmark.initial or ""}
    return {**corpus, **model, **where, **changes}


def _tokenizer(benchmark: Benchmark, runs: Store) -> str:
    """Return the model's own tokenizer, or a stand-in with a word per id, made once, if that lacks some pool ids.

    The pool already consists of ids, so words are only displayed; but blocks record the tokenizer they were cut with.
    """
    largest = int(benchmark.blocks.ids.max())
    try:
        known = load_tokenizer(benchmark.model).get_vocab()
    except StrideError:
        known = {}
    if max(known.values(), default=-1) >= largest:
        return benchmark.model
    if not runs.exists("tokenizer/tokenizer.json"):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        print(
            f"{benchmark.model} has no tokenizer that knows token {largest}; its ids stand in for words.",
            file=sys.stderr,
        )
        taken = set(known.values())
        words = {**known, **{f"<{i}>": i for i in range(largest + 1) if i not in taken}}
        stand_in = Tokenizer(models.WordLevel(words, unk_token=min(words, key=words.__getitem__)))
        with tempfile.TemporaryDirectory() as folder:
            PreTrainedTokenizerFast(tokenizer_object=stand_in).save_pretrained(folder)
            copy_folder(Store(str(Path(folder).resolve())), runs.child("tokenizer"))
    return f"{runs.url}/tokenizer"


def copy_folder(source: Store, target: Store) -> None:
    """Copy all files of a folder, including subfolders."""
    for path in sorted(source.fs.find(source.root)):
        name = str(path).removeprefix(f"{source.root}/")
        target.write(name, source.read(name))


def check_blocks(blocks: Blocks, benchmark: Benchmark) -> None:
    """Raise StrideError unless every block i holds the tokens of pool row i."""
    given = benchmark.blocks
    if len(blocks) != len(given):
        raise StrideError(
            f"{blocks.store.display_url('')} has {len(blocks)} blocks, and the pool has {len(given)} rows; the first "
            f"rejected row: {blocks.manifest['rejects'][:1]}."
        )
    batch, width = blocks.batch(np.arange(len(blocks))), given.ids.shape[1]
    different = (batch.ids[:, :width] != given.ids).any(1) | (batch.mask[:, :width] != given.mask).any(1)
    different |= batch.ids[:, width:].any(1) | batch.mask[:, width:].any(1)
    if different.any():
        raise StrideError(
            f"{blocks.store.display_url('')}: block {int(different.argmax())} does not hold the tokens of that row."
        )


def query_table(queries: Texts) -> pa.Table:
    """Convert queries to the pipeline's table (queries.SCHEMA), named q0, q1, …."""
    names = [f"q{number}" for number in range(len(queries))]
    rows = []
    for number, name in enumerate(names):
        tokens = queries.tokens(number)
        mask = None if queries.lengths is None else queries.mask[number, : len(tokens)]
        rows.append(row(name, TokenizedDocument(name, name, tokens, mask)))
    return pa.Table.from_pylist(rows, SCHEMA)


def dense(table: pa.Table, n_queries: int, n_blocks: int) -> np.ndarray:
    """(Q, N) float32 from the influence table of queries q0, q1, …; zero where it has no row."""
    names = pa.array([f"q{number}" for number in range(n_queries)])
    found = np.zeros((n_queries, n_blocks), dtype=np.float32)
    rows = pc.index_in(table["query_id"], names).to_numpy()
    found[rows, table["ordinal"].to_numpy()] = table["influence"].to_numpy()
    return found


def standardised_sum(*scores: np.ndarray) -> np.ndarray:
    """Sum of score matrices, each standardised over a query's blocks to mean 0 and deviation 1: (Q, N) float32."""
    total = np.zeros(scores[0].shape)
    for each in scores:
        centred = each - each.mean(1, keepdims=True, dtype=np.float64)
        total += centred / np.maximum(centred.std(1, keepdims=True), 1e-30)
    return total.astype(np.float32)


def peak_mb(run: Run) -> int:
    """Largest resident memory, in MiB, in the run's done markers; 0 if none records it."""
    names = [str(path).removeprefix(f"{run.store.root}/") for path in run.store.fs.find(run.store.root)]
    markers = run.store.read_jsons([name for name in names if "/_done/" in name and name.endswith(".json")])
    return max((marker.get("peak_mb", 0) for marker in markers), default=0)
