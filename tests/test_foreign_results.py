"""Results that other projects publish: written as they write them, scored as they score them, refused if malformed."""

import csv
import json
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Bomb
from scipy.stats import spearmanr
from test_benchmark import LENGTHS, QUERY_LENGTHS, write_benchmark, write_results

from jobs.import_truth import main
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.finetune import FineTune
from stride_ray.evaluate.retraining.foreign_results import READERS, import_results
from stride_ray.models.causal_lm import load_model
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

N, Q, S = len(LENGTHS), len(QUERY_LENGTHS), 12


def kronfluence(folder, masks=None, losses=None):
    """As read by Kronfluence's evaluate_lds.py: numpy arrays in files of torch.save."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(LOSSES if losses is None else losses, folder / "losses.pt")
    torch.save(MASKS if masks is None else masks, folder / "masks.pt")


def dattri(folder, values=None, rows=None):
    """What calculate_lds_ground_truth of dattri returns, under the names of its benchmarks."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(-LOSSES) if values is None else values, folder / "target_values_lds.pt")
    torch.save(torch.tensor(ROWS) if rows is None else rows, folder / "indices_lds.pt")


def dattri_experiment(folder, losses=None):
    """What train.py and groundtruth.py of dattri's GPT-2 and WikiText experiment write."""
    for number, rows in enumerate(ROWS):
        (folder / f"checkpoints/{number}").mkdir(parents=True)
        with open(folder / f"checkpoints/{number}/train_index.csv", "w", newline="") as file:
            csv.writer(file).writerow(rows)
    log_p = torch.from_numpy(-LOSSES if losses is None else -losses)
    torch.save(log_p - torch.log(1 - torch.exp(log_p)), folder / "gt.pt")


def bergson(folder, losses=None, parts=((0, S),), removed=None, config="    subset_weight: 0.0\n"):
    """A run folder of bergson's magic: subsets left out, and baselines minus losses as it writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = LOSSES if losses is None else losses
    baselines = np.float32(3) + np.arange(Q, dtype=np.float32) / 8
    (folder / "subsets.json").write_text(json.dumps(REMOVED if removed is None else removed))
    (folder / "config.yaml").write_text(f"steps:\n- magicconfig:\n{config}")
    for start, stop in parts:
        suffix = "" if (start, stop) == (0, S) else f"_{start}_{stop}"
        diffs = [[s, q, float(baselines[q] - losses[s, q]), 0.5] for s in range(start, stop) for q in range(Q)]
        write_csv(folder / f"validation{suffix}.csv", ["subset", "query", "diff", "score_sum"], diffs)
        summary = [[q, 0.5, 0.1, 0.5, 0.1, stop - start, float(baselines[q])] for q in range(Q)]
        names = ["query", "spearman_corr", "spearman_p", "pearson_corr", "pearson_p", "N", "baseline_loss"]
        write_csv(folder / f"summary{suffix}.csv", names, summary)


def write_csv(path, names, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def drawn():
    """Subsets of the pool, and losses that fall with what a random matrix of scores says of them."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(N)[: N // 2].tolist() for _ in range(S)]
    masks = np.zeros((S, N), bool)
    for mask, chosen in zip(masks, rows, strict=True):
        mask[chosen] = True
    scores = rng.standard_normal((Q, N)).astype(np.float32)
    noise = rng.standard_normal((S, Q))
    losses = (4 - 0.05 * (masks @ scores.T) + 0.1 * noise).astype(np.float32)
    return rows, masks, scores, losses, [np.flatnonzero(~mask).tolist() for mask in masks]


