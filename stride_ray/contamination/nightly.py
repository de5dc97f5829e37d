"""A nightly scan of a corpus and the model trained on it for evaluation sets, with the results in a dated folder.

A scan folder holds ``nights/<date>/`` (verdicts.parquet, matches.parquet, report.md, report.html, then manifest.json,
which marks the night as finished, then told.json, which marks it as reported by exit status and webhook),
``latest.json`` (the last finished night), ``reviews/`` (reviews.py), ``state/`` (cached work) and, while a scan runs,
``scan.lock``.

Findings are new relative to the last reported night: if the webhook failed or the scan was killed before it, they are
reported again the next time.
"""

import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from stride_ray.attribution.attribute import mode_of
from stride_ray.contamination.compare import Difference, difference
from stride_ray.contamination.influence.channel import MIN_CONTROLS, TIES, checkpoint, item_ties
from stride_ray.contamination.items import EvaluationSet, Item, check_names
from stride_ray.contamination.lexical.channel import Lexical, lexical_matches
from stride_ray.contamination.lexical.ngrams import searched_fields
from stride_ray.contamination.lexical.search import RAW, Corpus, search
from stride_ray.contamination.lexical.words import RULES
from stride_ray.contamination.lock import Lock
from stride_ray.contamination.report import scan_page
from stride_ray.contamination.reviews import last_reviews, reviews_by_key
from stride_ray.contamination.summary import headline, markdown
from stride_ray.contamination.verdicts import counts, verdicts
from stride_ray.contamination.webhook import post, shown_webhook
from stride_ray.corpus.documents import resolve_columns
from stride_ray.corpus.queries import check_name
from stride_ray.corpus.splits import InputSplit, plan
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ScanConfig
from stride_ray.runtime.run import Run, Stage, refuse_inside
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redact_url

CLEAN, FAILED, FOUND = 0, 1, 2
# Nights in the page's plots, including this one.
NIGHTS = 60
REPORTED = "told.json"


def scan(
    run: Run,
    sets: Sequence[EvaluationSet],
    out: str,
    controls: Sequence[EvaluationSet] = (),
    night: str = "",
    webhook: str = "",
) -> dict[str, Any]:
    """Scan a corpus and a model for evaluation items, publish the night's results, and post them to the webhook.

    Example:
        >>> from stride_ray import Run, read_set, scan
        >>> night = scan(Run("mine", changes={"scan.influence": False}), [read_set("evaluation.jsonl")], "nights")
        >>> night["status"], night["sets"][0]["items"]
        (2, 2)

    Args:
        run: provides the lexical channel's corpus (its input, sharded or not) and the influence channel's model and
            blocks (``scan.influence``). Another checkpoint is another run; ``out`` may stay the same.
        sets: evaluation sets.
        out: the scan's folder, any fsspec URL; the same every night.
        controls: unpublished items of the same kind, the null distribution of the influence channel, which requires
            them.
        night: name of the dated folder; empty: today (UTC), with a number if today's exists. A night that is finished
            but was not reported is reported as it is.
        webhook: URL to POST the summary to; empty: none.

    Returns:
        The manifest, with ``folder``, ``status`` (0 nothing new, 2 new findings, 1 the webhook failed) and ``webhook``
        (its error, or empty).

    Raises:
        StrideError: another scan is running, there is no evaluation set, an option or name is invalid, influence lacks
            controls, or a channel fails. The last finished night stays in place.
    """
    check_names([*sets, *controls])
    for key, share in (("overlap", run.config.scan.overlap), ("false_discovery", run.config.scan.false_discovery)):
        if not 0 <= share <= 1:
            raise StrideError(f"scan.{key} is {share:g}; it must be a share from 0 to 1.")
    if night:
        check_name(night, "night")
    if not sets:
        raise StrideError(
            "No evaluation set is given; give a folder (--set-folder) or a file (--evaluation NAME=PATH)."
        )
    given = len({item.key for each in controls for item in each.items})
    if run.config.scan.influence and given < MIN_CONTROLS:
        raise StrideError(
            f"The influence channel needs control items, and {given} are given: give similar items that were never "
            f"published (--control PATH; at least {MIN_CONTROLS}, better hundreds), or turn the channel off "
            "(--set scan.influence=false)."
        )
    store = Store(out)
    refuse_inside(store, run.config.corpus.input, "The scan's folder")
    with Lock(store, 60 * run.config.scan.lease) as lock:
        manifest, found = _scan_night(run, sets, store, controls, night, lock)
    folder = f"{redact_url(out)}/nights/{manifest['night']}"
    status = FOUND if _alarming(run, found) else CLEAN
    failure = ""
    if webhook:
        payload = {**manifest, "folder": folder, "status": status, "findings": found.new, "text": headline(manifest)}
        failure = post(webhook, payload)
    if not failure:
        store.write_json(f"nights/{manifest['night']}/{REPORTED}", {"webhook": shown_webhook(webhook)})
    return {**manifest, "folder": folder, "status": FAILED if failure else status, "webhook": failure}


