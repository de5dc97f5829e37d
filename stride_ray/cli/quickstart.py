"""End-to-end attribution on a small real corpus, Python's standard library, with a model trained on it.

Nothing is downloaded. The stages are those that a cluster runs on a terabyte, with a model small enough to train in a
minute or two. All output is in one folder; a rerun resumes where it stopped.
"""

import json
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

from stride_ray.attribution.attribute import attribute
from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.shard import shard
from stride_ray.evaluate.trust import trust
from stride_ray.models.builtin.toy import train_model, train_tokenizer
from stride_ray.operators.fit import fit
from stride_ray.runtime.actor_pool import shared_actor_pool
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.tasks import connected

# Modules in the sample; those missing from this Python are skipped, and the number copied is printed.
MODULES = (
    "argparse.py bisect.py calendar.py contextlib.py copy.py csv.py difflib.py fractions.py getopt.py glob.py "
    "gzip.py heapq.py html/parser.py http/server.py ipaddress.py json/__init__.py json/decoder.py "
    "json/encoder.py json/scanner.py json/tool.py keyword.py poplib.py pprint.py queue.py random.py sched.py "
    "secrets.py shelve.py shlex.py socketserver.py statistics.py string.py subprocess.py tempfile.py textwrap.py "
    "this.py timeit.py tokenize.py turtle.py uuid.py wave.py webbrowser.py"
).split()

PROMPTS = {
    "argparse": "parser = argparse.ArgumentParser(description=",
    "argparse-error": "error: the following arguments are required:",
    "json-error": 'raise JSONDecodeError("Expecting value", s, err.value) from None',
    "zen": "Beautiful is better than ugly.\nExplicit is better than implicit.",
    "subprocess": "Popen.communicate() returns a tuple (stdout, stderr)",
    "turtle": "turtle.forward(100)\n>>> turtle.left(90)\n>>> turtle.position()",
    "random": "random.shuffle(x)  shuffle list x in place, and return None.",
    "http": 'self.send_response(HTTPStatus.OK)\nself.send_header("Content-type", ctype)',
    "ipaddress": "ip_network('192.0.2.0/28') raises ValueError: has host bits set",
    "statistics": "mean([1, 2, 3, 4, 4])\n2.8",
    "calendar": "def isleap(year):\n    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
}

BLOCK_TOKENS, EPOCHS = 128, 2


def quickstart(folder: str) -> dict[str, Any]:
    """Make corpus, tokenizer, model, blocks, operators and about ten attributed prompts in one folder.

    Args:
        folder: a local folder; created, or resumed from.

    Returns:
        The summary of ``attribute``.

    Raises:
        StrideError: the standard library's sources are not installed, or a stage failed.
    """
    root, began = Path(folder), time.monotonic()
    _say(1, f"a sample of Python's standard library -> {root / 'corpus'}")
    files = write_corpus(root / "corpus")
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} modules, {size / 1e6:.2f} MB")
    _say(2, f"a tokenizer trained on it -> {root / 'tokenizer'}")
    train_tokenizer((path.read_text("utf-8") for path in files), root / "tokenizer")
    run = Run(str(root / "run"), changes=settings(root))
    with connected(run.config.compute):
        return _stages(run, root, began)


def _stages(run: Run, root: Path, began: float) -> dict[str, Any]:
    """Run the stages and train the model within one Ray connection."""
    _say(3, f"documents to blocks -> {root / 'run' / 'blocks'}")
    manifest = shard(run)
    print(f"{manifest['documents']} documents became {manifest['blocks']} blocks of {BLOCK_TOKENS} tokens")
    _say(4, f"a small Llama trained on these blocks -> {root / 'model'}")
    train_model(Blocks(run.stage("blocks").store), root / "tokenizer", root / "model", EPOCHS)
    _say(5, f"blocks to steering operators, one pass -> {root / 'run' / 'operators'}")
    queries = root / "prompts.jsonl"
    queries.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in PROMPTS.items()))
    with shared_actor_pool(run.config, unit_count(manifest["blocks"])):
        print(fit(run)["verdict"])
        _say(6, f"which blocks made the model answer like this -> {root / 'run' / 'influence'}")
        summary = attribute(run, str(queries), "prompts")
    print(f"\n{trust(run, 'prompts').verdict}")
    print(
        f"\nEach line above is a block of the corpus that the model was trained on: its rank, its influence on the "
        f"prompt's loss\n(positive: training on it made the prompt more likely), its file and its text. Open the page "
        f"to read them whole:\n  {Path(summary['page']).resolve()}\nfinished in {time.monotonic() - began:.0f} s"
    )
    return summary


def settings(root: Path | str) -> dict[str, Any]:
    """The options that the quickstart changes from their defaults; its inputs lie under ``root``, a path or URL."""
    return {
        "corpus.input": [f"{root}/corpus"],
        "corpus.tokenizer": f"{root}/tokenizer",
        "corpus.block_tokens": BLOCK_TOKENS,
        "corpus.shard_mb": 0.5,
        "model.path": f"{root}/model",
    }


def _say(step: int, text: str) -> None:
    print(f"\n[{step}/6] {text}", flush=True)


def write_corpus(folder: Path) -> list[Path]:
    """Copy the sample with modification times and return its files; a rerun therefore sees unchanged input."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        source, target = library / name, folder / name
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target.with_name(f".{target.name}"))
            target.with_name(f".{target.name}").replace(target)
    files = sorted(path for path in folder.rglob("*.py") if not path.name.startswith("."))
    if not files:
        raise StrideError(f"{library} holds no Python sources; install Python with its standard library.")
    return files
