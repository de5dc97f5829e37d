"""Benchmarks: the package's claims about speed and memory, measured beside the tools one would use instead.

`recover` times the recovery of influence against scikit-learn's Lasso and celer, one thread each, on the same problem,
with the same penalty and the same duality gap. It prints a table and one JSON object as its last line.

`select` generates synthetic influence tables of any number of rows in a folder (kept: a second run only selects), ranks
their documents, selects from them, writes the manifest, and prints seconds and peak memory.

`respond` and `fit` time responses and passes over blocks on random weights of a model's shape, on CPU or GPU, beside
their bounds: plain matrix products, a loop through the whole model, a forward pass.

`loop` fits operators in one pass and by the paper's trained loop, run as long as it needs, on an accuracy benchmark.

`scale` runs all stages on synthetic text at several sizes: seconds and memory per stage, their growth, and the
prediction of `stride-ray plan` from the smallest size. `shard` is compared with datasets.map, with the same tokenizer.

`recall` extends an accuracy benchmark's pool with blocks of other texts and measures how many of the exact best blocks
are among the candidates of estimates and of TF-IDF, as the pool grows.

`serve` loads a fitted run into the service and asks it questions, by more and more clients: seconds to an answer,
memory, and what a replica's death loses.

`facts` trains a small model on text with invented facts, each in one document and one epoch, and counts how often the
fact's document, sentence and epoch are found, beside BM25.

`tasks` writes six instruction tasks and trains a small base model on other text, for jobs/instruction_lds.py and then
jobs/select_domains.py: selection by task, with unigram F1.

`chaos` injects random failures into runs on a cluster of several nodes and compares their bytes with an undisturbed
run's: nodes are removed ungracefully, workers and drivers killed, in every stage, sometimes twice in a row. The exit
status is 0 only if every round ended with equal bytes. A second run does the missing rounds.

`fuzz` corrupts inputs, queries, configurations and the files of a run at random, and counts what should not happen: a
traceback, a loss that is not reported. The exit status is 0 only if there was none.

`peers` runs bergson and a LoGRA beside ours on an accuracy benchmark's model, pool and queries, in an environment of
their own that it creates: end-to-end seconds, memory, bytes stored, LDS.

    python -m benchmarks recall --benchmark continued --texts texts/ --blocks 1600,6400,25600 --folder /tmp/recall
    python -m benchmarks serve --run quickstart/run --queries quickstart/prompts.jsonl --clients 1,4,16
    python -m benchmarks facts --folder /tmp/facts --texts quickstart/corpus
    python -m benchmarks tasks --gsm8k gsm8k_train.jsonl.gz --folder /tmp/tasks
    python -m benchmarks recover --blocks 1000000
    python -m benchmarks recover --blocks 100000000 --baseline-queries 0
    python -m benchmarks select --rows 100000000 --folder /tmp/rows
    python -m benchmarks scale --blocks 1e4,1e5,1e6 --folder /tmp/scale
    python -m benchmarks shard --blocks 1e6 --folder /tmp/scale
    python -m benchmarks peers --benchmark continued --folder /tmp/peers --multiples 1,4,16
    python -m benchmarks loop --benchmark continued --folder /tmp/loop --form matrix
    python -m benchmarks respond --shape 135m --subsets 1000 --dtype bfloat16 --device cuda
    python -m benchmarks fit --shape 286m --tokens 512 --blocks 256 --dtype bfloat16 --device cuda
    python -m benchmarks solve --shape small --blocks 32 --batch-tokens 8192
    python -m benchmarks chaos --rounds 50 --out FOLDER [--seed 0]
    python -m benchmarks fuzz --target inputs --minutes 10 --folder /tmp/fuzz
    python -m benchmarks fuzz --target store --minutes 10 --folder /tmp/fuzz --example quickstart/run
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from benchmarks.lasso import benchmark_recover
from benchmarks.output import print_figures, print_table
from stride_ray.cli.arguments import count, counts


def benchmark_select(args: argparse.Namespace) -> int:
    """Rank and select synthetic documents; print a summary and the JSON line."""
    import tempfile

    from benchmarks.selection_rows import make_tables
    from stride_ray.runtime.config import Config
    from stride_ray.runtime.memory import peak_bytes, resident_bytes, restart_peak
    from stride_ray.runtime.storage import Store
    from stride_ray.selection.choice import GreedyChooser, reasons, write_manifest
    from stride_ray.selection.database import Database
    from stride_ray.selection.ranking import batches, rank_documents

    options = Config().updated({"select.by": args.by, "select.tokens": 0.2}).select
    store = Store(args.folder)
    started = time.perf_counter()
    target, pool = make_tables(store, args.rows, args.documents)
    made = time.perf_counter()
    restart_peak()
    before = resident_bytes()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch, Database(scratch) as database:
        ordered = rank_documents(database, [target], (store, pool), (), options, 0)
        ranked = time.perf_counter()
        best = GreedyChooser(options, args.documents, args.documents * 1000, 0)
        kept, _ = write_manifest(best, batches(ordered), reasons(options), 1, store, database)
        spilled = sum(os.path.getsize(os.path.join(scratch, name)) for name in os.listdir(scratch) if "." in name)
    done = time.perf_counter()
    summary = {
        "rows": args.rows,
        "documents": args.documents,
        "by": args.by,
        "kept": kept.documents,
        "table_bytes": sum(store.fs.size(store.path(name)) for name in target.tables),
        "scratch_bytes": spilled,
        "seconds_making": made - started,
        "seconds_ranking": ranked - made,
        "seconds_choosing": done - ranked,
        "resident_before": before,
        "peak_bytes": peak_bytes(),
    }
    print(
        f"{args.rows:,} rows, {args.documents:,} documents: ranked in {ranked - made:.0f} s, chosen in "
        f"{done - ranked:.0f} s, peak memory {summary['peak_bytes'] / 2**20:.0f} MiB (2048 are allowed)"
    )
    print(json.dumps(summary))
    return 0 if summary["peak_bytes"] <= 2**31 else 1


def benchmark_speed(args: argparse.Namespace) -> int:
    """Time responses or passes over the pool; print the figures and the JSON line."""
    from benchmarks.speed import Setting, measure_passes, measure_respond, measure_solve
    from stride_ray.runtime.memory import retain_freed_memory

    retain_freed_memory()  # as every worker does
    given = {key: value for key, value in vars(args).items() if key not in ("command", "run")}
    measures = {"respond": measure_respond, "fit": measure_passes, "solve": measure_solve}
    return print_figures(measures[args.command](Setting(**given)))


def benchmark_tasks(args: argparse.Namespace) -> int:
    """Write the tasks and train the base model; print where they are."""
    from benchmarks.tasks import write_tasks

    print(write_tasks(args.gsm8k, args.folder, args.per_task, args.seed))
    return 0


def benchmark_loop(args: argparse.Namespace) -> int:
    """Fit in one pass and by loops; print the table and the JSON line."""
    from benchmarks.loop import measure_loop, table
    from stride_ray.cli.arguments import assignment

    changes = dict(assignment(each) for each in args.set)
    found = measure_loop(args.benchmark, args.folder, args.form, args.steps, args.most_steps, changes)
    return print_table(table(found), found)


def benchmark_scale(args: argparse.Namespace) -> int:
    """Run the pipeline at several sizes; print the table and the JSON line."""
    from benchmarks.scale import measure, table

    found = measure(args.folder, args.blocks)
    return print_table(table(found), found)


def benchmark_shard(args: argparse.Namespace) -> int:
    """Compare shard with datasets.map; print the rates and the JSON line."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many cores as workers, not more
    from benchmarks.scale import measure_shard

    found = measure_shard(args.folder, args.blocks, args.tokens, args.workers)
    rates = found["tokens_per_second"].items()
    return print_table("\n".join(f"{name:12}{rate:>14,.0f} tokens a second" for name, rate in rates), found)