ROWS, MASKS, SCORES, LOSSES, REMOVED = drawn()
# By form: who wrote it, how, and the LDS by the project's own formula, with scipy's correlation.
FORMS = {
    "kronfluence": (kronfluence, lambda: [spearmanr(-(MASKS @ SCORES.T)[:, q], LOSSES[:, q]) for q in range(Q)]),
    "dattri": (
        dattri,
        lambda: [spearmanr([SCORES[q, rows].sum() for rows in ROWS], -LOSSES[:, q]) for q in range(Q)],
    ),
    "dattri/lds": (
        lambda folder: dattri(folder / "lds"),
        lambda: [spearmanr([SCORES[q, rows].sum() for rows in ROWS], -LOSSES[:, q]) for q in range(Q)],
    ),
    "dattri/experiment": (
        dattri_experiment,
        lambda: [spearmanr([SCORES[q, rows].sum() for rows in ROWS], -LOSSES[:, q]) for q in range(Q)],
    ),
    "bergson": (
        bergson,
        lambda: [spearmanr([-SCORES[q, out].sum() for out in REMOVED], -LOSSES[:, q]) for q in range(Q)],
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("foreign") / "made", start=False)


@pytest.fixture
def benchmark(made, tmp_path):
    shutil.copytree(made, tmp_path / "benchmark")
    return str(tmp_path / "benchmark")


@pytest.mark.parametrize("form", FORMS)
def test_lds_is_the_projects_own(form, benchmark, tmp_path, capsys):
    write, formula = FORMS[form]
    write(tmp_path / "files")
    project = form.partition("/")[0]
    assert main(["--from", project, "--files", str(tmp_path / "files"), "--benchmark", benchmark]) == 0
    assert f"{S} subsets of {N // 2} of {N} blocks, 1 seed(s) from {project}" in capsys.readouterr().out
    read = read_benchmark(benchmark)
    truth = read.retrained()
    assert truth.names == (project,)
    assert [rows.tolist() for rows in truth.subsets] == [sorted(rows) for rows in ROWS]
    np.testing.assert_allclose(truth.losses[0], LOSSES, rtol=1e-5)
    figure, _, _ = read.lds(SCORES)["all, all"]
    theirs = np.mean([found.statistic for found in formula()])
    assert figure == pytest.approx(theirs, abs=1e-9)
    assert figure > 0.5


@pytest.mark.parametrize("kind", ["int64", "float32", "uint8"])
def test_masks_may_be_numbers(kind, tmp_path):
    kronfluence(tmp_path, masks=MASKS.astype(kind), losses=LOSSES.astype(np.float64))
    read = READERS["kronfluence"](Store(str(tmp_path)), N, None)
    assert [rows.tolist() for rows in read.subsets] == [sorted(rows) for rows in ROWS]


def test_arrays_that_numpy_1_wrote(tmp_path):
    kronfluence(tmp_path)
    shutil.move(tmp_path / "masks.pt", tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "masks.pt", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert b"numpy._core.multiarray" in new.read("masks/data.pkl")
    read = READERS["kronfluence"](Store(str(tmp_path)), N, None)
    assert [rows.tolist() for rows in read.subsets] == [sorted(rows) for rows in ROWS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_target_values_of_any_precision(dtype, tmp_path):
    dattri(tmp_path, values=torch.from_numpy(-LOSSES).to(dtype).requires_grad_())
    read = READERS["dattri"](Store(str(tmp_path)), N, None)
    np.testing.assert_allclose(read.losses[0], LOSSES, rtol=0.01)


def test_several_folders_are_seeds(benchmark, tmp_path):
    other = LOSSES + np.random.default_rng(1).random(LOSSES.shape).astype(np.float32) / 100
    bergson(tmp_path / "a")
    bergson(tmp_path / "b", losses=other)
    done = import_results(read_benchmark(benchmark), "bergson", [str(tmp_path / name) for name in "ab"])
    assert (done["seeds"], done["files"]) == (2, ["retraining_bergson0.npz", "retraining_bergson1.npz"])
    truth = read_benchmark(benchmark).retrained()
    assert truth.names == ("bergson0", "bergson1")
    np.testing.assert_allclose(truth.losses, np.stack([LOSSES, other]), rtol=1e-6)
    bergson(tmp_path / "c", removed=[*REMOVED[1:], REMOVED[0]])
    with pytest.raises(StrideError, match=r"c/ and .*a/ differ at subset 0"):
        import_results(read_benchmark(benchmark), "bergson", [str(tmp_path / name) for name in "ac"])
    with pytest.raises(StrideError, match="given twice"):
        import_results(read_benchmark(benchmark), "bergson", [str(tmp_path / "a")] * 2)


def test_a_run_in_parts(tmp_path):
    bergson(tmp_path, parts=((0, 3), (3, 5), (10, 12)))
    read = READERS["bergson"](Store(str(tmp_path)), N, None)
    done = [0, 1, 2, 3, 4, 10, 11]
    assert [rows.tolist() for rows in read.subsets] == [sorted(ROWS[number]) for number in done]
    np.testing.assert_allclose(read.losses[0], LOSSES[done], rtol=1e-6)


def test_values_of_another_meaning_are_named(benchmark, tmp_path):
    dattri(tmp_path, values=torch.from_numpy(LOSSES))  # as dattri before it negated the values
    with pytest.raises(StrideError, match=r"target_values_lds.pt holds .* cannot be a negative loss; .*--values loss"):
        import_results(read_benchmark(benchmark), "dattri", [str(tmp_path)])
    import_results(read_benchmark(benchmark), "dattri", [str(tmp_path)], values="loss")
    np.testing.assert_allclose(read_benchmark(benchmark).retrained().losses[0], LOSSES, rtol=1e-6)


def test_queries_in_another_order_are_noticed(benchmark, tmp_path):
    read = read_benchmark(benchmark)
    own = FineTune(read).losses(load_model(read.model).model)
    for order, low in ((np.arange(Q), False), (np.argsort(np.argsort(-own)), True)):
        ranked = np.sort(own)[order] if low else own
        kronfluence(tmp_path / "files", losses=ranked + LOSSES / 1000)
        done = import_results(read, "kronfluence", [str(tmp_path / "files")])
        assert (done["agreement"] < 0.5) == ("That is low" in done["summary"]) == low
    assert done["agreement"] == pytest.approx(-1)


def test_other_results_stay(benchmark, tmp_path, capsys):
    write_results(benchmark)
    kronfluence(tmp_path / "files")
    words = ["--from", "kronfluence", "--files", str(tmp_path / "files"), "--benchmark", benchmark]
    assert main(words) == 1
    assert "retraining_seed0.npz already exists; import into a copy" in capsys.readouterr().err
    assert read_benchmark(benchmark).retrained().names == ("seed0", "seed1")


def test_importing_again_replaces(benchmark, tmp_path):
    for losses in (LOSSES, LOSSES * 2):
        kronfluence(tmp_path / "files", losses=losses)
        import_results(read_benchmark(benchmark), "kronfluence", [str(tmp_path / "files")])
        np.testing.assert_array_equal(read_benchmark(benchmark).retrained().losses[0], losses)


@pytest.mark.parametrize(
    ("project", "write", "name"),
    [
        ("kronfluence", kronfluence, "losses.pt"),
        ("kronfluence", kronfluence, "masks.pt"),
        ("dattri", dattri, "target_values_lds.pt"),
        ("dattri", dattri, "indices_lds.pt"),
        ("dattri", dattri_experiment, "gt.pt"),
    ],
)
def test_code_in_a_file_is_refused_and_not_run(project, write, name, tmp_path):
    write(tmp_path / "files")
    mark = tmp_path / "mark"
    torch.save([torch.zeros(2), Bomb(str(mark))], tmp_path / "files" / name)
    with pytest.raises(StrideError, match=rf"{name} calls posix.mkdir, .*none of it was run"):
        READERS[project](Store(str(tmp_path / "files")), N, None)
    assert not mark.exists()
    torch.load(tmp_path / "files" / name, weights_only=False)
    assert mark.exists()  # it would have run


def with_value(array, place, value):
    changed = array.copy()
    changed[place] = value
    return changed


def lines(path, change):
    """Rewrite a text file's lines."""
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))), newline="")