def last_night(store: Store) -> str:
    """Return the name of a scan folder's last finished night; empty if there is none or it was deleted."""
    night = str(store.read_json("latest.json")["night"]) if store.exists("latest.json") else ""
    return night if night and store.names(f"nights/{night}") else ""


def _last_reported(store: Store, night: str) -> str:
    """Return the last reported night up to ``night``; empty if there is none or it was deleted."""
    while night and not store.exists(f"nights/{night}/{REPORTED}"):
        manifest = f"nights/{night}/manifest.json"
        night = store.read_json(manifest)["before"] if store.exists(manifest) else ""
    return night


def earlier_nights(store: Store, night: str) -> list[dict[str, Any]]:
    """Return the manifests of finished nights up to ``night``, oldest first; at most NIGHTS − 1."""
    found: dict[str, dict[str, Any]] = {}
    # Names need not sort by time, so follow each manifest's link to the night before.
    while night and night not in found and len(found) < NIGHTS - 1 and store.exists(f"nights/{night}/manifest.json"):
        found[night] = store.read_json(f"nights/{night}/manifest.json")
        night = found[night]["before"]
    return list(found.values())[::-1]


def corpus_of(run: Run, state: Store) -> Corpus:
    """Split the run's input into units; units of unchanged files are kept, new files make new units.

    Raises:
        StrideError: the run has no input, or it cannot be read.
    """
    config = run.config.corpus
    if not config.input:
        raise StrideError(f"{redact_url(run.url)} has no corpus; give files, folders or URLs (--set corpus.input=...).")
    size = int(config.shard_mb * 1e6)
    units = plan(config.input, size)
    files = {file.name: file for unit in units for file in unit.files}
    stored = state.read_json("units.json")["units"] if state.exists("units.json") else []
    known = [InputSplit.from_dict(each, config.input) for each in stored]
    same = [unit for unit in known if all(_is_unchanged(file, files.get(file.name)) for file in unit.files)]
    if same:
        units = same + plan(config.input, size, skip={file.name for unit in same for file in unit.files})
    state.write_json("units.json", {"units": [unit.to_record() for unit in units]})
    blocks = run.stage("blocks").store
    given = blocks.read_json("plan.json")["columns"] if blocks.exists("plan.json") else config.columns
    return Corpus(tuple(units), resolve_columns(units, given), config.tokenizer)


def _is_unchanged(a: Any, b: Any) -> bool:
    return b is not None and (a.content, redact_url(a.url)) == (b.content, redact_url(b.url))


def _scan_night(
    run: Run, sets: Sequence[EvaluationSet], store: Store, controls: Sequence[EvaluationSet], night: str, lock: Lock
) -> tuple[dict[str, Any], Difference]:
    started = time.monotonic()
    options = run.config.scan
    items = [item for each in sets for item in each.items]
    state = store.child("state")
    name = night or _today(store)
    if store.exists(f"nights/{name}/manifest.json"):
        return _load_unreported(store, name)
    corpus = corpus_of(run, state)
    stage = Stage(state.child("lexical"), digest(["lexical", RULES, options.words, options.shortest, *RAW.names]))
    done = search(stage, corpus, items, options.words, options.shortest, run.config.compute)
    lexical = lexical_matches(stage, corpus, items, options)
    ties, influence = _influence_ties(run, state, items, controls) if options.influence else (None, None)
    previous = last_night(store)
    before = _read_verdicts(store, previous)
    known = dict(zip(before["key"].to_pylist(), before["verdict"].to_pylist(), strict=True)) if before else {}
    reviews = reviews_by_key(last_reviews(store))
    table = verdicts(items, lexical, ties, options.false_discovery, known, reviews)
    since = _last_reported(store, previous)
    found = difference(before if since == previous else _read_verdicts(store, since), table)
    manifest = {
        "night": name,
        "before": previous,
        "since": since,
        "run": redact_url(run.url),
        "new": len(found.new),
        "changed": len(found.changed),
        "resolved": len(found.resolved),
        "sets": [_set_facts(each, table, lexical, found, options) for each in sets],
        "corpus": _corpus_facts(corpus, lexical),
        "influence": influence,
        "options": {k.partition(".")[2]: v for k, v in run.config.flat().items() if k.startswith("scan.")},
    }
    page = scan_page(manifest, table, lexical, items, found, earlier_nights(store, previous))
    lock.check()
    folder = store.child(f"nights/{name}")
    folder.write_table("matches.parquet", lexical.matches)
    folder.write_table("verdicts.parquet", table)
    folder.write("report.md", markdown(manifest, found).encode())
    folder.write("report.html", page.encode())
    did = {"searched_units": done["units"], "searched_items": done["items"]}
    cost = {"did": {**did, "asked_items": (influence or {}).get("asked", 0)}}
    manifest |= {**cost, "seconds": round(time.monotonic() - started, 1)}
    folder.write_json("manifest.json", manifest)
    store.write_json("latest.json", {"night": name})
    return manifest, found


