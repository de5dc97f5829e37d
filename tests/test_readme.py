"""The README's promises: every snippet in it and in docs/ runs, in order, in one folder, on the real quickstart."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest
import ray
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    snippet
    for page in PAGES
    for snippet in re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
]

# How each snippet begins, what it prints, and what it leaves.
EXPECTED = [
    ("source .venv", [], []),
    ("from stride_ray", ["influence"], ["mine/influence/prompts/page.html"]),
    ("echo", ["influence/ask", "exact/ask"], ["mine/exact/ask/page.html"]),
    ("stride-ray config", ["[solve]", "steps = 2"], []),
    ("stride-ray select", ["tokens, by rank over prompts", "Random baseline"], ["chosen/random/manifest.parquet"]),
    ("stride-ray scan review", ["0 review(s) kept; 0 of 0 reviewed items are false alarms."], ["labels.jsonl"]),
    ("# jobs/distill.py", ["Rank correlation", "Random baseline: "], ["chosen-elsewhere/manifest.parquet"]),
    ("mkdir -p evaluation", ["1 new finding(s)", "status 2", "0 new finding(s)"], ["scans/latest.json"]),
    (
        "stride-ray verify",
        ["blocks ranked first", "random blocks"],
        ["mine/verify/prompts/verification.json"],
    ),
    ("stride-ray serve", ['"helping":[{"query_id":"query","rank":1,', '"tokens":[['], []),
    ("stride-ray plan", ["1,000,000 blocks, 500 queries, 8 workers", "all of estimated", "a further batch"], []),
]


def run(command: list[str], folder: Path, **more: str) -> str:
    # What the make that runs these tests hands down would change what a make of theirs prints. conftest's one thread
    # stays: two threads of the quickstart's training, waiting for each other beside other tests, take thrice as long.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    environment = {**inherited, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def make_recipe(target: str) -> str:
    """The last command that make would run for a target, in this environment."""
    return run(["make", "-n", target], ROOT).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    (root / ".venv").symlink_to(sys.prefix)
    return root


@pytest.fixture(scope="module")
def quickstart(folder):
    """What `make quickstart` runs once its virtual environment is there."""
    recipe = make_recipe("quickstart")
    assert recipe.endswith("stride-ray quickstart")
    return run(["stride-ray", "quickstart"], folder)


def test_quickstart_finds_the_files_that_the_prompts_came_from(quickstart, folder):
    tables = sorted((folder / "quickstart/run/influence/prompts").glob("influence-*.parquet"))
    rows = [row for table in tables for row in pq.read_table(table).to_pylist()]
    top = {}
    for row in rows:
        if row["rank"] <= 5:
            top.setdefault(row["query_id"], set()).add(row["document_id"])
    assert "difflib.py" in top["zen"]
    assert "json/decoder.py" in top["json-error"]
    assert "http/server.py" in top["http"]
    assert "page.html" in quickstart
    page = (folder / "quickstart/run/influence/prompts/page.html").read_text("utf-8")
    assert "difflib.py" in page
    assert "Trust: " in page


def test_the_notebook_runs_and_shows_the_page_and_tables(quickstart, folder):
    notebook = nbformat.read(ROOT / "docs/notebook.ipynb", 4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    shown = [cell.outputs[-1].data.get("text/html", "") for cell in notebook.cells if cell.cell_type == "code"]
    assert shown[0].startswith('<iframe title="attribution" sandbox="allow-scripts"')
    assert "&lt;!doctype html&gt;" in shown[0]
    assert "difflib.py" in shown[2]
    assert all("<table" in each or "dtype" in each or each == "" for each in shown[1:])


def test_readme_has_both_set_up_commands():
    assert [body.strip() for kind, body in SNIPPETS if kind == "bash" and body.startswith("make")] == [
        "make quickstart",
        "make test",
    ]
    assert make_recipe("test").endswith("-m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder")


@pytest.mark.parametrize("index", [i for i, (_, body) in enumerate(SNIPPETS) if not body.startswith("make")])
def test_snippet_runs(quickstart, folder, one_ray, index):
    kind, body = SNIPPETS[index]
    command = [sys.executable, "-c", body] if kind == "python" else ["bash", "-euo", "pipefail", "-c", body]
    # The quickstart starts a Ray of its own; each of these commands would start one more, a third of its time.
    printed = run(command, folder, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    expected = next((words, paths) for start, words, paths in EXPECTED if body.startswith(start))
    for word in expected[0]:
        assert word in printed
    for path in expected[1]:
        assert (folder / path).exists()