BAD = {
    "no losses": ("kronfluence", lambda at: (at.root / "losses.pt").unlink(), "has no losses.pt; results from kron"),
    "no folder": ("kronfluence", lambda at: shutil.rmtree(at.root), "has no losses.pt and no masks.pt"),
    "short masks": ("kronfluence", lambda at: kronfluence(at.root, masks=MASKS[:, 1:]), "covers 23 training sequences"),
    "flat masks": ("kronfluence", lambda at: kronfluence(at.root, masks=MASKS[0]), r"must be masks, .*shape \(24,\)"),
    "masks of dates": ("kronfluence", lambda at: kronfluence(at.root, masks=MASKS.astype("M8[s]")), "not a tensor or"),
    "complex masks": ("kronfluence", lambda at: kronfluence(at.root, masks=MASKS * 1j), "masks.pt is not a tensor"),
    "odd mask": (
        "kronfluence",
        lambda at: kronfluence(at.root, masks=with_value(MASKS.astype(int), (3, 4), 2)),
        "the mask of subset 3 is 2 at row 4, not 0 or 1",
    ),
    "mask with nan": (
        "kronfluence",
        lambda at: kronfluence(at.root, masks=with_value(MASKS.astype(float), (0, 1), np.nan)),
        "the mask of subset 0 is nan at row 1",
    ),
    "empty subset": (
        "kronfluence",
        lambda at: kronfluence(at.root, masks=with_value(MASKS, 5, 0)),
        "subset 5 is empty",
    ),
    "no subset": (
        "kronfluence",
        lambda at: kronfluence(at.root, masks=MASKS[:0], losses=LOSSES[:0]),
        "losses.pt holds no subset",
    ),
    "fewer masks": ("kronfluence", lambda at: kronfluence(at.root, masks=MASKS[1:]), "11 subsets, and losses of shape"),
    "nan": (
        "kronfluence",
        lambda at: kronfluence(at.root, losses=with_value(LOSSES, (2, 3), np.nan)),
        "losses.pt: the loss of query 3 after subset 2 is not finite",
    ),
    "margins": ("kronfluence", lambda at: kronfluence(at.root, losses=-LOSSES), "cannot be a loss; .*negative-loss or"),
    "objects": ("kronfluence", lambda at: kronfluence(at.root, losses=LOSSES.astype(object)), "not a tensor or an ar"),
    "a dictionary": ("kronfluence", lambda at: kronfluence(at.root, losses={"a": 1}), "losses.pt holds a dict"),
    "a pointer": (
        "kronfluence",
        lambda at: (at.root / "losses.pt").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "losses.pt is not a tensor .*Git LFS",
    ),
    "an empty file": ("kronfluence", lambda at: (at.root / "losses.pt").write_text(""), "losses.pt is not a tensor"),
    "a mask for rows": (
        "dattri",
        lambda at: dattri(at.root, rows=torch.from_numpy(MASKS)),
        "row numbers, .*holds bool",
    ),
    "floats for rows": (
        "dattri",
        lambda at: dattri(at.root, rows=torch.tensor(ROWS) * 1.0),
        "it holds float64 of shape",
    ),
    "a negative row": ("dattri", lambda at: dattri(at.root, rows=torch.tensor(ROWS) - 9), "subset 0 has a negative or"),
    "a repeated row": (
        "dattri",
        lambda at: dattri(at.root, rows=torch.tensor(ROWS) // 2),
        "subset 0 has a negative or a repeated pool row",
    ),
    "no indices": (
        "dattri",
        lambda at: (at.root / "indices_lds.pt").unlink(),
        "has no indices_lds.pt; results from da",
    ),
    "infinite": (
        "dattri",
        lambda at: dattri(at.root, values=torch.full((S, Q), -torch.inf)),
        "query 0 after subset 0 is not finite",
    ),
    "values and rows swapped": (
        "dattri",
        lambda at: dattri(at.root, values=torch.tensor(ROWS), rows=torch.from_numpy(LOSSES)),
        "indices_lds.pt must be row numbers",
    ),
    "only models": (
        "dattri",
        lambda at: (
            [path.unlink() for path in at.root.iterdir()],
            (at.root / "metadata.yml").write_text("mode: lds\n"),
        ),
        "holds retrained models and no target values; compute them with dattri's calculate_lds_ground_truth",
    ),
    "no subset's rows": (
        "dattri/experiment",
        lambda at: (at.root / "checkpoints/7/train_index.csv").unlink(),
        "checkpoints/7/train_index.csv: no such file",
    ),
    "odd rows": (
        "dattri/experiment",
        lambda at: (at.root / "checkpoints/7/train_index.csv").write_text("1,2,x\n"),
        "checkpoints/7/train_index.csv holds 'x'; it must hold row numbers only",
    ),
    "no subsets": ("bergson", lambda at: (at.root / "subsets.json").unlink(), "has no subsets.json; results from be"),
    "cut subsets": (
        "bergson",
        lambda at: lines(at.root / "subsets.json", lambda text: [text[0][:-30]]),
        "subsets.json is not valid JSON",
    ),
    "subsets in a dictionary": (
        "bergson",
        lambda at: bergson(at.root, removed={"a": 1}),
        "must be a list with one list of documents per subset",
    ),
    "odd documents": (
        "bergson",
        lambda at: bergson(at.root, removed=[["x"], *REMOVED[1:]]),
        "subsets.json: subset 0 must be a flat list of row numbers",
    ),
    "a large document": (
        "bergson",
        lambda at: bergson(at.root, removed=[*REMOVED[:-1], [3, 24]]),
        "subset 11 leaves out document 24, and the pool has 24 rows",
    ),
    "a negative document": (
        "bergson",
        lambda at: bergson(at.root, removed=[[3, -1], *REMOVED[1:]]),
        "subset 0 leaves out document -1, and the pool has 24 rows",
    ),
    "a document twice": (
        "bergson",
        lambda at: bergson(at.root, removed=[[3, 3], *REMOVED[1:]]),
        "lists a document twi",
    ),
    "nothing left out": ("bergson", lambda at: bergson(at.root, removed=[[], *REMOVED[1:]]), "subset 0 leaves out no"),
    "all left out": (
        "bergson",
        lambda at: bergson(at.root, removed=[list(range(N)), *REMOVED[1:]]),
        "subset 0 is empty",
    ),
    "too few subsets": ("bergson", lambda at: bergson(at.root, removed=REMOVED[:3]), "3 subsets, .*after subset 11"),
    "no list at all": ("bergson", lambda at: bergson(at.root, removed=[]), "has 0 subsets, and the validation"),
    "another weight": (
        "bergson",
        lambda at: bergson(at.root, config="    subset_weight: 2.0\n"),
        "config.yaml has subset_weight: 2.0; only results of leaving documents out",
    ),
    "no validation": ("bergson", lambda at: (at.root / "validation.csv").unlink(), "has no validation.csv"),
    "no summary": ("bergson", lambda at: (at.root / "summary.csv").unlink(), "has no summary.csv, .*finish the run"),
    "a missing query": (
        "bergson",
        lambda at: lines(at.root / "validation.csv", lambda text: text[:7] + text[8:]),
        "subset 1 has no row for query 1; was the run interrupted",
    ),
    "a missing subset": (
        "bergson",
        lambda at: lines(at.root / "validation.csv", lambda text: text[: -2 * Q]),
        "losses after 10 subsets, and summary.csv counts 12",
    ),
    "a row twice": (
        "bergson",
        lambda at: lines(at.root / "validation.csv", lambda text: [*text, text[-1]]),
        "line 62: subset 11 and query 4 have a row before",
    ),
    "a cut row": (
        "bergson",
        lambda at: lines(at.root / "validation.csv", lambda text: [*text[:-1], "11,4\r\n"]),
        "validation.csv, line 61, lacks a number",
    ),
    "a cut number": (
        "bergson",
        lambda at: lines(at.root / "summary.csv", lambda text: [*text[:-1], text[-1][:-4]]),
        "summary.csv does not end with a line break",
    ),
    "an endless field": (
        "bergson",
        lambda at: lines(at.root / "validation.csv", lambda text: [*text[:-1], f"11,4,{'1' * 200_000},0.5\r\n"]),
        "after line 60, is not valid CSV",
    ),
    "another table": (
        "bergson",
        lambda at: lines(at.root / "validation.csv", lambda text: ["lr,query\r\n", *text[1:]]),
        "validation.csv has no column diff",
    ),
    "no baseline": (
        "bergson",
        lambda at: lines(at.root / "summary.csv", lambda text: text[:-1]),
        "line 6: query 4 has no baseline_loss in summary.csv",
    ),
    "a negative query": (
        "bergson",
        lambda at: lines(at.root / "validation.csv", lambda text: [*text[:-1], "11,-1,0.5,0.5\r\n"]),
        "line 61, has a negative number",
    ),
    "not finite": (
        "bergson",
        lambda at: bergson(at.root, losses=with_value(LOSSES, (4, 2), np.nan)),
        "the loss of query 2 after subset 4 is not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_errors_in_a_sentence(case, tmp_path):
    form, spoil, message = BAD[case]
    FORMS[form][0](tmp_path / "files")
    READERS[form.partition("/")[0]](Store(str(tmp_path / "files")), N, None)  # sound before
    spoil(SimpleNamespace(root=tmp_path / "files"))
    with pytest.raises(StrideError, match=message):
        READERS[form.partition("/")[0]](Store(str(tmp_path / "files")), N, None)


def test_bergsons_files_have_one_meaning(tmp_path):
    bergson(tmp_path)
    with pytest.raises(StrideError, match="leave out --values"):
        READERS["bergson"](Store(str(tmp_path)), N, "log-odds")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda at: kronfluence(at, losses=LOSSES[:, 1:]), "4 losses a subset, and there are 5 queries"),
        (lambda at: kronfluence(at, losses=LOSSES[:, :1]), "has one loss per subset, and there are 5 queries"),
        (lambda at: kronfluence(at, masks=np.ones((S, N + 1))), "covers 25 training sequences, and the pool has 24"),
    ],
)
def test_results_of_other_queries_or_another_pool(write, message, benchmark, tmp_path, capsys):
    write(tmp_path / "files")
    words = ["--from", "kronfluence", "--files", str(tmp_path / "files"), "--benchmark", benchmark]
    assert main(words) == 1
    assert message in capsys.readouterr().err
    assert read_benchmark(benchmark).truth is None


