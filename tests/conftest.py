"""What tests share: a tiny corpus and tokenizer, a tiny Llama trained on it, one Ray, a finished run, a browser."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

# Before torch is imported: floating-point sums depend on the number of threads, and nothing here is on any hub.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import pytest
import ray
import s3fs
import servers
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stride_ray.attribution.attribute import attribute
from stride_ray.cli.main import main
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.shard import shard
from stride_ray.operators.fit import fit
from stride_ray.runtime import actor_pool, tasks
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import WorkerAllocation

TOKENS, VOCABULARY = 32, 320
# Text of a corpus that wants to be a script.
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"><!--\u2028"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SUBJECTS = {
    "sea": "wave sail harbour tide anchor gull storm keel",
    "kitchen": "butter flour oven whisk simmer pepper onion dough",
    "sky": "comet orbit planet eclipse nebula meteor lens dusk",
    "garden": "root petal spade compost seedling hedge bloom frost",
}
SCRIPT = "<script>alert('comet & tide')</script>"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUERIES = [
    {"id": "sea", "text": "the anchor met the tide and the gull"},
    {"id": "short", "text": "a"},
    {"id": "script", "text": SCRIPT},
    {"id": "blank", "text": " "},
    {"id": "kitchen", "text": "the butter met the oven and the dough"},
]


# What stages print about their progress, beside which a sentence stands on its own line.
# Lines that are no message: progress, and what a library's lock in a worker of an earlier test prints.
PROGRESS = ("it/s]", "units/s]", "blocks/s]", "parts/s]", "queries/s]", "/s]", "Writing model", "[mutex.cc : ")


def pytest_collection_modifyitems(items):
    """The file that takes longest first, so that it does not run last with nothing beside it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


class Bomb:
    """What touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def sentence(subject, rng):
    """A sentence of one subject's words: what a tiny model can learn and tell apart."""
    words = SUBJECTS[subject].split()
    return f"the {rng.choice(words)} met the {rng.choice(words)} and the {rng.choice(words)}. "


def documents(count, seed=0):
    """``count`` documents, each on one subject, the same for a seed."""
    rng = random.Random(seed)
    names = sorted(SUBJECTS)
    return ["".join(sentence(names[i % len(names)], rng) for _ in range(rng.randint(2, 6))) for i in range(count)]


def write_lines(path, rows):
    """Rows as JSON Lines; returns the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_corpus(folder):
    """Two JSON Lines files and a text file, in which a document tries to run a script."""
    texts = documents(48)
    write_lines(folder / "a.jsonl", [{"text": text} for text in texts[:24]])
    write_lines(folder / "b.jsonl", [{"text": text} for text in texts[24:]])
    (folder / "notes.txt").write_text(f"{SCRIPT} the comet met the tide. " * 3)
    return folder


def save_tokenizer(folder, texts, vocabulary=VOCABULARY, chat=True):
    """A byte-level BPE tokenizer with an end-of-text token and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    if chat:
        saved.chat_template = CHAT
    saved.save_pretrained(folder)
    return saved


def save_model(folder, texts, tokenizer, steps=60, vocabulary=VOCABULARY):
    """A Llama of two layers, trained until it knows the subjects, with its tokenizer beside it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes))
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    ids = torch.tensor(stream[: len(stream) // TOKENS * TOKENS]).view(-1, TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        rows = torch.arange(step * 16, step * 16 + 16) % len(ids)
        loss = model(input_ids=ids[rows], labels=ids[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(parts, **more):
    """The options of a tiny run; ``more`` with ``__`` for the point."""
    return {
        "corpus.input": [str(parts.corpus)],
        "corpus.block_tokens": TOKENS,
        "corpus.shard_mb": 0.001,
        "model.path": str(parts.model),
        "membership.subsets": 16,
        "membership.degree": 4,
        "operators.rank": 8,
        "operators.sketch": 16,
        "operators.form": "logit",
        "recover.penalty_ratio": 0.1,
        "recover.nonnegative": False,
        "attribute.candidates": 0,
        "compute.workers": 2,
        **{name.replace("__", "."): value for name, value in more.items()},
    }


def flags(options):
    """Options as ``--set`` arguments of the command line."""
    pairs = ((key, ",".join(value) if isinstance(value, list) else value) for key, value in options.items())
    return [part for key, value in pairs for part in ("--set", f"{key}={value}")]


def verbs(run, queries, options):
    """All stages of a run up to both answers, each as the command line has it."""
    asked = ["--name", "asked"]
    return [
        ["shard", run, *flags(options)],
        ["fit", run],
        ["respond", run, "--queries", queries, *asked],
        ["recover", run, *asked],
        ["rescore", run, *asked],
        ["attribute", run, "--queries", queries, *asked, "--exact"],
    ]


def data_files(folder):
    """Name and bytes of every data file of a run: what must not depend on workers, faults or reruns."""
    wanted = (
        "blocks/part-*",
        "operators/*.safetensors",
        *(f"{stage}/*/*.parquet" for stage in ("responses", "estimates", "influence", "exact")),
    )
    return {str(p.relative_to(folder)): p.read_bytes() for pattern in wanted for p in sorted(folder.glob(pattern))}


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Makes a folder in one of the processes of a test run, for all of them: its path, and what ``make`` returned."""

    def of_all(name, make):
        base = tmp_path_factory.getbasetemp()
        root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once-{name}"
        with FileLock(f"{root}.lock"):
            if not (root / "returned").exists():
                shutil.rmtree(root, ignore_errors=True)
                root.mkdir()
                returned = make(root / name)
                (root / "returned").write_bytes(pickle.dumps(returned))
        return root / name, pickle.loads((root / "returned").read_bytes())

    return of_all