def benchmark_recall(args: argparse.Namespace) -> int:
    """Measure recall of the exact best blocks by pool size; print the table and the JSON line."""
    from benchmarks.recall import measure_recall, table

    found = measure_recall(args.benchmark, args.texts, args.folder, args.blocks, args.row_bytes)
    return print_table(table(found), found)


def benchmark_facts(args: argparse.Namespace) -> int:
    """Plant facts and look for them; print the table and the JSON line."""
    from benchmarks.facts import measure_facts, table

    found = measure_facts(args.folder, args.texts, args.facts, args.documents, args.epochs, args.repeats, args.seed)
    return print_table(table(found), found)


def benchmark_serve(args: argparse.Namespace) -> int:
    """Put the service under load; print the table and the JSON line."""
    from benchmarks.serving import measure_serving, table

    found = measure_serving(args.folder, args.queries, args.replicas, args.clients, args.requests)
    return print_table(table(found), found)


def benchmark_chaos(args: argparse.Namespace) -> int:
    """Run the chaos test; print a line per round, a table and the JSON line."""
    from benchmarks.chaos import chaos, counted

    rounds = chaos(args.out, args.rounds, args.seed)
    equal, strikes = sum(each.equal for each in rounds), counted(rounds)
    print("| struck | times |\n|---|---|")
    for name, times in strikes.items():
        print(f"| {name} | {times} |")
    print(f"{equal} of {len(rounds)} rounds ended with the undisturbed run's bytes.")
    seconds = [round(each.seconds) for each in rounds]
    print(json.dumps({"rounds": len(rounds), "equal": equal, "strikes": strikes, "seconds": seconds}))
    return int(equal < args.rounds)


