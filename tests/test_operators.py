"""J against autograd of the true loss, linear responses against exact ones, the closed form's sums and whitening."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.linear_algebra.matrices import inverse_root
from stride_ray.operators.closed_form import add_to_subsets, operators_from_sums, preconditioned_basis, stream_moments
from stride_ray.operators.forms import (
    Operators,
    features,
    gradients,
    normalised,
    random_basis,
    steering_vectors,
    stream_gradients,
)
from stride_ray.operators.membership import Membership

V, D, RANK, SKETCH, B, T = 60, 16, 4, 6, 5, 11
FORMS = ["gate", "matrix", "logit"]


def model_for(form):
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return SplitModel(model, split=2 if form == "logit" else 1)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def model(form):
    return model_for(form)


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.5
    mask[0] = True
    mask[1] = False  # nothing to predict
    mask[2, 1:] = False  # the first token alone, which nothing predicts
    mask[3, -1] = True
    return ids, mask


def true_losses(model, basis, A, ids, mask, unsteered):
    """Masked mean cross-entropy of each text that has targets, all logits at once, by torch's own functions."""
    h = unsteered
    moved = steering_vectors(basis, features(basis, h), A)
    logits = model.suffix(h) + moved[..., :V] if basis.form == "logit" else model.suffix(h + moved)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    weights = mask[:, 1:].float()
    return (losses * weights).sum(1) / weights.sum(1).clamp(min=1)


@pytest.mark.parametrize("activation", ["linear", "silu"])
def test_j_is_the_gradient_at_zero_steering(form, model, texts, activation):
    ids, mask = texts
    basis = random_basis(form, D, V, RANK, SKETCH, seed=2, activation=activation)
    A = torch.zeros(B, *basis.shape, requires_grad=True)
    true_losses(model, basis, A, ids, mask, model.trunk(ids)).sum().backward()
    found = gradients(basis, model, ids, mask)
    torch.testing.assert_close(found, A.grad, rtol=1e-3, atol=1e-6)
    assert found[0].abs().max() > 1e-3
    assert not found[1].any()
    assert not found[2].any()
    assert torch.isfinite(found).all()


def test_unit_j_has_norm_one_or_zero(form, model, texts):
    ids, mask = texts
    basis = random_basis(form, D, V, RANK, SKETCH, seed=2)
    plain = gradients(basis, model, ids, mask)
    unit = gradients(replace(basis, unit=True), model, ids, mask)
    norms = plain.flatten(1).norm(dim=1)
    torch.testing.assert_close(unit.flatten(1).norm(dim=1), (norms > 0).float())
    torch.testing.assert_close(unit.flatten(1) * norms[:, None], plain.flatten(1))


def test_padding_on_the_right_changes_nothing(form, model, texts):
    ids, mask = texts
    basis = random_basis(form, D, V, RANK, SKETCH, seed=2)
    wide, wide_mask = F.pad(ids, (0, 5)), F.pad(mask, (0, 5))
    torch.testing.assert_close(
        gradients(basis, model, wide, wide_mask), gradients(basis, model, ids, mask), rtol=1e-4, atol=1e-6
    )


def test_linear_responses_are_the_derivative_of_exact_ones(form, model, texts):
    ids, mask = texts
    basis = random_basis(form, D, V, RANK, SKETCH, seed=2)
    A = torch.randn(7, *basis.shape, generator=torch.Generator().manual_seed(3))
    linear = Operators(basis, A).linear(model, ids, mask)
    assert linear.shape == (B, 7)
    step = 1e-2
    for row in (0, 3, 4):
        ends = [
            Operators(basis, A, scale).exact(model, ids[row], mask[row], torch.arange(7), batch_tokens=3 * T)
            for scale in (step, -step)
        ]
        slope = (ends[0][1] - ends[1][1]) / (2 * step)
        torch.testing.assert_close(slope, linear[row], rtol=2e-2, atol=2e-2 * float(linear[row].abs().max()))
        zero = torch.zeros(1, *basis.shape)
        expected = true_losses(
            model, basis, zero, ids[row : row + 1], mask[row : row + 1], model.trunk(ids[row : row + 1])
        )
        assert ends[0][0] == pytest.approx(float(expected), rel=1e-4)