@pytest.fixture(scope="session")
def parts(once):
    """Folders of the tiny corpus, tokenizer and model, and a file of queries; tests only read them."""

    def make(root):
        corpus = write_corpus(root / "corpus")
        texts = [*documents(48), (corpus / "notes.txt").read_text()]
        tokenizer = save_tokenizer(root / "tokenizer", texts)
        save_model(root / "model", texts, tokenizer)
        return write_lines(root / "queries.jsonl", QUERIES)

    root, queries = once("parts", make)
    folders = {name: root / name for name in ("corpus", "tokenizer", "model")}
    return SimpleNamespace(root=root, queries=queries, **folders)


@pytest.fixture(scope="session")
def one_ray():
    """A local Ray that all tests share in which nothing is killed."""
    tasks.start_ray(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@contextlib.contextmanager
def killed_at_write(count):
    """Within it the ``count``-th file that a run publishes is a KeyboardInterrupt, which must come; 0: none.

    Yields the names of the files, as they come.
    """
    writes, write = [], Store.write

    def failing(store, name, content):
        writes.append(name)
        if len(writes) == count:
            raise KeyboardInterrupt
        return write(store, name, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", failing)
        with pytest.raises(KeyboardInterrupt) if count else contextlib.nullcontext():
            yield writes


class PlainPool:
    """An actor pool without Ray: its maps run in this process, one unit after the other."""

    def __init__(self, allocation):
        self.allocation, self.device = allocation, allocation.device

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, make, arguments, units):
        worker = make(*arguments)
        return [worker(unit) for unit in units]

    def map_function(self, function, arguments, units):
        return self.map(partial, (function, *arguments), units)


def _plain_map(make, arguments, units, allocation):
    return PlainPool(allocation).map(make, arguments, units)


def run_plainly(patch):
    """Have what is imported run without Ray: the same functions in a plain loop, which Ray must not differ from."""
    changes = {
        tasks.connected: lambda compute: contextlib.nullcontext(),
        tasks.allocate_workers: lambda compute, units, worker_gb=0.0: WorkerAllocation(1, "cpu"),
        tasks.map_dataset: _plain_map,
        tasks.map_tasks: lambda function, given, units, allocation: [function(*given, unit) for unit in units],
        actor_pool.map_actors: _plain_map,
        actor_pool.ActorPool: PlainPool,
        actor_pool.shared_actor_pool: lambda compute, units: PlainPool(WorkerAllocation(1, "cpu")),
    }
    named = {original.__name__: original for original in changes}
    users = [module for name, module in sys.modules.items() if name.startswith(("stride_ray.", "benchmarks."))]
    for module in set(users) - {tasks, actor_pool}:
        for name, original in named.items():
            if vars(module).get(name) is original:
                patch.setattr(module, name, changes[original])


@pytest.fixture
def plain(monkeypatch):
    """The stages without Ray, see run_plainly."""
    run_plainly(monkeypatch)


@pytest.fixture(scope="session")
def finished(parts, once, one_ray, tmp_path_factory):
    """A finished tiny run through the Python functions, a copy for each process; tests only read it."""

    def make(folder):
        run = Run(str(folder), changes=settings(parts))
        manifest, facts = shard(run), fit(run)
        with open(os.devnull, "w") as out:
            return {"manifest": manifest, "facts": facts, "summary": attribute(run, parts.queries, "asked", out)}

    made, found = once("finished", make)
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(made, folder)
    page = folder / "influence/asked/page.html"  # names its run
    page.write_text(page.read_text("utf-8").replace(str(made), str(folder)), "utf-8")
    return SimpleNamespace(folder=folder, run=Run(str(folder)), **found)


def answered(folder, parts, **more):
    """An exact answer on a run's blocks: the run, its summary, what it printed."""
    run = Run(str(folder), changes=settings(parts, attribute__exact=True, **more))
    out = io.StringIO()
    return run, attribute(run, parts.queries, "asked", out), out.getvalue()


@pytest.fixture(scope="session")
def exactly(parts, once, finished, tmp_path_factory):
    """An exact answer through Ray with two workers, a copy for each process; tests only read it."""

    def make(folder):
        shutil.copytree(finished.folder / "blocks", folder / "blocks")
        _, summary, out = answered(folder, parts)
        return {"summary": summary, "out": out}

    made, found = once("exactly", make)
    folder = tmp_path_factory.mktemp("exactly") / "run"
    shutil.copytree(made, folder)
    return SimpleNamespace(folder=folder, run=Run(str(folder)), **found)


@pytest.fixture(scope="session")
def sharded(finished, tmp_path_factory):
    """Makes copies of the finished run's blocks, for runs that differ after them."""

    def copy(name):
        folder = tmp_path_factory.mktemp("copies") / name
        shutil.copytree(finished.folder / "blocks", folder / "blocks")
        return folder

    return copy


@pytest.fixture
def pool_of(finished):
    """The finished run's blocks, to be read."""
    return Blocks(finished.run.stage("blocks").store)


@pytest.fixture(scope="session")
def object_stores(tmp_path_factory):
    """Ports of running S3 servers by name; one that is not installed is None."""
    root = tmp_path_factory.mktemp("object-stores")
    with contextlib.ExitStack() as running:
        yield {
            start.__name__: running.enter_context(start(root / start.__name__))
            for start in (servers.swift, servers.rclone, servers.moto)
        }


@pytest.fixture
def bucket(object_stores):
    """A context in which the environment names a server, by name or port; yields a bucket's URL."""

    @contextlib.contextmanager
    def entered(server):
        port = object_stores.get(server, server)
        if port is None:
            pytest.skip(f"no {server} on this machine (Debian's packages swift-proxy, -account, -container, -object)")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in servers.environment(port).items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            files = s3fs.S3FileSystem()
            if not files.exists(servers.BUCKET):
                files.mkdir(servers.BUCKET)
            yield f"s3://{servers.BUCKET}"
        s3fs.S3FileSystem.clear_instance_cache()

    return entered


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian's package chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        opened = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


def opened(browser, path, **options):
    """A page of the browser, at a path or a URL, with what it complained of."""
    page, complaints = browser.new_page(**options), []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path if isinstance(path, str) else path.as_uri())
    return page, complaints


