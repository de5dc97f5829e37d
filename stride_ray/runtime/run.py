"""A run directory: run.toml and one folder per stage, each tied to the configuration it was made with.

The work of a stage is cut into units. A unit publishes its data files first and its done marker last, so a readable
marker implies readable data. A rerun only does the units without a marker (progress.run_missing). A stage writes its
manifest last: with a manifest, it is finished.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stride_ray import __version__
from stride_ray.runtime.config import Config, digest, dumps, loads, stage_hash, stage_keys
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.memory import peak_mb
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import anchored, redact_url

# The command that runs a stage.
COMMANDS = {
    **{"blocks": "shard", "operators": "fit", "responses": "respond", "estimates": "recover"},
    **{"influence": "rescore", "exact": "attribute --exact"},
}
# Files that a stage may write before its first unit of work is done.
PREPARED = {"stage.json", "plan.json", "tokenizer", "queries.parquet", "cost.json"}


class Stage:
    """The folder of a stage in a run: its data, one done marker per finished unit, and last a manifest.

    Args:
        store: the folder.
        identity: hash of what the output depends on; markers of another identity do not count.
        last: name of the manifest, the file that is written last.
    """

    def __init__(self, store: Store, identity: str, last: str = "manifest.json") -> None:
        self.store = store
        self.identity = identity
        self.last = last
        self._known: dict[str, dict[str, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Stage, (self.store, self.identity, self.last)

    def is_finished(self) -> bool:
        """Whether the manifest exists."""
        return self.store.exists(self.last)

    def manifest(self) -> dict[str, Any]:
        """Read the manifest of a finished stage."""
        return self.store.read_json(self.last)

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest; returns it."""
        self.store.write_json(self.last, manifest)
        return manifest

    @contextmanager
    def ignore_errors_if_finished(self) -> Iterator[None]:
        """Suppress a StrideError within the block if the stage is finished by then.

        If the same command runs twice, the faster one deletes temporary files that the slower one still needs.
        """
        try:
            yield
        except StrideError:
            if not self.is_finished():
                raise
            self.store.check_claim()  # raises if the manifest is that of another command with other settings

    def done(self) -> dict[str, dict[str, Any]]:
        """Done markers by unit name, sorted by name."""
        names = self.store.names("_done", ".json")
        unread = [name for name in names if name.removesuffix(".json") not in self._known]
        markers = self.store.read_jsons([f"_done/{name}" for name in unread])
        self.remember(markers)
        return dict(sorted(self._known.items()))

    def remember(self, markers: Sequence[dict[str, Any]]) -> None:
        """Cache markers returned by workers: listings may lag behind, and markers need not be read again."""
        self._known.update({each["unit"]: each for each in markers if each["config"] == self.identity})

    def mark(self, unit: str, started: float, **facts: Any) -> dict[str, Any]:
        """Publish the done marker of ``unit``, whose data files must be published already.

        Args:
            unit: the unit's name.
            started: ``time.monotonic()`` when its work began.
            facts: counts, content hashes and anything else the stage's summary needs.

        Returns:
            The marker: ``facts``, the unit's name, the stage's identity, seconds and peak memory.
        """
        cost = {"seconds": round(time.monotonic() - started, 3), "peak_mb": peak_mb()}
        # A JSON round trip turns tuples into lists, so that the cached marker equals the one on disk.
        marker = json.loads(json.dumps({"unit": unit, "config": self.identity, **facts, **cost}))
        self.store.write_json(f"_done/{unit}.json", marker)
        self.remember([marker])
        return marker

    def clear(self, beginning: str | tuple[str, ...], ending: str = "") -> None:
        """Remove the files whose names have this beginning (or one of several) and ending."""
        for name in self.store.names(ending=ending):
            if name.startswith(beginning):
                self.store.remove(name)

    def has_tensors(self) -> bool:
        """Whether there is any safetensors file."""
        return any(name.endswith(".safetensors") for name in self.store.names())

    def clear_tensors(self, beginning: str = "") -> None:
        """Remove the safetensors files with this beginning of their names."""
        self.clear(beginning, ".safetensors")


