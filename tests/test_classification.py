"""Classifiers as causal language models of two tokens: losses, gradients and benchmarks against plain torch."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_plainly

from stride_ray.evaluate.baselines.gradient import graddot
from stride_ray.evaluate.baselines.representation import featsim
from stride_ray.evaluate.comparison import stride_variants
from stride_ray.evaluate.retraining.classification import (
    LabelledExamples,
    Patches,
    _untrained,
    load_examples,
    write_benchmark,
)
from stride_ray.evaluate.retraining.finetune import checkpoints, fine_tune
from stride_ray.models.causal_lm import load_model
from stride_ray.models.sites import find_sites
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.storage import Store

N, Q, C, F = 40, 8, 3, 5
WHOLE = Patches(0, (1, 1))
SHORT = {"epochs": 12, "batch": 8, "learning_rate": 0.02, "warmup_steps": 2}


def blobs(seed=0):
    """Three clouds of points."""
    rng = np.random.default_rng(seed)
    labels = np.arange(N + Q) % C
    centres = 2 * rng.standard_normal((C, F))
    features = (centres[labels] + rng.standard_normal((N + Q, F))).astype(np.float32)
    return LabelledExamples(features, labels, ("a", "b", "c"))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A benchmark of the clouds; tests only read it."""
    return write_benchmark(blobs(), str(tmp_path_factory.mktemp("clouds") / "benchmark"), Q, 8, 2, SHORT)


@pytest.fixture(scope="module")
def split(benchmark):
    """Its model."""
    return load_model(benchmark.model)


def layers_of(split):
    """The three linear maps."""
    return [*(layer.map for layer in split.layers), split.model.lm_head]


def plain_logits(split, texts):
    """The MLP in plain torch: (n, C), and the penultimate features."""
    h = split.model.model.features.weight[torch.from_numpy(texts.ids[:, 0].astype(np.int64))]
    *hidden, head = layers_of(split)
    for layer in hidden:
        h = torch.relu(h @ layer.weight.T + layer.bias)
    return h @ head.weight.T + head.bias, h


def plain_losses(split, texts):
    labels = torch.from_numpy(texts.ids[:, 1].astype(np.int64))
    return torch.nn.functional.cross_entropy(plain_logits(split, texts)[0], labels, reduction="none")


def test_the_next_tokens_loss_is_the_classifiers(benchmark, split):
    ids, mask = (torch.from_numpy(each) for each in (benchmark.queries.ids, benchmark.queries.mask))
    found = split.losses(split.trunk(ids), ids, mask)
    torch.testing.assert_close(found, plain_losses(split, benchmark.queries))
    assert split.vocabulary == C
    np.testing.assert_allclose(fine_tune(benchmark).losses(split.model), found.numpy(), rtol=1e-5)