def benchmark_fuzz(args: argparse.Namespace) -> int:
    """Corrupt and read; print the faults and the JSON line. Exits with 1 if there was a fault."""
    from benchmarks.fuzz import fuzz

    found = fuzz(args.target, args.folder, 60 * args.minutes, args.seed, args.example)
    lines = [f"{found.tried} corrupted files read, {found.refused} refused, {sum(found.faults.values())} faults"]
    print_table("\n".join([*lines, *(f"{n:6} × {what}" for what, n in found.faults.items())]), vars(found))
    return int(bool(found.faults))


def benchmark_peers(args: argparse.Namespace) -> int:
    """Run every tool; print the table and the JSON line."""
    from benchmarks.peers.measure import compare_peers, table

    found = compare_peers(args.benchmark, args.folder, args.multiples, [each for each in args.tools.split(";") if each])
    return print_table(table(found), found)


def main() -> int:
    """Parse the command line and run the requested benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("recover", help="recovery of influence against scikit-learn and celer")
    command.add_argument("--blocks", type=count, required=True, help="N, columns of M")
    command.add_argument("--subsets", type=count, default=1000, help="K")
    command.add_argument("--degree", type=count, default=10, help="d")
    command.add_argument("--queries", type=count, default=64, help="queries that ours solves")
    command.add_argument(
        "--baseline-queries", type=int, default=2, help="of those, that the others solve, who hold M; 0: none"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--ratio", type=float, default=0.195, help="λ/λ_max; the default leaves about 55 active")
    command.add_argument("--noise", type=float, default=0.3, help="sd of the noise over that of the planted response")
    command.add_argument("--gap", type=float, default=1e-9, help="duality gap over ½‖y−ȳ‖² that every solver reaches")
    command.set_defaults(run=benchmark_recover)
    command = commands.add_parser("select", help="selection from made-up influence tables of any size")
    command.add_argument("--rows", type=count, required=True, help="rows of influence")
    command.add_argument("--documents", type=count, default=5_000_000, help="in the pool")
    command.add_argument("--by", default="rank", choices=("rank", "mean", "share"))
    command.add_argument("--folder", required=True, help="for the tables and what spills; some 3 GB for 1e8 rows")
    command.set_defaults(run=benchmark_select)
    for name, what in (
        ("respond", "responses, exact and linear"),
        ("fit", "passes over blocks"),
        ("solve", "a query's solve"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--shape", default="small", choices=("small", "135m", "286m", "600m"), help="of the model")
        command.add_argument("--device", default="auto", help="auto, cpu or cuda")
        command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
        command.add_argument("--form", default="gate", choices=("gate", "matrix"), help="of the operators")
        command.add_argument("--rank", type=count, default=16, help="r")
        command.add_argument("--subsets", type=count, default=64, help="K")
        command.add_argument("--tokens", type=count, default=128, help="in a query and in a block")
        command.add_argument("--queries", type=count, default=4)
        command.add_argument("--blocks", type=count, default=64)
        command.add_argument("--batch-tokens", type=count, default=16384, help="in one forward")
        command.set_defaults(run=benchmark_speed)
    command = commands.add_parser("loop", help="the one-pass fit beside the trained loop, on an accuracy benchmark")
    command.add_argument("--benchmark", required=True, help="its folder")
    command.add_argument("--folder", required=True, help="what is made and measured stays: a second run goes on")
    command.add_argument("--form", default="matrix", choices=("gate", "matrix", "logit"), help="of the operators")
    command.add_argument("--steps", type=count, default=100, help="of the first loop; then twice as many, and so on")
    command.add_argument("--most-steps", type=count, default=1600, help="of the longest")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any option of the fits")
    command.set_defaults(run=benchmark_loop)
    command = commands.add_parser("scale", help="seconds and memory of all stages at several sizes of the pool")
    command.add_argument("--blocks", type=counts, default="1e4,1e5,1e6", help="sizes; the smallest is plan's pilot")
    command.add_argument("--folder", required=True, help="what is made stays: a second run goes on")
    command.set_defaults(run=benchmark_scale)
    command = commands.add_parser("shard", help="tokens a second beside datasets.map with the same tokenizer")
    command.add_argument("--blocks", type=count, default=1_000_000)
    command.add_argument("--tokens", type=count, default=512, help="in a block")
    command.add_argument("--workers", type=count, default=2)
    command.add_argument("--folder", required=True)
    command.set_defaults(run=benchmark_shard)
    command = commands.add_parser("recall", help="how many of the exact best blocks shortlists hold")
    command.add_argument("--benchmark", required=True, help="an accuracy benchmark's folder, local")
    command.add_argument("--texts", required=True, nargs="+", help="what its pool is extended with")
    command.add_argument("--blocks", type=counts, default="1600,6400,25600", help="sizes of the pool")
    command.add_argument("--row-bytes", type=counts, default="320,1250,5000,20000", help="of a block's operator")
    command.add_argument("--folder", required=True, help="what is made and measured stays: a second run goes on")
    command.set_defaults(run=benchmark_recall)
    command = commands.add_parser("facts", help="planted facts: document, sentence and epoch")
    command.add_argument("--folder", required=True, help="what is made stays: a second run goes on")
    command.add_argument("--texts", required=True, nargs="+", help="what they are planted into")
    command.add_argument("--facts", type=count, default=50, help="(default: 50)")
    command.add_argument("--documents", type=count, default=1000, help="without facts (default: 1000)")
    command.add_argument("--epochs", type=count, default=4, help="of the training (default: 4)")
    command.add_argument("--repeats", type=count, default=200, help="of a fact in its epoch (default: 200)")
    command.add_argument("--seed", type=int, default=0, help="(default: 0)")
    command.set_defaults(run=benchmark_facts)
    command = commands.add_parser("tasks", help="instruction tasks and a base model")
    command.add_argument("--gsm8k", required=True, help="its training rows, JSON Lines")
    command.add_argument("--folder", required=True, help="local; what is made stays")
    command.add_argument("--per-task", type=count, default=150, help="instructions (default: 150)")
    command.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    command.set_defaults(run=benchmark_tasks)
    command = commands.add_parser("serve", help="the service under load")
    command.add_argument("--run", dest="folder", required=True, help="run directory with operators at all sites")
    command.add_argument("--queries", required=True, help="JSON Lines, as attribute reads them")
    command.add_argument("--replicas", type=count, default=2, help="copies of the model (default: 2)")
    command.add_argument("--clients", type=counts, default="1,4,16", help="that ask at a time (default: 1,4,16)")
    command.add_argument("--requests", type=count, default=200, help="for each of these (default: 200)")
    command.set_defaults(run=benchmark_serve)
    command = commands.add_parser("peers", help="bergson and a LoGRA beside ours, from start to end")
    command.add_argument("--benchmark", required=True, help="an accuracy benchmark's folder, local")
    command.add_argument("--folder", required=True, help="what is made and measured stays: a second run goes on")
    command.add_argument(
        "--multiples", type=counts, default="1", help="sizes of the pool over the benchmark's (default: 1)"
    )
    command.add_argument("--tools", default="", help="names as the table has them, with ; between; default: all")
    command.set_defaults(run=benchmark_peers)
    command = commands.add_parser("chaos", help="runs struck at random end with the same bytes")
    command.add_argument("--rounds", type=int, default=50, help="(default: 50)")
    command.add_argument("--out", required=True, metavar="FOLDER", help="what is made, and rounds that differ")
    command.add_argument("--seed", type=int, default=0, help="of what is struck when (default: 0)")
    command.set_defaults(run=benchmark_chaos)
    command = commands.add_parser("fuzz", help="corrupted files are refused in a sentence, or counted")
    command.add_argument("--target", required=True, choices=("inputs", "queries", "config", "store"))
    command.add_argument("--minutes", type=float, default=10.0, help="(default: 10)")
    command.add_argument("--folder", required=True, help="scratch files, and in faults/ what caused one")
    command.add_argument("--example", default="quickstart/run", help="a finished run, for queries and store")
    command.add_argument("--seed", type=int, default=0, help="of the corruption (default: 0)")
    command.set_defaults(run=benchmark_fuzz)
    args = parser.parse_args()
    # Set before numpy is imported, because its libraries read these once; hence the imports inside the commands.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    from stride_ray.cli.exits import exit_status

    return exit_status("benchmark", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
