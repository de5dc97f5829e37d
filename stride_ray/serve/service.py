"""The service without HTTP: answers requests from one run, and reloads the run once it is fitted again."""

import gc
import time
from typing import Any

from stride_ray.corpus.queries import query_row
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.urls import redact_url
from stride_ray.serve.answer import answer
from stride_ray.serve.attributor import Attributor

# Fields of a request that are the query, as ``attribute`` reads it; others are options.
QUERY = ("text", "prompt", "completion", "messages", "contrast")
# Seconds between looks at the run directory, which may be an object store.
WATCH_SECONDS = 5.0


class InvalidQueryError(StrideError):
    """The query cannot be attributed: it is empty, too long for the model, or not a number to it."""


class Service:
    """Answers requests from a run.

    Args:
        url: run directory with finished operators at all sites.
        device: of the model.

    Raises:
        StrideError: as Attributor.
    """

    def __init__(self, url: str, device: str = "cpu") -> None:
        self.url, self.device = url, device
        self._load()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request.

        Args:
            request: the fields of QUERY that it has; ``candidates`` to score exactly (None: the run's number);
                ``blocks`` to show at either end; ``sources`` to show (None: all).

        Returns:
            As ``answer.answer``; also ``run`` (as ``facts``) and ``seconds``.

        Raises:
            InvalidQueryError: the query is at fault.
            StrideError: the run directory is.
        """
        started = time.monotonic()
        self._follow_run()
        values = {name: request[name] for name in QUERY if request.get(name) is not None}
        row = query_row(values, self.tokenizer)
        if row["status"] != "ok":
            raise InvalidQueryError(f"the query {row['error']}" if row["error"].startswith("has ") else row["error"])
        found = self.attributor.attribute(row, request.get("candidates"), tokens=request["blocks"])
        if found.query["status"] != "ok":
            raise InvalidQueryError(f"the query {found.query['error']}")
        told = answer(row, found, self.attributor.blocks, self.tokenizer, request["blocks"], request.get("sources"))
        return {**told, "run": self.facts, "seconds": round(time.monotonic() - started, 3)}

    def _load(self) -> None:
        self._seen, self._looked = self._state(), time.monotonic()
        gc.unfreeze()
        run = Run(self.url)
        self.attributor = Attributor(run, self.device)
        self.tokenizer = load_saved_tokenizer(run.store.child("blocks"))
        self.facts = {
            "run": redact_url(run.url),
            "model": redact_url(run.config.model.path),
            "blocks": len(self.attributor.blocks),
            "corpus": self.attributor.blocks.manifest["fingerprint"],
            "context": self.attributor.scorer.model.context,
            "candidates": self.attributor.candidates,
        }
        # What is loaded stays: without this, each request's garbage collection would walk through all of it.
        gc.collect()
        gc.freeze()

    def _follow_run(self) -> None:
        """Load the run again if it has been fitted again; while that is going on, what is loaded still answers."""
        if time.monotonic() - self._looked < WATCH_SECONDS:
            return
        self._looked = time.monotonic()
        state = self._state()
        if state not in ("", self._seen):
            self._load()

    def _state(self) -> str:
        """What the finished operators are; empty if they are not finished."""
        stage = Run(self.url).stage("operators")
        if not stage.is_finished():
            return ""
        return digest([stage.store.read_json("stage.json"), stage.manifest()])