def test_features_are_standardised_by_the_pool_and_never_trained(benchmark, split):
    examples = benchmark.blocks.ids[:, 0]
    features = split.model.model.features.weight[examples].numpy()
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(0), 1, atol=1e-4)
    assert not split.model.model.features.weight[:C].any()
    assert find_sites(split) == ("model.layers.0.map", "model.layers.1.map", "head")
    recipe = fine_tune(benchmark)
    one, other = (recipe.train(np.arange(4), seed) for seed in (0, 1))
    assert torch.equal(one.model.features.weight, split.model.model.features.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_the_model_has_learnt_to_classify(benchmark, split):
    labels = benchmark.queries.ids[:, 1]
    assert (plain_logits(split, benchmark.queries)[0].argmax(1).numpy() == labels).mean() > 0.8
    assert (len(benchmark.queries), len(benchmark.blocks)) == (Q, N)
    assert list(benchmark.parts) == ["development"] * (Q // 2) + ["report"] * (Q // 2)


def test_gradients_and_features_are_those_of_plain_torch(benchmark, split):
    weights = [layer.weight.requires_grad_(True) for layer in layers_of(split)]
    try:
        gradients = [
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
                for loss in plain_losses(split, texts)
            ]
            for texts in (benchmark.queries, benchmark.blocks)
        ]
    finally:
        split.model.requires_grad_(False)
    queries, blocks = map(torch.stack, gradients)
    np.testing.assert_allclose(graddot.scores(benchmark.problem()), (queries @ blocks.T).numpy(), rtol=1e-3, atol=1e-5)
    found = [
        torch.nn.functional.normalize(plain_logits(split, texts)[1]) for texts in (benchmark.queries, benchmark.blocks)
    ]
    np.testing.assert_allclose(
        featsim.scores(benchmark.problem()), (found[0] @ found[1].T).numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("slug", ["stride-exact", "stride", "stride-logit"])
def test_examples_of_the_querys_class_help_it_most(benchmark, slug, tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    runs, compute = Store(str(tmp_path)), ComputeConfig(workers=1)
    stride_variants.shard_pool(benchmark, runs, compute)
    variant = next(each for each in stride_variants.VARIANTS if each.slug == slug)
    scores, _, _ = stride_variants.score(benchmark, variant, runs, compute)
    same = benchmark.queries.ids[:, 1:] == benchmark.blocks.ids[:, 1]
    gains = [row[alike].mean() - row[~alike].mean() for row, alike in zip(scores, same, strict=True)]
    assert np.median(gains) > 0
    assert np.mean(np.array(gains) > 0) >= 0.75, gains


def test_scores_over_checkpoints_are_the_sum_of_theirs(benchmark, tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    runs, compute = Store(str(tmp_path / "runs")), ComputeConfig(workers=1)
    stride_variants.shard_pool(benchmark, runs, compute)
    folders, _ = checkpoints(benchmark, str(tmp_path / "checkpoints"))
    variant = next(each for each in stride_variants.VARIANTS if each.checkpoints)
    found, _, _ = stride_variants.score(benchmark, replace(variant, checkpoints=3), runs, compute, folders)
    expected = 0
    for folder in (folders[3], folders[7], folders[11]):
        there = replace(benchmark, model=folder, initial=None)
        once = replace(variant, checkpoints=0, changes={**variant.changes, "corpus.tokenizer": f"{runs.url}/tokenizer"})
        scores, _, _ = stride_variants.score(there, once, runs, compute)
        expected += scores / scores.std()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert variant.identity != replace(variant, checkpoints=0).identity


def test_a_finished_folder_is_read_and_another_refused(benchmark, monkeypatch):
    monkeypatch.setattr("stride_ray.evaluate.retraining.classification.fine_tune", None)  # nothing is trained
    again = write_benchmark(blobs(), benchmark.url, Q, 8, 2, SHORT)
    assert again.fingerprint == benchmark.fingerprint
    with pytest.raises(StrideError, match="was made with hidden_size = 8, and this command has 16"):
        write_benchmark(blobs(), benchmark.url, Q, 16, 2, SHORT)
    with pytest.raises(StrideError, match="was made with examples = "):
        write_benchmark(blobs(1), benchmark.url, Q, 8, 2, SHORT)
    with pytest.raises(StrideError, match="48 queries of 48 examples leave none to train on"):
        write_benchmark(blobs(), benchmark.url, N + Q)


def test_examples_by_name_and_from_a_table(tmp_path):
    digits = load_examples("digits")
    assert (digits.features.shape, digits.image, digits.classes) == ((1797, 64), (8, 8), tuple("0123456789"))
    cancer = load_examples("breast_cancer")
    assert (cancer.classes, cancer.image) == (("malignant", "benign"), None)
    assert (len(cancer.feature_names), cancer.feature_names[0]) == (30, "mean radius")
    (tmp_path / "t.csv").write_text("name,x,y,kind\na,1,0.5,yes\nb,2,1.5,no\n")
    found = load_examples(str(tmp_path / "t.csv"), "kind", ["name"])
    assert found.features.tolist() == [[1, 0.5], [2, 1.5]]
    assert (found.labels.tolist(), found.classes) == ([1, 0], ("no", "yes"))
    assert (found.image, found.feature_names) == (None, ("x", "y"))


def test_images_and_names_have_to_fit_the_features():
    features, labels = np.zeros((2, 6)), np.array([0, 1])
    with pytest.raises(StrideError, match="An image of 2 × 4 pixels has 8 features, not 6"):
        LabelledExamples(features, labels, ("a", "b"), (2, 4))
    with pytest.raises(StrideError, match="There are 1 feature names for 6 features"):
        LabelledExamples(features, labels, ("a", "b"), feature_names=("x",))


@pytest.mark.parametrize(
    ("text", "label", "drop", "sentence"),
    [
        ("x,kind\n1,a\n2,b\n", "sort", [], "has no column 'sort'; its columns are x, kind"),
        ("x,kind\n1,a\n2,b\n", "kind", ["z"], "has no column 'z'"),
        ("x,kind\nv,a\nw,b\n", "kind", [], "column 'x' holds string, not numbers; drop it"),
        ("x,kind\n1,a\nnan,b\n", "kind", [], "row 1: column 'x' has no finite number"),
        ("x,kind\n1,a\n2,a\n", "kind", [], "column 'kind' names 1 classes; it needs at least two"),
        ("x,kind\n1,a\n2,\n", "kind", [], "row 1: column 'kind' names no class there"),
        ("x,kind\n1,NA\n2,b\n", "kind", [], "row 0: column 'kind' names no class there"),
        ("x,kind\n1,a\n2,b\n", "", [], "give the column of the classes as label; its columns are x, kind"),
        ("x,kind\n1,a\n2,b\n", "kind", ["x"], "has no features"),
        ("x,x,kind\n1,1,a\n2,2,b\n", "kind", [], "has two columns named 'x'; rename one"),
        ("x,kind,caf\xe9\n1,a,2\n2,b,3\n", "kind", [], "names of its columns are not UTF-8"),
        ("x,kind\n1,\xe9\n2,b\n", "kind", [], "column 'kind' holds binary, not names of classes in UTF-8"),
        ("", "kind", [], "cannot be read as a table"),
    ],
)
def test_tables_that_are_no_examples(tmp_path, text, label, drop, sentence):
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(StrideError, match=sentence):
        load_examples(str(tmp_path / "t.csv"), label, drop)


def parquet_examples(tmp_path, x, kind, name="t.parquet"):
    """Examples of a Parquet file with these columns."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"x": x, "kind": kind}), path)
    return load_examples(str(path), "kind")


@pytest.mark.parametrize("scale", [1, 1e-8, 1e-40, 1e30, 1e300])
@pytest.mark.parametrize("offset", [0, 1000])
def test_features_of_any_scale_are_standardised(tmp_path, scale, offset):
    found = parquet_examples(tmp_path, scale * (offset + np.arange(20.0)), ["a", "b"] * 10)
    weights = _untrained(found, np.arange(20), WHOLE, 4, 1).model.features.weight[2:, 0].numpy()
    np.testing.assert_allclose(weights, (np.arange(20) - 9.5) / np.arange(20).std(), rtol=1e-4)


@pytest.mark.parametrize("x", [2**40 + np.arange(20), 1e8 + np.arange(20), np.arange(20, dtype=np.uint8)])
def test_whole_numbers_beyond_float32_are_features(tmp_path, x):
    found = parquet_examples(tmp_path, x, ["a", "b"] * 10)
    weights = _untrained(found, np.arange(20), WHOLE, 4, 1).model.features.weight[2:, 0].numpy()
    np.testing.assert_allclose(weights, (np.arange(20) - 9.5) / np.arange(20).std(), rtol=1e-3)


def test_a_feature_that_the_pool_does_not_vary_in_is_zero(tmp_path):
    found = parquet_examples(tmp_path, np.full(20, 14.62), ["a", "b"] * 10)
    assert not _untrained(found, np.arange(20), WHOLE, 4, 1).model.features.weight.any()


@pytest.mark.parametrize("kind", [pa.array(["a", "b"]).dictionary_encode(), [True, False], [1, 2], [1.0, 2.0]])
@pytest.mark.parametrize("name", ["t.parquet", "T.PARQUET", "t.pq", "run=3/t.parquet"])
def test_classes_of_any_plain_type_in_any_parquet_file(tmp_path, kind, name):
    found = parquet_examples(tmp_path, [1.0, 2.0], kind, name)
    assert (found.features.shape, len(found.classes), set(found.labels.tolist())) == ((2, 1), 2, {0, 1})


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ([1.0, float("nan")], "row 1: column 'kind' names no class there"),
        (["a", " "], "row 1: column 'kind' names no class there"),
        ([["a"], ["b"]], "column 'kind' holds list"),
        ([b"a", b"b"], "column 'kind' holds binary"),
    ],
)
def test_columns_that_name_no_classes(tmp_path, kind, sentence):
    with pytest.raises(StrideError, match=sentence):
        parquet_examples(tmp_path, [1.0, 2.0], kind)


@pytest.mark.parametrize(
    ("sizes", "hyperparameters", "sentence"),
    [
        ((0, 8, 2), {}, "0 queries cannot be drawn"),
        ((Q, 0, 2), {}, "hidden_size is 0; it must be at least 1"),
        ((Q, 8, 0), {}, "layers is 0; it must be at least 1"),
        ((Q, 8, 2), {"epochs": 0}, "epochs is 0; it must be a whole number of at least 1"),
        ((Q, 8, 2), {"batch": 2.5}, "batch is 2.5; it must be a whole number"),
        ((Q, 8, 2), {"learning_rate": float("nan")}, "learning_rate is nan; it must be a number above 0"),
        ((Q, 8, 2), {"bfloat16": "false"}, "bfloat16 is 'false'; it must be true or false"),
        ((Q, 8, 2), {"device": "tpu"}, "device is 'tpu'; it must be auto, cpu or cuda"),
        ((Q, 8, 2), {"beta1": 1}, "beta1 is 1; it must be a number from 0 to below 1"),
        ((Q, 8, 2), {"lr": 1}, "'lr' is not a hyperparameter of FineTune"),
    ],
)
def test_arguments_that_make_no_model_claim_no_folder(tmp_path, sizes, hyperparameters, sentence):
    with pytest.raises(StrideError, match=sentence):
        write_benchmark(blobs(), str(tmp_path / "b"), *sizes, hyperparameters)
    assert not (tmp_path / "b").exists()


def test_a_training_that_diverges_is_told(tmp_path):
    with pytest.raises(StrideError, match="losses are not finite; lower learning_rate"):
        write_benchmark(blobs(), str(tmp_path / "b"), Q, 8, 2, {**SHORT, "learning_rate": 1e30})


def test_a_recipe_that_cannot_be_is_told_with_its_file(benchmark):
    for changes, sentence in (({"epochs": "3"}, "epochs is '3'"), ({"epoch": 3}, "'epoch' is not a hyperparameter")):
        with pytest.raises(StrideError, match=f"{benchmark.url}/recipe.json: {sentence}"):
            fine_tune(replace(benchmark, hyperparameters=changes))


def test_a_folder_may_be_a_url():
    made = write_benchmark(blobs(), "memory://clouds", Q, 8, 2, SHORT)
    assert (len(made.queries), len(made.blocks)) == (Q, N)


def test_a_method_that_is_none_is_told_before_anything_is_made(tmp_path, capsys):
    from jobs.classification import main

    assert main(["--examples", "digits", "--out", str(tmp_path / "out"), "--methods", "random,ekfak"]) == 1
    assert "Unknown method 'ekfak'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_named_set_takes_no_columns():
    with pytest.raises(StrideError, match="digits has its own classes and features; leave out label and drop"):
        load_examples("digits", "kind")


def test_a_name_that_is_none():
    with pytest.raises(StrideError, match="none of digits, breast_cancer, mnist, and cannot be read"):
        load_examples("iris")


def test_the_weights_that_training_began_from_are_kept_and_not_shared(benchmark):
    recipe = fine_tune(benchmark, device="cpu")
    assert benchmark.start is None  # a retraining draws its own weights
    assert benchmark.problem().start == benchmark.initial

    def weights(model):
        return torch.cat([each.flatten() for name, each in model.state_dict().items() if "features" not in name])

    began, trained = (
        weights(load_model(folder, device="cpu").model) for folder in (benchmark.initial, benchmark.model)
    )
    torch.testing.assert_close(weights(recipe.initial_model(0)), began)
    torch.testing.assert_close(weights(recipe.train(np.arange(N), 0)), trained)
    assert not torch.allclose(weights(recipe.initial_model(1)), began)


def test_negative_scores_may_be_whole(benchmark, tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    runs, compute = Store(str(tmp_path)), ComputeConfig(workers=1)
    stride_variants.shard_pool(benchmark, runs, compute)
    found = {}
    for scale in (0.25, 1.0):
        for exact in (True, False):
            changes = {"attribute.exact": exact, "attribute.negative_scale": scale}
            variant = stride_variants.Variant(f"STRIDE {scale} {exact}", changes)
            found[scale, exact] = stride_variants.score(benchmark, variant, runs, compute)[0]
    for exact in (True, False):
        whole, quarter = found[1.0, exact], found[0.25, exact]
        assert (whole < 0).any()
        np.testing.assert_allclose(quarter, np.where(whole > 0, whole, 0.25 * whole), rtol=1e-5, atol=1e-8)


def images(seed=0):
    """Images of 4 × 6 pixels with a bright vertical, or horizontal, line somewhere."""
    rng = np.random.default_rng(seed)
    labels = np.arange(N + Q) % 2
    features = rng.standard_normal((N + Q, 4, 6)).astype(np.float32)
    for image, label in zip(features, labels, strict=True):
        if label:
            image[rng.integers(4)] += 3
        else:
            image[:, rng.integers(6)] += 3
    return LabelledExamples(features.reshape(N + Q, 24), labels, ("upright", "level"), (4, 6))


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory):
    """A benchmark of the lines in patches of 2 × 2 pixels; tests only read it."""
    folder = tmp_path_factory.mktemp("lines") / "benchmark"
    return write_benchmark(images(), str(folder), Q, 8, 2, {**SHORT, "learning_rate": 0.005}, patch=2)


def convolutions(model, examples, asked):
    """The network's logits of images by torch's own convolutions, (n, C), and its weights."""
    patches = model.model.features.weight[len(examples.classes) :].view(N + Q, 6, 4)[asked]
    h, weights = patches.transpose(1, 2).unflatten(2, (2, 3)), []
    for layer in model.model.layers:
        outputs, inputs = layer.map.weight.shape
        # The first convolution's kernel runs over channels, then rows, then columns, as unfold's columns do.
        weights.append(layer.map.weight.detach().clone().requires_grad_(True))
        h = torch.relu(
            torch.nn.functional.conv2d(h, weights[-1].view(outputs, inputs // 9, 3, 3), layer.map.bias, padding=1)
        )
    weights.append(model.lm_head.weight.detach().clone().requires_grad_(True))
    return h.mean((2, 3)) @ weights[-1].T + model.lm_head.bias, weights


def test_a_convolutional_network_is_torchs(convolutional):
    model, examples = load_model(convolutional.model), images()
    patches = Patches.of(examples, 2)
    pixels = patches.cut(examples.features).reshape(N + Q, 6, 4)
    # The fifth patch of 2 rows of 3 is the second row's middle one.
    np.testing.assert_array_equal(pixels[0, 4], examples.features[0].reshape(4, 6)[2:, 2:4].ravel())
    asked = (convolutional.queries.ids[:, 0] - 2) // 6
    logits, _ = convolutions(model.model, examples, asked)
    labels = torch.from_numpy(examples.labels[asked])
    ids, mask = (torch.from_numpy(each) for each in (convolutional.queries.ids, convolutional.queries.mask))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(model.losses(model.trunk(ids), ids, mask), losses)
    assert float((logits.argmax(1) == labels).float().mean()) >= 0.75
    assert find_sites(model) == ("model.layers.0.map", "model.layers.1.map", "head")


def test_gradients_of_convolutions_are_torchs(convolutional):
    model, examples = load_model(convolutional.model), images()
    gradients = []
    for texts in (convolutional.queries, convolutional.blocks):
        rows = (texts.ids[:, 0] - 2) // 6
        logits, weights = convolutions(model.model, examples, rows)
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(examples.labels[rows]), reduction="none")
        gradients.append(
            torch.stack(
                [
                    torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
                    for loss in losses
                ]
            )
        )
    expected = (gradients[0] @ gradients[1].T).numpy()
    np.testing.assert_allclose(graddot.scores(convolutional.problem()), expected, rtol=1e-3, atol=1e-5)


def test_images_of_the_querys_class_help_a_convolutional_network_most(convolutional, tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    runs, compute = Store(str(tmp_path)), ComputeConfig(workers=1)
    stride_variants.shard_pool(convolutional, runs, compute)
    variant = next(each for each in stride_variants.VARIANTS if each.slug == "stride-exact")
    scores, _, _ = stride_variants.score(convolutional, variant, runs, compute)
    same = convolutional.queries.ids[:, -1:] == convolutional.blocks.ids[:, -1]
    gains = [row[alike].mean() - row[~alike].mean() for row, alike in zip(scores, same, strict=True)]
    assert np.mean(np.array(gains) > 0) >= 0.75, gains


@pytest.mark.parametrize(
    ("given", "patch", "said"),
    [
        (blobs, 2, "Vectors have no patches of 2 × 2 pixels"),
        (images, 4, "Images of 4 × 6 pixels cannot be cut into patches of 4 × 4; give a smaller divisor of both"),
        (images, -1, "patch is -1; it must be at least 0"),
    ],
)
def test_patches_that_do_not_fit_are_refused(tmp_path, given, patch, said):
    with pytest.raises(StrideError, match=said):
        write_benchmark(given(), str(tmp_path / "b"), Q, 8, 2, SHORT, patch=patch)
    assert not (tmp_path / "b").exists()
