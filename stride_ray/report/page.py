"""Pages in one HTML file each: a template, its style and script, and the data that the script shows.

Text of a corpus is data, never markup: the template escapes what it prints, the data is JSON in which no tag can end,
the script writes text only, and the page's policy lets the browser run that one script and fetch nothing.
"""

import base64
import hashlib
import json
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

# Characters that could end a script element, or a line of one, as JSON writes them otherwise.
ESCAPES = {ord(each): f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"}
# Letters of blocks' texts on a page, all together: with the rest it stays below 5 MB.
TEXT_BUDGET, SHORTEST = 3_000_000, 200


def render(template: str, data: dict[str, Any], **values: Any) -> str:
    """A page from ``template``.html.j2 with ``report.css``, ``common.js``, ``template``.js and ``data``.

    Args:
        template: its name.
        data: what the script shows; JSON.
        values: what the template itself prints; escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = _file("common.js") + _file(f"{template}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(f"{template}.html.j2").render(
        **values,
        style=Markup(_file("report.css")),
        script=Markup(script),
        data=Markup(embedded(data)),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def embedded(data: Any) -> str:
    """Data as JSON that may stand in a script element: no tag can end in it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(ESCAPES)


def _file(name: str) -> str:
    return resources.files("stride_ray.report").joinpath(name).read_text("utf-8")


def attribution_page(queries: list[dict[str, Any]], facts: dict[str, Any], trust: dict[str, Any] | None = None) -> str:
    """The page of a query set: find a query, see what helped and what harmed.

    Args:
        queries: attribute.shown_queries.
        facts: of the run and the fit: name, run, model, blocks, how, mode, verdict, learned, and the summary
            of rescore or exact_influence.
        trust: what trust.trust found: ``level``, ``verdict``, ``rows`` (check, found, by chance); None: not asked.
    """
    texts = {row["ordinal"]: row["text"] for each in queries for row in (*each["helping"], *each["harming"])}
    longest = max(SHORTEST, TEXT_BUDGET // max(1, len(texts)))
    kept = ("query_id", "error", "base_loss", "nonzeros", "prompt", "completion", "curve", "half", "sources")
    data = {
        "queries": [
            {key: each[key] for key in kept}
            | {side: [_row(row) for row in each[side]] for side in ("helping", "harming")}
            for each in queries
        ],
        "texts": {ordinal: text if len(text) <= longest else f"{text[:longest]} …" for ordinal, text in texts.items()},
    }
    cut = longest if any(len(text) > longest for text in texts.values()) else 0
    return render("attribution", data, facts=facts, trust=trust, shown=len(queries), cut=cut)


def _row(row: dict[str, Any]) -> list[Any]:
    """A block's row for the script: rank, influence, share, ordinal, document, source, whether it is exact."""
    return [row[key] for key in ("rank", "influence", "share", "ordinal", "document_id", "source", "exact")]
