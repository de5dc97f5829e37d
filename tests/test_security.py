"""Nothing that comes from storage is run, leaves its folder, or carries a secret into a file."""

import ast
import contextlib
import json
import shutil
from pathlib import Path

import pytest
import servers
import torch
from conftest import Bomb, data_files, settings, write_lines
from safetensors.torch import load_file

from stride_ray.attribution.attribute import attribute
from stride_ray.cli.main import main
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.models.causal_lm import load_model
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.selection.select import select

ROOT = Path(__file__).parent.parent
# What runs code that it reads, or may.
REFUSED = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
CODE = "import pathlib; pathlib.Path({!r}).touch()\n"


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("stride_ray/**/*.py"), *ROOT.glob("jobs/*.py")]), ids=lambda p: p.name
)
def test_no_source_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & REFUSED
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"), name
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        if name == "np.load":
            assert ast.unparse(keywords["allow_pickle"]) == "False"
        assert ast.unparse(keywords.get("shell", ast.Constant(False))) == "False", name


def test_pickled_weights_are_not_run(parts, tmp_path):
    folder, made = tmp_path / "model", tmp_path / "made"
    shutil.copytree(parts.model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "bomb": Bomb(str(made))}, folder / "pytorch_model.bin")
    with pytest.raises(StrideError):
        load_model(folder, device="cpu")
    assert not made.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert made.exists()  # it would have gone off


@pytest.fixture
def with_code(parts, tmp_path):
    """A model folder that names classes of its own, and the file that shows that they were looked for."""
    folder, made = tmp_path / "model", tmp_path / "made"
    shutil.copytree(parts.model, folder)
    (folder / "own.py").write_text(CODE.format(str(made)))

    def change(name, facts):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    change("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})
    change("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", None]}})
    return folder, made


def test_code_that_comes_with_a_model_is_not_run(with_code):
    folder, made = with_code
    with pytest.raises(StrideError):
        load_model(folder, device="cpu")
    with contextlib.suppress(StrideError):  # the library's own class may read it all the same
        load_tokenizer(str(folder))
    assert not made.exists()


def test_code_that_comes_with_a_model_is_run_if_asked(with_code):
    folder, made = with_code
    with pytest.raises(StrideError):  # there is no class of that name in it
        load_model(folder, device="cpu", trust_remote_code=True)
    assert made.exists()


@pytest.mark.parametrize("name", ["../up.json", "a/../../up.json", "..", "..\\up.json"])
def test_no_name_leads_out_of_a_folder(tmp_path, name):
    store = Store(str(tmp_path / "run"))
    for attempt in (lambda: store.write(name, b"x"), lambda: store.read(name), lambda: store.child(name)):
        with pytest.raises(StrideError, match="leads out of"):
            attempt()
    assert not (tmp_path / "up.json").exists()


@pytest.mark.parametrize("name", ["../other", "..", "a/b", ".hidden"])
def test_no_query_set_and_no_night_leads_out_of_its_folder(finished, parts, tmp_path, name, capsys):
    items = tmp_path / "items.jsonl"
    items.write_text('{"question": "whose quokka sold seven umbrellas", "answer": "x"}\n')
    scan = ["scan", finished.run.url, "--evaluation", str(items), "--out", str(tmp_path / "scans"), "--night", name]
    for command in (
        ["attribute", finished.run.url, "--queries", str(parts.queries), "--name", name],
        [*scan, "--set", "scan.influence=false"],
    ):
        assert main(command) == 1
        assert repr(name) in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_no_secret_of_the_environment_or_of_a_url_is_written(parts, tmp_path, monkeypatch, capfd, plain):
    secrets = {"AWS_SECRET_ACCESS_KEY": "sesame-1", "HF_TOKEN": "sesame-2", "RAY_AUTH_TOKEN": "sesame-3"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    corpus = f"ftp://me:sesame-4@localhost:1{parts.corpus}"
    run = Run(str(tmp_path / "run"), changes=settings(parts, attribute__exact=True))
    shard(run)
    attribute(run, str(parts.queries), "asked")
    with pytest.raises(StrideError) as told:
        shard(Run(str(tmp_path / "other"), changes={**settings(parts), "corpus.input": [corpus + "?sig=sesame-5"]}))
    said = capfd.readouterr()
    assert "sesame" not in said.out + said.err + str(told.value)
    assert len(data_files(tmp_path / "run")) > 3
    assert not with_secret(tmp_path)


def with_secret(folder):
    """The files of a folder that a secret of these tests is in."""
    return [path for path in folder.rglob("*") if path.is_file() and b"sesame" in path.read_bytes()]


@pytest.fixture
def secret_files(parts, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(parts.corpus, served / "corpus")
    write_lines(served / "more.jsonl", [{"text": "the gull met the tide. " * 9}])
    write_lines(served / "items.jsonl", [{"question": "whose quokka sold seven umbrellas", "answer": "the tide"}] * 2)
    with servers.SecretFiles(served) as running:
        yield running


@pytest.mark.parametrize("kind", ["password", "signature"])
def test_no_secret_of_a_url_that_was_read_is_written(parts, secret_files, tmp_path, capfd, plain, kind):
    before, after = {"password": ("me:sesame-open@", ""), "signature": ("", "?sig=sesame-signed")}[kind]

    def url(name):
        return f"http://{before}127.0.0.1:{secret_files.port}/{name}{after}"

    folder = tmp_path / "mine"
    first = {**settings(parts), "corpus.input": [url("corpus/a.jsonl")]}
    assert shard(Run(str(folder / "run"), changes=first))["documents"] == 24
    # More input: what is stored of the first is compared with what is there now.
    second = {"corpus.input": [url("corpus/a.jsonl"), url("more.jsonl")]}
    assert shard(Run(str(folder / "run"), changes=second))["documents"] == 25
    asked = ["--name", "asked", "--queries", parts.queries, "--exact", "--workers", "1"]
    assert main(["attribute", str(folder / "run"), *asked]) == 0
    chosen = ["select", str(folder / "run"), "--name", "asked", "--documents", "5", "--out"]
    # The run does not know the secrets, so a command that reads the input again is given them again.
    assert main([*chosen, str(folder / "refused")]) == 1
    assert "access denied" in capfd.readouterr().err
    again = Run(str(folder / "run"), changes={**second, "select.documents": 5})
    assert select(again, ["asked"], str(folder / "chosen"))["kept"]["documents"] == 5
    scan = ["scan", str(folder / "run"), "--set", "scan.influence=false", "--evaluation", url("items.jsonl")]
    scan += ["--out", str(folder / "scans"), "--set", f"corpus.input={url('corpus/a.jsonl')}"]
    hook = f"http://127.0.0.1:{secret_files.port}/services/sesame-hook?key=sesame-query"
    assert main([*scan, "--webhook", hook]) == 1
    said = capfd.readouterr()
    assert "the webhook did not take the summary" in said.err
    secret_files.status = 403
    assert main([*scan, "--night", "next"]) == 1
    for verb in ("shard", "status"):
        main([verb, str(folder / "run"), *(["--input", url("corpus/b.jsonl")] if verb == "shard" else [])])
    for place in ("model.path", "corpus.tokenizer"):
        told = ["attribute", str(folder / "run"), *asked[:4], "--set", f"{place}={url('model')}"]
        main(told if place == "model.path" else ["shard", str(tmp_path / "b"), "--tokenizer", url("model")])
    late = capfd.readouterr()
    assert "access denied" in late.err
    assert "sesame" not in said.out + said.err + late.out + late.err
    assert not with_secret(folder)