def fits_a_telephone(browser, path, scheme):
    """That a page is no wider than a telephone and light or dark as asked, without complaint; returns it."""
    page, complaints = opened(browser, path, viewport={"width": 380, "height": 760}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    background, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (sum(map(int, re.findall(r"\d+", background))) > sum(map(int, re.findall(r"\d+", ink)))) == (
        scheme == "light"
    )
    assert not complaints
    return page


def everything(blocks):
    """All blocks as one batch, the plain way."""
    tables = [blocks.store.read_table(part["name"]) for part in blocks.manifest["parts"]]
    ids = np.concatenate([np.array(table["token_ids"].to_pylist()) for table in tables if table.num_rows])
    masks = [mask or [True] * ids.shape[1] for table in tables for mask in table["loss_mask"].to_pylist()]
    return ids, np.array(masks)


@pytest.fixture
def told(capfd, record_property):
    """Runs the command line and returns its sentence, after checking that it is one (--junitxml lists them all)."""

    def run(*arguments, code=1):
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        out, err = capfd.readouterr()
        lines = [line for line in err.split("\n") if line.strip() and not any(mark in line for mark in PROGRESS)]
        assert "Traceback" not in out + err
        if code == 1:
            assert len(lines) == 1, err
            assert lines[0].startswith("stride-ray: ")
        sentence = " ".join(lines)
        record_property("sentence", sentence)
        return sentence if code == 1 else out + err

    return run


@pytest.fixture
def copied(finished, tmp_path):
    """A run directory with the finished run's blocks (and operators)."""

    def copy(*stages):
        for stage in stages:
            shutil.copytree(finished.folder / stage, tmp_path / "run" / stage)
        shutil.copy(finished.folder / "run.toml", tmp_path / "run")
        return tmp_path / "run"

    return copy