def _load_unreported(store: Store, night: str) -> tuple[dict[str, Any], Difference]:
    """Load a finished but unreported night, and update latest.json if that is missing."""
    if store.exists(f"nights/{night}/{REPORTED}"):
        raise StrideError(f"{store.display_url('nights')}/{night} is finished; give another name for this night.")
    manifest = store.read_json(f"nights/{night}/manifest.json")
    if last_night(store) == manifest["before"]:
        store.write_json("latest.json", {"night": night})
    return manifest, difference(
        _read_verdicts(store, manifest["since"]), store.read_table(f"nights/{night}/verdicts.parquet")
    )


def _read_verdicts(store: Store, night: str) -> pa.Table | None:
    """Return a night's verdicts; None without a night.

    Raises:
        StrideError: they are missing or damaged.
    """
    if night and not store.exists(f"nights/{night}/verdicts.parquet"):
        raise StrideError(
            f"{store.display_url(f'nights/{night}')} has no verdicts.parquet; restore it, or delete the whole folder: "
            "all findings then count as new."
        )
    return store.read_table(f"nights/{night}/verdicts.parquet") if night else None


def _today(store: Store) -> str:
    """Return today's date (UTC), with the next number if a night of that name is finished."""
    today = time.strftime("%Y-%m-%d", time.gmtime())
    number, name = 1, today
    while store.exists(f"nights/{name}/manifest.json"):
        number += 1
        name = f"{today}-{number}"
    return name


def _influence_ties(
    run: Run, state: Store, items: list[Item], controls: Sequence[EvaluationSet]
) -> tuple[pa.Table, dict[str, Any]]:
    """Return TIES of all items, and the influence channel's facts for the manifest."""
    given = [item for each in controls for item in each.items]
    made_of = checkpoint(run)
    identity = digest([made_of, TIES.names, *(item.key for item in given)])
    stage = Stage(state.child(f"influence/{identity}"), identity)
    ties, asked = item_ties(run, stage, items, given)
    failed = sum(r["contrast"] is None and not r["control"] for r in ties.select(["contrast", "control"]).to_pylist())
    return ties, {
        "checkpoint": made_of,
        "model": redact_url(run.config.model.path),
        "mode": mode_of(run),
        "blocks": run.stage("blocks").store.read_json("manifest.json")["blocks"],
        "controls": sum(ties["control"].to_pylist()),
        "failed": failed,
        "asked": asked,
    }


def _set_facts(
    each: EvaluationSet, table: pa.Table, lexical: Lexical, found: Difference, options: ScanConfig
) -> dict[str, Any]:
    names = [searched_fields(item, options.words, options.shortest) for item in each.items]
    searched = sorted({name for names_of_item, _ in names for name in names_of_item})
    left_out = {name for _, short in names for name in short} | {name for item in each.items for name in item.left_out}
    mine = table.filter(pa.array([name == each.name for name in table["set"].to_pylist()]))
    return {
        "name": each.name,
        "items": len(each.items),
        "repeated": each.repeated,
        "rejected": sum(reject.rows for reject in each.rejects),
        "rejects": [reject.sentence() for reject in each.rejects[:5]],
        "not_understood": sum(bool(item.not_understood) for item in each.items),
        "first_not_understood": [field.sentence() for field in each.not_understood[:5]],
        "short": sum(item.key in lexical.short for item in each.items),
        "searched_fields": searched,
        "question_fields": sorted({item.asked for item in each.items}),
        "left_out_fields": sorted(left_out - set(searched)),
        "verdicts": counts(mine),
        "new": sum(row["set"] == each.name for row in found.new),
        "resolved": sum(row["set"] == each.name for row in found.resolved),
    }


def _corpus_facts(corpus: Corpus, lexical: Lexical) -> dict[str, Any]:
    return {
        "state": corpus.state,
        "units": len(corpus.units),
        "documents": lexical.documents,
        "rejected": lexical.rejected,
        "rejects": list(lexical.rejects),
        "boilerplate": lexical.boilerplate,
        "filtered": lexical.filtered,
        "beyond": lexical.beyond,
        "common": lexical.common,
    }


def _alarming(run: Run, found: Difference) -> bool:
    """Whether the new findings set the exit status to FOUND (``scan.alarm``)."""
    fresh = [*found.new, *(row for row in found.changed if row["before"] == "influence")]
    return any(run.config.scan.alarm == "any" or row["verdict"] != "influence" for row in fresh)
