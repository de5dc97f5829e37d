"""A query set's finished tables, for notebooks."""

import html
from functools import cached_property
from typing import Any

import pyarrow as pa

from stride_ray.attribution.attribute import read_influence, render_page, shown_queries, stored_queries
from stride_ray.runtime.run import Run
from stride_ray.runtime.urls import redact_url

# Queries, and blocks at either end, that a notebook displays; the page beside the tables has more.
QUERIES, BLOCKS = 20, 5


class QuerySet:
    """The tables of a query set, each read when it is first used.

    In a notebook, a query set is displayed as its page, of the first QUERIES queries.

    Example:
        >>> from stride_ray import QuerySet, Run
        >>> asked = QuerySet(Run("mine"), "asked")
        >>> asked.influence.column_names[:2], asked.documents.num_rows > 0
        (['query_id', 'rank'], True)

    Args:
        run: with finished influence for this query set.
        name: of the query set.

    Attributes:
        influence: blocks by influence on each query (tables.INFLUENCE).
        documents: summed to documents (tables.DOCUMENTS). ``sources``: to sources (tables.SOURCES).
        spans: for the first and last blocks, the tokens that hold half of the influence (tables.SPANS).
        recovery: a row per query, with its error if it failed (tables.RECOVERY).
        queries: the tokenised queries (queries.SCHEMA).

    Raises:
        StrideError: on first use, as read_influence.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name

    @cached_property
    def influence(self) -> pa.Table:
        """Blocks by influence on each query."""
        return read_influence(self.run, self.name)

    @cached_property
    def documents(self) -> pa.Table:
        """Influence summed to documents."""
        return read_influence(self.run, self.name, "documents")

    @cached_property
    def sources(self) -> pa.Table:
        """Influence summed to sources."""
        return read_influence(self.run, self.name, "sources")

    @cached_property
    def spans(self) -> pa.Table:
        """The tokens that hold half of the influence of the first and last blocks."""
        return read_influence(self.run, self.name, "spans")

    @cached_property
    def recovery(self) -> pa.Table:
        """A row per query, with its error if it failed."""
        return read_influence(self.run, self.name, "recovery")

    @cached_property
    def queries(self) -> pa.Table:
        """The tokenised queries."""
        return stored_queries(self.run, self.name)

    def to_pandas(self, table: str = "influence") -> Any:
        """One of the tables as a pandas DataFrame."""
        return getattr(self, table).to_pandas()

    def __repr__(self) -> str:
        return f"QuerySet({self.name!r}, {self.queries.num_rows} queries, run {redact_url(self.run.url)})"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which cannot reach the notebook."""
        shown = shown_queries(self.run, self.name, QUERIES, BLOCKS)
        page = html.escape(render_page(self.run, self.name, shown), quote=True)
        style = "width: 100%; height: 44rem; border: 0"
        return f'<iframe title="attribution" sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'