def test_exact_responses_are_steered_losses(form, model, texts):
    ids, mask = texts
    basis = random_basis(form, D, V, RANK, SKETCH, seed=2)
    A = torch.randn(7, *basis.shape, generator=torch.Generator().manual_seed(3))
    chosen = torch.tensor([5, 0, 3])
    base, found = Operators(basis, A, 0.5).exact(model, ids[3], mask[3], chosen, batch_tokens=1)
    one, one_mask = ids[3:4].expand(3, -1), mask[3:4].expand(3, -1)
    steered = true_losses(model, basis, 0.5 * A[chosen], one, one_mask, model.trunk(one))
    torch.testing.assert_close(found, base - steered, rtol=1e-3, atol=1e-5)
    assert found.abs().max() > 1e-3


def test_the_unigram_target():
    model, ids = model_for("logit"), torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, T, dtype=torch.bool)
    mask[0, [3, 8]] = True
    counts = np.arange(V)
    basis = preconditioned_basis("logit", RANK, SKETCH, "unigram", 0, np.eye(D), np.eye(1), counts)
    unigram = torch.tensor((counts + 1) / (counts + 1).sum()).float()
    u = normalised(model.trunk(ids))[0] @ basis.W_in
    J = sum(torch.outer(u[t - 1], basis.W_out.T @ unigram - basis.W_out[ids[0, t]]) for t in (3, 8)) / 2
    torch.testing.assert_close(gradients(basis, model, ids, mask)[0], J / J.norm(), rtol=1e-4, atol=1e-6)


def test_rare_tokens_weigh_more():
    counts = np.arange(8000)
    basis = preconditioned_basis("logit", RANK, SKETCH, "unigram", 0, np.eye(D), np.eye(1), counts)
    unigram = torch.tensor((counts + 1) / (counts + 1).sum()).float()
    sketch = basis.W_out * (unigram + 1e-5).sqrt()[:, None]
    for part in sketch.split(2000):
        assert float(part.square().mean()) == pytest.approx(1 / SKETCH, rel=0.1)


def moments(model, ids, mask):
    z, g, count, _ = stream_moments(model, ids, mask, with_gradients=True)
    return z / count, g / count


def test_the_basis_whitens_stream_and_gradients(form, model, texts):
    ids, mask = texts
    stream, gradient = moments(model, ids, mask)
    basis = preconditioned_basis(form, RANK, SKETCH, "unigram", 0, stream, gradient, np.ones(V))
    assert basis.W_in.shape == (D, RANK)
    damped = stream + np.eye(D) * np.linalg.eigvalsh(stream).clip(0).mean()
    W_in = basis.W_in.double().numpy()
    np.testing.assert_allclose(W_in.T @ damped @ W_in, np.eye(RANK), atol=1e-4)
    if form != "logit":
        W_out = basis.W_out.double().numpy()
        damped = gradient + np.eye(D) * np.linalg.eigvalsh(gradient).clip(0).mean()
        np.testing.assert_allclose(W_out.T @ damped @ W_out, np.eye(W_out.shape[1]), atol=1e-4)


def test_moments_are_those_of_positions_that_predict(model, texts):
    ids, mask = texts
    z, g, count, _ = stream_moments(model, ids, mask, with_gradients=True)
    h = model.trunk(ids)
    rows = [normalised(h[b, t]).double().numpy() for b in range(B) for t in range(T - 1) if mask[b, t + 1]]
    assert count == len(rows)
    np.testing.assert_allclose(z, np.array(rows).T @ np.array(rows), rtol=1e-6)
    gradient = stream_gradients(model, h, ids, mask).flatten(0, 1).double().numpy()
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(g, gradient.T @ gradient, rtol=1e-6, atol=1e-12)


def test_the_inverse_root_is_damped():
    moment = np.diag([4.0, 1.0, 0.0, -1e-9])
    mean = 5 / 4
    expected = np.diag((np.array([4, 1, 0, 0]) + mean) ** -0.5)
    np.testing.assert_allclose(inverse_root(moment).numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["regular", "bernoulli"])
def test_sums_over_subsets_are_those_of_the_dense_matrix(kind):
    membership, n = Membership(9, 3, seed=4, form=kind), 50
    J = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    sums = torch.zeros(10, 5)
    for start in range(0, n, 7):
        rows = np.arange(start, min(start + 7, n))
        add_to_subsets(sums, J[rows], membership.columns_at(rows))
    dense = torch.from_numpy(membership.matrix(0, n).toarray()).float()
    torch.testing.assert_close(sums[:-1], dense @ J, rtol=1e-4, atol=1e-5)
    A = operators_from_sums(sums[:-1], membership.sizes(n), (5,))
    torch.testing.assert_close(A, -(dense @ J) / dense.sum(1, keepdim=True).clamp(min=1), rtol=1e-4, atol=1e-5)