class Run:
    """A run directory at any fsspec URL, with its configuration.

    Args:
        url: the directory; created on first use.
        config: the complete configuration; None: the directory's run.toml, or the defaults if there is none.
        changes: options that override it, ``{"section.key": value}``.

    Raises:
        StrideError: invalid options or an unreadable run.toml.
    """

    def __init__(self, url: str, config: Config | None = None, changes: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self.store = Store(url)
        if config is None and self.store.exists("run.toml"):
            config = loads(self.store.read_text("run.toml"), self.store.display_url("run.toml"))
        config = (config or Config()).updated(changes or {})
        if not config.corpus.tokenizer:
            config = config.updated({"corpus.tokenizer": config.model.path})
        self.config = config
        self._before: bytes | None = None  # run.toml before the last ``begin``

    def stage(self, stage: str, name: str = "") -> Stage:
        """A stage's folder, for reading; ``name`` is the query set, for stages that have one folder per set."""
        return Stage(self.store.child(f"{stage}/{name}" if name else stage), stage_hash(self.config, stage))

    def begin(self, stage: str, name: str = "", **extra: Any) -> Stage:
        """A stage's folder, for writing; checks that it is new or was made with this configuration.

        Args:
            stage: one of config.STAGES.
            name: the query set, for stages that have one folder per set.
            extra: other inputs that the output depends on, for example the content hash of the queries.

        Raises:
            StrideError: the folder was made with other settings; the message names the first key that differs.
        """
        opened = self.stage(stage, name)
        opened = claim(opened.store, stage, {**stage_keys(self.config, stage), **extra}, identity=opened.identity)
        self._before = self.store.read("run.toml") if self.store.exists("run.toml") else None
        self.save()
        return opened

    def roll_back(self, opened: Stage) -> None:
        """Roll back ``begin`` for an empty stage: delete its folder and restore run.toml."""
        opened.store.remove("")
        if self._before is None:
            self.store.remove("run.toml")
        else:
            self.store.write("run.toml", self._before)

    def save(self) -> None:
        """Write run.toml: the configuration, the code version and, once known, the corpus fingerprint.

        Paths become absolute, so that the run can be used from any working directory; URLs lose their secrets.
        """
        text = dumps(self.config.updated(_stored_paths(self.config)))
        text += f'\n[run]\ncode_version = "{__version__}"\n'
        if self.store.exists("blocks/manifest.json"):
            text += f'corpus_fingerprint = "{self.store.read_json("blocks/manifest.json")["fingerprint"]}"\n'
        if not self.store.exists("run.toml") or self.store.read("run.toml").decode() != text:
            self.store.write("run.toml", text.encode())

    def require(self, stage: str, name: str = "", **extra: Any) -> Stage:
        """A finished upstream stage, for reading.

        Args:
            stage: one of COMMANDS.
            name: as in ``begin``.
            extra: as in ``begin``; inputs that are not given are not checked.

        Raises:
            StrideError: the stage is not finished (the message names the command that runs it), or was made with other
                settings.
        """
        opened = self.stage(stage, name)
        if not opened.is_finished():
            command = f"stride-ray {COMMANDS[stage]}" + (f" --name {name}" if name else "")
            raise StrideError(f"{redact_url(opened.store.url)} is not finished; run '{command}' first.")
        _check_same_settings(opened.store, {**stage_keys(self.config, stage), **extra})
        return opened


class _OwnedStore(Store):
    """A folder of a claimed stage; refuses writes once the claim is lost.

    A second command with other settings may claim a folder in which no unit is done yet. The first command may still be
    running and must not mix its files with those of the second.
    """

    def __init__(self, url: str, at: str, keys: str) -> None:
        super().__init__(url)
        self._at, self._keys = at, keys

    def __reduce__(self) -> tuple[Any, ...]:
        return _OwnedStore, (self.anchored_url, Store(self._at).anchored_url, self._keys)

    def child(self, name: str) -> Store:
        return _OwnedStore(super().child(name).url, self._at, self._keys)

    def write(self, name: str, data: bytes | memoryview) -> None:
        self.check_claim()
        super().write(name, data)

    def put(self, name: str, path: str) -> str:
        self.check_claim()
        return super().put(name, path)

    def remove(self, name: str) -> None:
        self.check_claim()
        super().remove(name)

    def check_claim(self) -> None:
        """Raise StrideError if another command has claimed the folder."""
        if digest(Store(self._at).read_json("stage.json")["keys"]) != self._keys:
            raise StrideError(
                f"{redact_url(self._at)} was taken by another command, with other settings, while this one ran; "
                "nothing more was written. Give each command its own run directory or query-set name."
            )


def claim(store: Store, what: str, keys: Mapping[str, Any], last: str = "manifest.json", identity: str = "") -> Stage:
    """Claim a folder for work with ``keys``, everything its output depends on; returns it for writing.

    Args:
        store: the folder.
        what: the stage, or what else stride_ray keeps in this folder.
        keys: recorded in ``stage.json``.
        last: name of the manifest.
        identity: of the done markers; empty: the hash of ``keys``.

    Raises:
        StrideError: the folder was made with other keys (the message names the first that differs), or is not a
            folder of this kind.
    """
    there = set(store.names())
    if there and "stage.json" not in there and not store.exists("stage.json"):
        raise StrideError(f"{redact_url(store.url)} is not a folder of stride_ray's {what}; use a new folder.")
    if not there <= PREPARED:
        _check_same_settings(store, keys)
    elif not there or store.read_json("stage.json")["keys"] != json.loads(json.dumps(keys)):
        # No unit is done: a command that failed early (say, no such model) may be repeated with corrected settings.
        for name in sorted(there):
            store.remove(name)
        store.write_json("stage.json", {"stage": what, "code_version": __version__, "keys": keys})
    return Stage(_OwnedStore(store.url, store.url, digest(keys)), identity or digest(keys), last)


def refuse_inside(store: Store, inputs: Iterable[str], what: str) -> None:
    """Raise StrideError if an output folder lies inside an input, where the next run would read it as text."""
    for given in inputs:
        if "://" in given or not store.local:
            inside = store.url.startswith(given.rstrip("/") + "/")
        else:
            folder = Path(given).resolve()
            inside = folder.is_dir() and Path(store.root).resolve().is_relative_to(folder)
        if inside:
            raise StrideError(
                f"{what} {redact_url(store.url)} lies in the input {redact_url(given)}; choose a folder outside."
            )


def part_name(index: int) -> str:
    """Return the name of a numbered unit: of its done marker, and of its file without the suffix."""
    return f"part-{index:05d}"


def _stored_paths(config: Config) -> dict[str, Any]:
    """Return the options that name files as run.toml stores them: absolute paths, and URLs without secrets."""
    hub_or_path = {"corpus.tokenizer": config.corpus.tokenizer, "model.path": config.model.path}
    hub_or_path["model.start"] = config.model.start
    paths = {"corpus.input": config.corpus.input, "select.earlier": config.select.earlier}
    paths["model.checkpoints"] = config.model.checkpoints
    return {
        **{name: redact_url(anchored(place, maybe_hub=True)) for name, place in hub_or_path.items()},
        **{name: [redact_url(anchored(place)) for place in places] for name, places in paths.items()},
    }


def _check_same_settings(store: Store, wanted: Mapping[str, Any]) -> None:
    """Raise StrideError if a folder was made with settings other than ``wanted``, naming the first key that differs."""
    made_with = store.read_json("stage.json")["keys"]
    contents = {
        "benchmark": "another benchmark, or this one before it changed",
        "corpus": "other blocks than are in the pool now",
        "queries": "other queries than this command's",
        "weights": "another model than now lies at model.path (or model.start)",
        "tokenizer": "the tokens of another tokenizer than corpus.tokenizer now names",
    }
    for key, now in wanted.items():
        if made_with.get(key) != now:
            how = f"with {key} = {made_with.get(key)!r}, and this command has {now!r}"
            if key.endswith(".format"):
                how = "by another version of stride-ray"
            raise StrideError(
                f"{redact_url(store.url)} was made {f'from {contents[key]}' if key in contents else how}; use "
                "another folder or name, or delete that folder and those of later stages."
            )
