"""A scan's report in Markdown, with all text escaped; stride_ray.contamination.report renders the HTML page."""

import html
from typing import Any

from stride_ray.contamination.compare import Difference, line

# Maximum findings listed per heading; the tables hold all.
_LISTED = 200
# Maximum fields named of a set; the manifest names all.
_NAMES = 20
HEAD = (
    "set",
    "items",
    "lexical",
    "influence (suspicion)",
    "both",
    "clean",
    "not searched",
    "not read",
    "new",
    "resolved",
)
NOTE = (
    "A lexical finding is a copy of an item's text in the corpus. Influence alone is a suspicion, never proof: the "
    "model predicts the item better than control items, and one training block has more influence on the item than on "
    "the control items."
)


def markdown(facts: dict[str, Any], found: Difference) -> str:
    """Render the report as Markdown.

    Args:
        facts: the night's manifest (nightly.scan).
        found: difference from the last reported scan.
    """
    lines = [f"# Contamination scan, {facts['night']}", "", headline(facts), "", NOTE, ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(map(_table_cell, row)) + " |" for row in set_rows(facts)]
    for title, rows in _sections(found):
        lines += ["", f"## {title}", ""]
        lines += [f"- {_escape(line(row))}  \n  {_escape(row['question'])}" for row in rows[:_LISTED]] or ["None."]
        lines += [f"- and {len(rows) - _LISTED} more, see verdicts.parquet"] if len(rows) > _LISTED else []
    lines += ["", "## How it was made", "", *(f"- {_escape(text)}" for text in about(facts))]
    return "\n".join(lines) + "\n"


def headline(facts: dict[str, Any]) -> str:
    """Summarise the outcome in one sentence."""
    since = f" since {facts['since']}" if facts["since"] else " (the first scan)"
    total = sum(sum(each["verdicts"][name] for name in ("lexical", "influence", "both")) for each in facts["sets"])
    items = sum(each["items"] for each in facts["sets"])
    return (
        f"{facts['new']} new finding(s), {facts['changed']} changed and {facts['resolved']} resolved{since}; "
        f"{total} of {items} items are not clean."
    )


def set_rows(facts: dict[str, Any]) -> list[list[Any]]:
    """Return a row per set of a night's manifest, with the columns of HEAD."""
    kinds = ("lexical", "influence", "both", "clean")
    return [
        [s["name"], s["items"], *(s["verdicts"][k] for k in kinds), s["short"], s["rejected"], s["new"], s["resolved"]]
        for s in facts["sets"]
    ]


def _sections(found: Difference) -> list[tuple[str, list[dict[str, Any]]]]:
    return [("New", found.new), ("Changed", found.changed), ("Resolved", found.resolved)]


def about(facts: dict[str, Any]) -> list[str]:
    """Describe the corpus, options and channels of a night, a line each."""
    corpus, options = facts["corpus"], facts["options"]
    lines = [
        f"corpus: {corpus['documents']} documents in {corpus['units']} units, {corpus['rejected']} rows rejected",
        f"lexical: n = {options['words']}, overlap at least {options['overlap']:g}; {corpus['boilerplate']} n-grams "
        f"left out as boilerplate, the whole of {corpus['filtered']} matches; {corpus['common']} n-grams left out "
        "because too many items contain them",
    ]
    lines += [f"  {reject}" for reject in corpus["rejects"]]
    for each in facts["sets"]:
        lines.append(f"set {each['name']}: searched for {_shortened_list(each['searched_fields'])}")
        if each["question_fields"] != ["question"]:
            lines[-1] += f", with {_shortened_list(each['question_fields'])} as the question"
        if each["left_out_fields"]:
            lines[-1] += f"; not for {_shortened_list(each['left_out_fields'])} (too short, identifiers, or not named)"
        if each["not_understood"]:
            lines.append(
                f"  {each['not_understood']} item(s) have a field that was not understood; it is searched as text:"
            )
            lines += [f"  {field}" for field in each["first_not_understood"]]
    influence = facts["influence"]
    if influence is None:
        return [*lines, "influence: off (scan.influence = false)"]
    return [
        *lines,
        f"influence: model {influence['model']}, {influence['mode']}, {influence['blocks']} blocks; "
        f"{influence['controls']} control items, false-discovery rate "
        f"{options['false_discovery']:g}; {influence['failed']} items could not be measured",
    ]


def _shortened_list(names: list[str]) -> str:
    more = [f"{len(names) - _NAMES} more fields"] if len(names) > _NAMES else []
    return ", ".join([*names[:_NAMES], *more]) or "nothing"


def _table_cell(value: Any) -> str:
    return _escape(str(value)).replace("|", "\\|")


def _escape(text: str) -> str:
    """Escape a text for Markdown and HTML, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    for sign in "\\`*_[]":
        text = text.replace(sign, "\\" + sign)
    return text
