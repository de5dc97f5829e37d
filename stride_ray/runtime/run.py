"""A run directory: run.toml, and one folder per stage whose identity guards it against another configuration.

A stage's work is cut into units. A unit publishes its data files first and its done-marker last, so a marker that
can be read means data that can be read; a rerun does the units without one.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from stride_ray import __version__
from stride_ray.runtime.config import Config, digest, dumps, loads, stage_hash, stage_keys
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.memory import peak_mb
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redacted, safe_url

# What a stage writes before its first unit of work.
PREPARED = {"stage.json", "plan.json", "tokenizer", "queries.parquet"}


class Stage:
    """One stage's folder in a run: its data, and a done-marker per finished unit."""

    def __init__(self, store: Store, identity: str) -> None:
        self.store = store
        self.identity = identity
        self._known: dict[str, dict[str, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Stage, (self.store, self.identity)

    def done(self) -> dict[str, dict[str, Any]]:
        """Markers of the finished units, by unit name, in name order."""
        names = self.store.names("_done", ".json")
        unread = [name for name in names if name.removesuffix(".json") not in self._known]
        markers = self.store.read_jsons([f"_done/{name}" for name in unread])
        for name, marker in zip(unread, markers, strict=True):
            if not isinstance(marker, dict) or not {"unit", "config"} <= marker.keys():
                raise StrideError(f"{self.store.name_of(f'_done/{name}')} is no done-marker; restore or delete it.")
        self.remember(markers)
        return dict(sorted(self._known.items()))

    def remember(self, markers: Sequence[dict[str, Any]]) -> None:
        """Keep what workers said of finished units: a listing may be late, and need not be read again."""
        self._known.update({each["unit"]: each for each in markers if each["config"] == self.identity})

    def mark(self, unit: str, started: float, **facts: Any) -> dict[str, Any]:
        """Say that ``unit`` is complete, what it cost in seconds and memory; its data files must be published already.

        Args:
            unit: the unit's name.
            started: ``time.monotonic()`` when its work began.
            facts: counts, content hashes and whatever the summary needs.
        """
        cost = {"seconds": round(time.monotonic() - started, 3), "peak_mb": peak_mb()}
        # As it will be read: no tuples.
        marker = json.loads(json.dumps({"unit": unit, "config": self.identity, **facts, **cost}))
        self.store.write_json(f"_done/{unit}.json", marker)
        self.remember([marker])
        return marker

    def clear_tensors(self, beginning: str = "") -> None:
        """Remove the safetensors files whose name begins so: what a finished stage does not need."""
        for name in self.store.names(ending=".safetensors"):
            if name.startswith(beginning):
                self.store.remove(name)


class Run:
    """A run directory at any fsspec URL, with its configuration.

    Args:
        url: the directory; made on first use.
        config: the whole configuration; None takes the directory's own run.toml, or the defaults.
        changes: options to set on top, ``{"section.key": value}``.

    Raises:
        StrideError: for options that do not exist or a run.toml that cannot be read.
    """

    def __init__(self, url: str, config: Config | None = None, changes: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self.store = Store(url)
        if config is None and self.store.exists("run.toml"):
            config = loads(self.store.read_text("run.toml"), self.store.name_of("run.toml"))
        config = (config or Config()).updated(changes or {})
        if not config.corpus.tokenizer:
            config = config.updated({"corpus.tokenizer": config.model.path})
        self.config = config
        self._before: bytes | None = None  # run.toml as the last ``begin`` found it

    def stage(self, stage: str, name: str = "") -> Stage:
        """A stage's folder, for reading; ``name`` is the query set of responses and influence."""
        return Stage(self.store.child(f"{stage}/{name}" if name else stage), stage_hash(self.config, stage))

    def begin(self, stage: str, name: str = "", **extra: Any) -> Stage:
        """A stage's folder, for writing, after checking that it was made with this configuration or is new.

        Args:
            stage: one of config.STAGES.
            name: the query set, where the stage has several.
            extra: further facts that the stage's output depends on (say the content hash of its queries).

        Raises:
            StrideError: when the folder was made with other settings, naming the first key that differs.
        """
        opened = self.stage(stage, name)
        opened = claim(opened, stage, {**stage_keys(self.config, stage), **extra})
        self._before = self.store.read("run.toml") if self.store.exists("run.toml") else None
        self.save()
        return opened

    def roll_back(self, opened: Stage) -> None:
        """Undo ``begin`` for a stage that came to nothing: its folder goes, and run.toml is as it was."""
        opened.store.remove("")
        if self._before is None:
            self.store.remove("run.toml")
        else:
            self.store.write("run.toml", self._before)

    def save(self) -> None:
        """Write run.toml: the configuration, the code's version and, once known, the corpus fingerprint."""
        text = dumps(self.config.updated({"corpus.input": [redacted(url) for url in self.config.corpus.input]}))
        text += f'\n[run]\ncode_version = "{__version__}"\n'
        if self.store.exists("blocks/manifest.json"):
            text += f'corpus_fingerprint = "{self.store.read_json("blocks/manifest.json")["fingerprint"]}"\n'
        if not self.store.exists("run.toml") or self.store.read("run.toml").decode() != text:
            self.store.write("run.toml", text.encode())

    def require(self, stage: str, needed_file: str, command: str, name: str = "", **extra: Any) -> Stage:
        """A finished upstream stage, for reading; ``extra`` as in ``begin``, where the caller knows it.

        Raises:
            StrideError: when it is not finished, saying which command makes it, or was made with other settings.
        """
        opened = self.stage(stage, name)
        if not opened.store.exists(needed_file):
            raise StrideError(f"{safe_url(opened.store.url)} is not finished; run '{command}' first.")
        _refuse_other(opened, {**stage_keys(self.config, stage), **extra})
        return opened


class _OwnedStore(Store):
    """A folder that one claim to a stage covers: written to only while the claim stands.

    A second command with other settings may take a folder in which no unit is done yet; the first, which may still be
    at work, must not mix its files with the second's.
    """

    def __init__(self, url: str, at: str, keys: str) -> None:
        super().__init__(url)
        self._at, self._keys = at, keys

    def __reduce__(self) -> tuple[Any, ...]:
        return _OwnedStore, (self.url, self._at, self._keys)

    def child(self, name: str) -> Store:
        return _OwnedStore(super().child(name).url, self._at, self._keys)

    def write(self, name: str, data: bytes | memoryview) -> None:
        self._check()
        super().write(name, data)

    def put(self, name: str, path: str) -> str:
        self._check()
        return super().put(name, path)

    def remove(self, name: str) -> None:
        self._check()
        super().remove(name)

    def _check(self) -> None:
        if digest(Store(self._at).read_json("stage.json")["keys"]) != self._keys:
            raise StrideError(
                f"{safe_url(self._at)} was taken by another command, with other settings, while this one worked; "
                "nothing more was written. Give each a run directory or name of its own."
            )


def claim(opened: Stage, stage: str, keys: Mapping[str, Any]) -> Stage:
    """Take a stage's folder for work with ``keys``, all that its output depends on; returns it for writing.

    Raises:
        StrideError: when the folder was made with others, naming the first that differs, or holds something else.
    """
    there = set(opened.store.names())
    if there and "stage.json" not in there and not opened.store.exists("stage.json"):
        raise StrideError(
            f"{safe_url(opened.store.url)} holds something else than stride_ray's {stage}; give a folder that is new."
        )
    if not there <= PREPARED:
        _refuse_other(opened, keys)
    elif not there or opened.store.read_json("stage.json")["keys"] != json.loads(json.dumps(keys)):
        # A command that failed at once (no such model) leaves nothing that took work; the corrected one may go on.
        for name in sorted(there):
            opened.store.remove(name)
        opened.store.write_json("stage.json", {"stage": stage, "code_version": __version__, "keys": keys})
    return Stage(_OwnedStore(opened.store.url, opened.store.url, digest(keys)), opened.identity)


@contextmanager
def tolerate_concurrent_finish(stage: Stage, by: str) -> Iterator[None]:
    """Forgive what goes wrong once the file ``by`` says that the stage is finished.

    The same command may have been started twice: the faster one has cleared away what the slower one works with.
    """
    try:
        yield
    except StrideError:
        if not stage.store.exists(by):
            raise


def part_name(index: int) -> str:
    """The name of a numbered unit of work's file, without the suffix, and of its marker."""
    return f"part-{index:05d}"


def _refuse_other(opened: Stage, wanted: Mapping[str, Any]) -> None:
    """Raise StrideError where a folder was made with settings other than ``wanted``, naming the first such key."""
    made_with = opened.store.read_json("stage.json")["keys"]
    contents = {
        "corpus": "other blocks than are there now",
        "queries": "other queries than this command's",
        "weights": "another model than now lies at model.path (or model.start)",
    }
    for key, now in wanted.items():
        if made_with.get(key) != now:
            how = f"with {key} = {made_with.get(key)!r}, and this command has {now!r}"
            raise StrideError(
                f"{safe_url(opened.store.url)} was made {f'from {contents[key]}' if key in contents else how}; use "
                "another run directory or name, or delete that folder and those that came after it."
            )
