"""Self-contained HTML pages: a template with inlined style, script and the data that the script displays.

Corpus text is always data, never markup: the template escapes its values, the data is JSON that cannot close a tag, the
script inserts text nodes only, and the content security policy allows only this script, pictures embedded in the page,
and no requests.
"""

import base64
import hashlib
import json
import math
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

# JSON escapes of the characters that could close a script element or end a line in it.
ESCAPES = {ord(each): f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"}
# Total characters of block texts on a page, which keeps it below 5 MB, and the minimum kept of each long text.
TEXT_BUDGET, MIN_TEXT_CHARACTERS = 3_000_000, 200
# Most tokens whose influence a page shows.
TOKEN_BUDGET = 60_000


def render(
    template: str, data: dict[str, Any], scripts: tuple[str, ...] = (), asks: bool = False, **values: Any
) -> str:
    """Render ``template``.html.j2 with ``report.css``, ``common.js``, ``template``.js and ``data``.

    Args:
        template: name of the template and its script.
        data: JSON-serialisable data for the script.
        scripts: further scripts, between common.js and the template's.
        asks: whether the page may send requests to where it came from.
        values: values for the template, which escapes them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = "".join(_file(f"{name}.js") for name in ("common", *scripts, template))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(f"{template}.html.j2").render(
        **values,
        style=Markup(_file("report.css")),
        script=Markup(script),
        data=Markup(embedded(data)),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        + ("; connect-src 'self'" if asks else ""),
    )


def embedded(data: Any) -> str:
    """Data as JSON that can be embedded in a script element, since it cannot close the tag.

    Numbers that are not finite, which JSON does not have, become null.
    """
    return json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(ESCAPES)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _file(name: str) -> str:
    return resources.files("stride_ray.report").joinpath(name).read_text("utf-8")


def attribution_page(
    queries: list[dict[str, Any]],
    facts: dict[str, Any],
    trust: dict[str, Any] | None = None,
    timeline: dict[str, Any] | None = None,
) -> str:
    """The page of a query set: a searchable list of queries with the most helpful and most harmful blocks of each.

    Args:
        queries: from attribute.shown_queries.
        facts: about the run and the fit: name, run, model, blocks, how, mode, verdict, learned, and the summary
            of rescore or exact_influence.
        trust: result of trust.trust: ``level``, ``verdict``, ``rows`` (check, found, by chance); None if not run.
        timeline: result of timeline.timeline: ``checkpoints``, ``queries``; None if not run.
    """
    queries = _with_fewer_tokens(queries)
    texts = {row["ordinal"]: row["text"] for each in queries for row in (*each["helping"], *each["harming"])}
    longest = max(MIN_TEXT_CHARACTERS, TEXT_BUDGET // max(1, len(texts)))
    kept = (
        *("query_id", "error", "base_loss", "nonzeros", "prompt", "completion", "contrast"),
        *("curve", "half", "sources"),
    )
    data = {
        "queries": [
            {key: each[key] for key in kept}
            | {side: [_row(row) for row in each[side]] for side in ("helping", "harming")}
            for each in queries
        ],
        "pieces": _pieces(queries),
        "timeline": timeline and _of_queries(timeline, {each["query_id"] for each in queries}),
        "texts": {ordinal: text if len(text) <= longest else f"{text[:longest]} …" for ordinal, text in texts.items()},
    }
    cut = longest if any(len(text) > longest for text in texts.values()) else 0
    return render("attribution", data, ("blocks",), facts=facts, trust=trust, shown=len(queries), cut=cut)


def _of_queries(timeline: dict[str, Any], shown: set[str]) -> dict[str, Any]:
    """A timeline with the queries that the page shows."""
    return {**timeline, "queries": {query: each for query, each in timeline["queries"].items() if query in shown}}


def service_page(needs_token: bool, most_blocks: int) -> str:
    """The page of a service (serve.api): a form, and what the service answers.

    Args:
        needs_token: whether requests carry a token, for which the page asks.
        most_blocks: that an answer may show at either end.
    """
    return render("service", {"needs_token": needs_token, "answer": None}, ("blocks",), asks=True, most=most_blocks)


def _row(row: dict[str, Any]) -> list[Any]:
    """A block's row for the script: rank, influence, share, ordinal, document id, source, whether exact, tokens."""
    kept = [row[key] for key in ("rank", "influence", "share", "ordinal", "document_id", "source", "exact")]
    return [*kept, row["tokens"] and [float(f"{value:.2g}") for value in row["tokens"]]]


def _with_fewer_tokens(queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The queries without the influence of tokens once TOKEN_BUDGET tokens are shown."""
    shown, left = [], TOKEN_BUDGET
    for query in queries:
        sides: dict[str, list[dict[str, Any]]] = {"helping": [], "harming": []}
        for side, rows in sides.items():
            for row in query[side]:
                count = len(row["tokens"] or ())
                rows.append({**row, "tokens": row["tokens"] if count <= left else None})
                left -= count
        shown.append({**query, **sides})
    return shown


def _pieces(queries: list[dict[str, Any]]) -> dict[int, list[str]]:
    """By ordinal, the texts of the tokens of the blocks that some query has by token, as far as those go."""
    found = dict[int, list[str]]()
    for row in (row for each in queries for side in ("helping", "harming") for row in each[side] if row["tokens"]):
        pieces = row["pieces"][: len(row["tokens"])]
        found[row["ordinal"]] = max(found.get(row["ordinal"], []), pieces, key=len)
    return found
