"""Operators as the authors release them: what was written steers as before, and nothing else is taken for it."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TOKENS, Bomb

from stride_ray.models.causal_lm import load_model
from stride_ray.operators.forms import Operators, random_basis
from stride_ray.operators.membership import Membership
from stride_ray.operators.paper_release import read_released, write_released
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

K, RANK, WIDTH = 6, 4, 32
COLUMNS = Membership(K, 3, 0).columns(0, 20)


def operators(form, activation="silu"):
    generator = torch.Generator().manual_seed(1)
    basis = random_basis(form, WIDTH, 320, RANK, 8, 0, activation)
    if form == "matrix":  # as the closed form has it, not the identity
        basis = replace(basis, W_out=torch.randn(WIDTH, WIDTH, generator=generator))
    return Operators(basis, torch.randn(K, *basis.shape, generator=generator), scale=0.5)


def saved(store, state, subsets=COLUMNS):
    """A release as somebody else may have written it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    store.write("operator.pt", buffer.getvalue())
    buffer = io.BytesIO()
    np.save(buffer, subsets)
    store.write("subsets.npy", buffer.getvalue())
    store.write_json("meta.json", {"layer": 1})
    return store


@pytest.mark.parametrize("form", ["gate", "matrix"])
@pytest.mark.parametrize("activation", ["silu", "linear"])
def test_what_is_written_steers_as_before(parts, tmp_path, form, activation):
    ours, store = operators(form, activation), Store(str(tmp_path))
    write_released(store, ours, COLUMNS, {"layer": 1})
    theirs, columns, facts = read_released(store)
    assert np.array_equal(columns, COLUMNS)
    assert facts == {"layer": 1, "form": form, "activation": activation, "subsets": K, "rank": RANK}
    model = load_model(parts.model, split=1, device="cpu")
    ids = torch.arange(TOKENS)
    asked = (model, ids, torch.ones(TOKENS, dtype=torch.bool), torch.arange(K), 4 * TOKENS)
    base, expected = ours.exact(*asked)
    assert expected.abs().min() > 1e-3
    assert theirs.exact(*asked)[0] == base
    torch.testing.assert_close(theirs.exact(*asked)[1], expected, rtol=1e-3, atol=1e-5)


def test_weights_of_linear_layers_are_turned(tmp_path):
    basis = operators("gate").basis
    state = {"proj_in.weight": basis.W_in.T, "proj_out.weight": basis.W_out, "gates": torch.ones(K, RANK).bfloat16()}
    theirs, _, facts = read_released(saved(Store(str(tmp_path)), state))
    assert (theirs.basis.form, theirs.basis.activation, facts) == ("gate", "silu", {"layer": 1})
    assert torch.equal(theirs.basis.W_in, basis.W_in)
    assert torch.equal(theirs.basis.W_out, basis.W_out)
    assert theirs.A.dtype == torch.float32


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"W_in": torch.ones(WIDTH, RANK)},
        {"W_in": torch.ones(WIDTH), "A": torch.ones(K, RANK, WIDTH)},
        {"W_in": torch.ones(WIDTH, RANK), "a": torch.ones(K, RANK)},
        {"W_in": torch.ones(WIDTH, RANK), "A": torch.ones(K, RANK, WIDTH + 1)},
        {"W_in": torch.ones(WIDTH, RANK), "A": torch.ones(K, RANK + 1, WIDTH)},
        {"W_in": torch.ones(WIDTH, RANK), "A": torch.ones(K, RANK, WIDTH), "B": torch.ones(1)},
    ],
)
def test_other_tensors_are_refused(tmp_path, state):
    with pytest.raises(StrideError, match=r"operator\.pt"):
        read_released(saved(Store(str(tmp_path)), state))


@pytest.mark.parametrize("subsets", [np.array([[K + 1]]), np.array([-1]), np.array([[0.5]])])
def test_other_subsets_are_refused(tmp_path, subsets):
    with pytest.raises(StrideError, match=r"subsets\.npy"):
        read_released(saved(Store(str(tmp_path)), {"W_in": torch.ones(8, 2), "A": torch.ones(K, 2, 8)}, subsets))


def test_broken_subsets_are_refused(tmp_path):
    store = saved(Store(str(tmp_path)), {"W_in": torch.ones(8, 2), "A": torch.ones(K, 2, 8)})
    good = store.read("subsets.npy")
    archive = io.BytesIO()
    np.savez(archive, COLUMNS)
    for bad in (b"", good[:9] + b"\x01" + good[10:], good[:20], archive.getvalue()):
        store.write("subsets.npy", bad)
        with pytest.raises(StrideError, match=r"subsets\.npy"):
            read_released(store)


def test_nothing_is_unpickled(tmp_path):
    made = tmp_path / "made"
    with pytest.raises(StrideError, match="plain tensors"):
        read_released(saved(Store(str(tmp_path / "a")), {"W_in": Bomb(str(made))}))
    state = {"W_in": torch.ones(8, 2), "A": torch.ones(K, 2, 8)}
    with pytest.raises(StrideError, match="plain NumPy"):
        read_released(saved(Store(str(tmp_path / "b")), state, np.array([Bomb(str(made))], dtype=object)))
    assert not made.exists()


def test_the_logit_form_is_no_release(tmp_path):
    with pytest.raises(StrideError, match="logit"):
        write_released(Store(str(tmp_path)), operators("logit"), COLUMNS, {})
