"""The tree is the pipeline: imports run one way, mathematics knows no Ray, no folder holds too much."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stride_ray

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stride_ray"
# What a folder may import: itself and those before it.
ORDER = (
    *(
        "runtime",
        "corpus",
        "models",
        "operators",
        "report",
        "attribution",
        "selection",
        "contamination",
        "evaluate",
        "serve",
    ),
    "cli",
)
# The mathematics: no Ray here, nor in anything that they import of ours.
MATHEMATICS = (
    *(
        "models.sites",
        "models.token_influence",
        "models.linear_algebra.vocabulary",
        "models.linear_algebra.matrices",
        "models.curvature.conjugate_gradients",
        "models.curvature.gauss_newton",
        "models.curvature.moments",
        "models.curvature.sketch",
        "operators.forms",
        "operators.closed_form",
    ),
    *("operators.membership", "operators.one_bit", "operators.training.objective", "attribution.lasso.recovery"),
)


def files():
    return sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Modules of ours that a file imports, where it is or within functions, and whether that is for types alone."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("stride_ray", "benchmarks"):
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if (ROOT / inner.replace(".", "/")).with_suffix(".py").exists() else node.module
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] in ("stride_ray", "benchmarks"))


def arrows():
    """What imports go from folder to folder: (from, to), with the file and the module; the doors are left out."""
    for path in files():
        folder = path.relative_to(PACKAGE).parts[0]
        for module in imported(path) if folder in ORDER else ():
            root, _, inner = module.partition(".")
            to = root if root == "benchmarks" else inner.split(".")[0]
            if to not in ("", folder):
                yield (folder, to), (str(path.relative_to(ROOT)), module)


def test_arrows_run_one_way():
    back = [what for (of, to), what in arrows() if to not in ORDER[: ORDER.index(of)]]
    assert not back


def test_the_page_shows_the_arrows_that_there_are():
    real = {ends for ends, _ in arrows()}
    page = (ROOT / "docs/how-it-works.md").read_text("utf-8").split("flowchart TD")[1].split("```")[0]
    lines = [line.split(" --> ") for line in page.strip().splitlines()]
    assert {(of.strip(), each.strip()) for of, to in lines for each in to.split("&")} == real


def test_no_imports_in_a_circle():
    arrows = {}
    for path in files():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        arrows[name] = {module for module in imported(path) if module != "stride_ray"}
    settled = set()
    while free := {name for name, to in arrows.items() if name not in settled and to <= settled | {name}}:
        settled |= free
    assert not set(arrows) - settled


def test_no_folder_is_too_full_and_no_file_too_long():
    here = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(here) <= 12, sorted(path.name for path in here)
    for folder in {path.parent for path in files()}:
        assert len(list(folder.glob("*.py"))) <= 12, folder
    long = {path.name: lines for path in files() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_mathematics_imports_no_ray():
    code = "import sys; " + "; ".join(f"import stride_ray.{each}" for each in MATHEMATICS)
    subprocess.run([sys.executable, "-c", f"{code}; assert 'ray' not in sys.modules"], check=True)


def test_docstrings_name_files_and_constants_that_are_there():
    text = {path: path.read_text() for path in (*files(), *(ROOT / "tests").glob("*.py"), *ROOT.glob("[jb]*/**/*.py"))}
    lines = "\n".join(text.values()).splitlines()
    constants = {name for line in lines if "=" in line for name in re.findall(r"[A-Z_]{3,}", line.split("=")[0])}
    constants |= {name for line in lines for name in re.findall(r"\"([A-Z_]+)\"", line)}
    ours = [f"/{path.relative_to(ROOT)}" for path in (*text, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]
    for path in files():
        nodes = ast.walk(ast.parse(text[path]))
        documented = [each for each in nodes if isinstance(each, ast.Module | ast.ClassDef | ast.FunctionDef)]
        for docstring in filter(None, map(ast.get_docstring, documented)):
            for name in re.findall(r"(?<![\w./*<…-])([\w/]+\.py|docs/\w+\.md|[A-Z]+\.md)\b", docstring):
                assert name == "file.py" or any(each.endswith(f"/{name}") for each in ours), f"{path}: {name}"
            for name in re.findall(r"\b(?!NUMBA_|RAY_|HF_)[A-Z]{2,}(?:_[A-Z]+)+\b", docstring):
                assert name in constants, f"{path}: {name}"


def test_the_facade_is_lazy_and_whole():
    code = "import stride_ray, sys; assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules); stride_ray.Config"
    subprocess.run([sys.executable, "-c", f"{code}; assert not {{'torch', 'ray'}} & set(sys.modules)"], check=True)
    for name in stride_ray.__all__:
        assert name in dir(stride_ray)
        assert getattr(stride_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'attributes'"):
        _ = stride_ray.attributes
