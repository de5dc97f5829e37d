"""The pages beside the code: links lead somewhere, fields are all there, the README stays short."""

import re
from pathlib import Path

import pytest

from stride_ray.attribution.recover import ESTIMATES
from stride_ray.attribution.responses import response_schema
from stride_ray.attribution.site_responses import RESPONSES
from stride_ray.attribution.tables import DOCUMENTS, INFLUENCE, RECOVERY, SOURCES, SPANS, TOKENS
from stride_ray.contamination.lexical.channel import MATCHES
from stride_ray.contamination.verdicts import VERDICTS
from stride_ray.corpus.failures import FAILED_BLOCKS
from stride_ray.corpus.packing import block_schema
from stride_ray.corpus.queries import SCHEMA
from stride_ray.evaluate.timeline import TIMELINE
from stride_ray.runtime.config import Config
from stride_ray.selection.choice import MANIFEST

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cluster/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FILES = (ROOT / "docs/files.md").read_text("utf-8")
WORDS = 800


def anchors(page):
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_options_that_pages_name_are_there(page):
    text = page.read_text("utf-8")
    for path in re.findall(r"`((?:stride_ray|jobs|tests|cluster|docs|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    sections = "corpus|model|membership|operators|fit|respond|recover|solve|attribute|select|scan|compute"
    known = Config().flat()
    for option in re.findall(rf"(?<![./\w])((?:{sections})\.[a-z_]+)(?= ?=|`)", text):
        assert option in known or option.endswith((".py", ".json", ".toml", ".yaml", ".safetensors")), option


def test_the_readme_is_a_screen_or_two():
    prose = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text("utf-8"), flags=re.M | re.S)
    words = [word for word in re.findall(r"\S+", prose) if re.search(r"\w", word)]
    assert 500 <= len(words) <= WORDS, len(words)


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("blocks/part", block_schema(8)),
        ("operators", FAILED_BLOCKS),
        ("queries.parquet", SCHEMA),
        ("responses/NAME", RESPONSES),
        ("responses/NAME", response_schema(3)),
        ("estimates/NAME", ESTIMATES),
        ("influence/NAME", INFLUENCE),
        ("influence/NAME", DOCUMENTS),
        ("influence/NAME", TOKENS),
        ("influence/NAME", SPANS),
        ("timeline/NAME", TIMELINE),
        ("influence/NAME", SOURCES),
        ("influence/NAME", RECOVERY),
        ("A selection", MANIFEST),
        ("A night", MATCHES),
        ("A night", VERDICTS),
    ],
)
def test_every_field_is_described(heading, schema):
    section = FILES.split(f"## {heading}")[1].split("\n## ")[0]
    described = set(re.findall(r"`(\w+)`", section))
    assert set(schema.names) <= described, set(schema.names) - described