def test_rows_outside_the_pool(benchmark, tmp_path):
    dattri(tmp_path, rows=torch.tensor(ROWS) + 1)
    with pytest.raises(StrideError, match="holds pool row 24, and the pool has 24 rows"):
        import_results(read_benchmark(benchmark), "dattri", [str(tmp_path)])


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("kronfluence", "losses.pt"),
        ("dattri", "indices_lds.pt"),
        ("bergson", "subsets.json"),
        ("bergson", "summary.csv"),
        ("bergson", "validation.csv"),
    ],
)
def test_a_truncated_file_is_an_error(form, name, tmp_path):
    FORMS[form][0](tmp_path)
    whole = (tmp_path / name).read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(StrideError):
            READERS[form](Store(str(tmp_path)), N, None)


@pytest.mark.parametrize("name", ["losses.pt", "masks.pt"])
def test_no_changed_byte_ends_in_a_traceback(name, tmp_path):
    kronfluence(tmp_path)
    whole, refused = (tmp_path / name).read_bytes(), 0
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        changed = bytearray(whole)
        changed[place] ^= 0x5F
        (tmp_path / name).write_bytes(bytes(changed))
        try:
            READERS["kronfluence"](Store(str(tmp_path)), N, None)
        except StrideError:
            refused += 1
    assert refused > 5
