"""Rotations of the vocabulary side: against the matrices that they stand for."""

import pytest
import torch

from stride_ray.models.linear_algebra.rotation import factors, random_rotation


def matrix(rotation, length):
    """The rotation as a matrix (v, b)."""
    return rotation(torch.eye(length).unsqueeze(0))[0].T


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [1, 2, 12, 31, 97, 2048])
def test_whole_rotations_keep_lengths_and_angles(length):
    v1, v2 = factors(length)
    assert length <= v1 * v2 <= max(length + 1, 1.05 * length)
    P = matrix(random_rotation(length, v1 * v2, generator()), length)
    torch.testing.assert_close(P @ P.T, torch.eye(length), atol=1e-5, rtol=0)
    if length > 8:  # every coordinate goes to every other
        assert (P.abs() > 1e-6).float().mean() > 0.99


@pytest.mark.parametrize("chunk", [1, 2 * 32 * 5, 1 << 18])
def test_each_sequence_and_column_is_rotated_alike(chunk, monkeypatch):
    monkeypatch.setattr("stride_ray.models.linear_algebra.rotation.CHUNK", chunk)
    rotation = random_rotation(31, 10, generator())
    x = torch.randn(3, 31, 5, generator=generator(1))
    torch.testing.assert_close(rotation(x), matrix(rotation, 31).T @ x)
    assert rotation(x[:0]).shape == (0, 10, 5)
    assert len(rotation) == 10
    assert rotation.share == 10 / 32


def test_a_cut_rotation_estimates_inner_products_as_a_random_projection_does():
    x, y = torch.randn(2, 200, generator=generator(1))
    y = y + x
    some = torch.zeros(200)  # few tokens with like values: the hardest for a product of two rotations
    some[:16] = 1.0
    for one, other in ((x, y), (some, some)):
        found = []
        for seed in range(300):
            rotation = random_rotation(200, 50, generator(seed))
            a, b = rotation(torch.stack([one, other], 1).unsqueeze(0))[0].T
            found.append(float(a @ b) / rotation.share)
        true, found = float(one @ other), torch.tensor(found)
        assert abs(float(found.mean()) - true) < 4 * float(found.std()) / 300**0.5
        # Variance of a dense Gaussian projection; orthonormal directions have less.
        gaussian = ((float(one @ one) * float(other @ other) + true**2) / 50) ** 0.5
        assert float(found.std()) < 1.1 * gaussian
