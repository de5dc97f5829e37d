"""Every stage's worked example runs as it stands, one after the other, in one folder."""

import doctest
import importlib
import shutil

import pytest
from conftest import documents, write_lines

STAGES = (
    *("corpus.shard.shard", "operators.fit.fit", "attribution.respond.respond"),
    *("attribution.recover.recover_estimates", "attribution.rescore.rescore", "attribution.attribute.attribute"),
    *("selection.select.select", "contamination.nightly.scan", "evaluate.verify.verify"),
)

# Imported before ``plain`` patches what is imported.
MODULES = {stage: importlib.import_module(f"stride_ray.{stage.rpartition('.')[0]}") for stage in STAGES}


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """What the examples name: a corpus of three files, a model, two queries, an evaluation set."""
    root = tmp_path_factory.mktemp("examples")
    texts = documents(60)
    write_lines(root / "corpus.jsonl", [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    shutil.copytree(parts.model, root / "model")
    shutil.copytree(parts.tokenizer, root / "model", dirs_exist_ok=True)
    queries = {"sea": "the anchor met the tide and the gull", "kitchen": "the butter met the oven and the dough"}
    write_lines(root / "queries.jsonl", [{"id": name, "text": text} for name, text in queries.items()])
    items = [
        {"id": "leaked", "question": texts[0], "answer": texts[1]},
        {"id": "new", "question": "who?", "answer": "no one"},
    ]
    write_lines(root / "evaluation.jsonl", items)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_the_example_of_a_stage(stage, folder, plain, monkeypatch):
    monkeypatch.chdir(folder)
    name = stage.rpartition(".")[2]
    function = getattr(MODULES[stage], name)
    examples = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert any(each.examples for each in examples), f"{stage} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    printed = []
    for each in examples:
        runner.run(each, out=printed.append)
    assert not runner.failures, "".join(printed)
