"""The attribution page: per query its text, and the training blocks that helped and harmed, in one HTML file."""

from importlib import resources
from typing import Any

import jinja2


def attribution_page(queries: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """One self-contained page, without scripts or anything to fetch; all text is escaped.

    Args:
        queries: attribute.shown_queries.
        facts: of the run and the fit: name, run, model, blocks, how, mode, verdict, learned, and the summary
            of recover_influence or exact_influence.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = resources.files("stride_ray.report").joinpath("attribution.html.j2").read_text("utf-8")
    return environment.from_string(source).render(queries=queries, facts=facts)
