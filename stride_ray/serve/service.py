"""The service without HTTP: answers requests from one run, and reloads the run once it is fitted again."""

import gc
import logging
import time
from typing import Any

from stride_ray.corpus.queries import query_row
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.urls import redact_url
from stride_ray.serve.attributor import Attributor
from stride_ray.serve.format import format_attribution

# Fields of a request that make up the query, as ``attribute`` reads it; the others are options.
QUERY = ("text", "prompt", "completion", "messages", "contrast")
# Blocks to find by their text, unless a request says otherwise.
MATCHES = 3
# Seconds between checks of the run directory, which may be an object store, and after a failed reload.
CHECK_SECONDS, RETRY_SECONDS = 5.0, 60.0
_log = logging.getLogger(__name__)


class InvalidQueryError(StrideError):
    """The query cannot be attributed: it is empty or too long, or its loss is not finite."""


class Service:
    """Answers requests from a run. Not thread-safe: the model's hooks belong to one request at a time.

    Args:
        url: run directory with finished operators at all sites.
        device: of the model.

    Raises:
        StrideError: as Attributor.
    """

    def __init__(self, url: str, device: str = "cpu") -> None:
        self.url, self.device, self._check_at = url, device, 0.0
        self._load(self._state())

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request.

        Args:
            request: the fields of QUERY that it has; ``candidates`` to score exactly (None: the run's number);
                ``blocks`` to show at either end; ``matches`` to find by their text (None: MATCHES); ``sources`` to
                show (None: all).

        Returns:
            As format_attribution; also ``run`` (``facts``) and ``seconds``.

        Raises:
            InvalidQueryError: the query is at fault.
            StrideError: the run directory is.
        """
        started = time.monotonic()
        values = {name: request[name] for name in QUERY if request.get(name) is not None}
        if "completion" in values:
            values.setdefault("prompt", "")
        row = query_row(values, self.tokenizer)
        if row["status"] != "ok":
            raise InvalidQueryError(f"the query {row['error']}" if row["error"].startswith("has ") else row["error"])
        shown, matches = request["blocks"], request.get("matches")
        matches = MATCHES if matches is None else matches
        found = self.attributor.attribute(row, request.get("candidates"), shown, matches)
        if found.query["status"] != "ok":
            raise InvalidQueryError(f"the query {found.query['error']}")
        blocks, sources = self.attributor.blocks, request.get("sources")
        body = format_attribution(row, found, blocks, self.tokenizer, shown, sources)
        return {**body, "run": self.facts, "seconds": round(time.monotonic() - started, 3)}

    def follow_run(self) -> None:
        """Reload the run if it has been fitted again; until that has succeeded, the loaded operators stay in use."""
        if time.monotonic() < self._check_at:
            return
        self._check_at = time.monotonic() + CHECK_SECONDS
        try:
            state = self._state()
            if state not in ("", self._loaded):
                self._load(state)
        except Exception:
            _log.exception("reloading %s failed; the operators loaded before stay in use", redact_url(self.url))
            self._check_at = time.monotonic() + RETRY_SECONDS

    def _load(self, state: str) -> None:
        run = Run(self.url)
        attributor, tokenizer = Attributor(run, self.device), load_saved_tokenizer(run.store.child("blocks"))
        facts = {
            "run": redact_url(run.url),
            "model": redact_url(run.config.model.path),
            "blocks": len(attributor.blocks),
            "corpus": attributor.blocks.manifest["fingerprint"],
            "context": attributor.scorer.model.context,
            "candidates": attributor.candidates,
        }
        self.attributor, self.tokenizer, self.facts = attributor, tokenizer, facts
        self._loaded, self._check_at = state, time.monotonic() + CHECK_SECONDS
        # Keep each request's garbage collection from walking through everything that was loaded.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _state(self) -> str:
        """Hash of the finished operators; empty while they are being fitted."""
        stage = Run(self.url).stage("operators")
        if not stage.is_finished():
            return ""
        return digest([stage.store.read_json("stage.json"), stage.manifest()])
