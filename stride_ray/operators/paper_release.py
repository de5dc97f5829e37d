"""The paper authors' release format for operators: a folder of ``operator.pt``, ``subsets.npy`` and ``meta.json``.

For importing operators trained elsewhere and exporting ours. ``operator.pt`` is a state dict, read with torch's
weights-only loading, which executes no code. Only the file names of the format are public; tensors are identified by
the paper's symbols (Appendix F.1), and ambiguous ones are rejected.
"""

import io
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_ray.operators.forms import Basis, Operators
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line

OPERATOR, SUBSETS, META = "operator.pt", "subsets.npy", "meta.json"


def write_released(store: Store, operators: Operators, columns: np.ndarray, facts: dict[str, Any]) -> None:
    """Write residual-stream operators, ``meta.json`` last.

    Args:
        store: the folder.
        operators: K operators, gate or matrix; their scale is multiplied in.
        columns: (N, width) the subsets of every block, padded with K (``Membership.columns``).
        facts: added to ``meta.json``, such as the model and its layer.

    Raises:
        StrideError: for the logit form, which the format does not support.
    """
    basis, A = operators.basis, operators.A * operators.scale
    if basis.form == "logit":
        raise StrideError("Operators of the logit form cannot be released as operator.pt; fit gate or matrix.")
    tensors = {"W_in": basis.W_in, "a": A, "W_out": basis.W_out.T}
    if basis.form == "matrix":  # in the release, A_k maps directly to the stream
        tensors = {"W_in": basis.W_in, "A": A @ basis.W_out.T}
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, buffer)
    store.write(OPERATOR, buffer.getvalue())
    buffer = io.BytesIO()
    np.save(buffer, columns, allow_pickle=False)
    store.write(SUBSETS, buffer.getvalue())
    about = {"form": basis.form, "activation": basis.activation, "subsets": len(A), "rank": basis.W_in.shape[1]}
    store.write_json(META, {**facts, **about})


def read_released(store: Store) -> tuple[Operators, np.ndarray, dict[str, Any]]:
    """Read a folder in the release format.

    Tensors may be parameters as in the paper (W_in D×r, W_out r×D) or weights of linear layers (``….weight``, outputs
    first). ``meta.json`` may name the activation; the default is the paper's, silu.

    Returns:
        Operators with scale 1, the subsets of every block (N, width), and ``meta.json``.

    Raises:
        StrideError: if a file is missing or would need unpickling, or its tensors do not form operators.
    """
    facts = store.read_json(META, foreign=True)
    where, data = store.display_url(OPERATOR), store.read(OPERATOR)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        tensors = {name: tensor.float() for name, tensor in state.items()}
    except Exception as error:  # pickle, zipfile and torch each raise their own types
        raise StrideError(f"{where} is not a state dict of plain tensors ({first_line(error)}).") from None
    array = store.read(SUBSETS)
    try:
        columns = np.asarray(np.load(io.BytesIO(array), allow_pickle=False))
    except Exception as error:  # of bad bytes, numpy and the modules that it uses raise a dozen classes
        raise StrideError(f"{store.display_url(SUBSETS)} is not a plain NumPy array ({first_line(error)}).") from None
    operators = _operators(tensors, str(facts.get("activation", "silu")))
    if operators is None:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise StrideError(
            f"{where} holds {found or 'nothing'}; operators are W_in (D, r) with a (K, r) and W_out (r, D), or with A "
            "(K, r, D)."
        )
    K = len(operators.A)
    whole = columns.ndim == 2 and columns.dtype.kind in "iu"
    if not whole or columns.min(initial=0) < 0 or columns.max(initial=0) > K:
        raise StrideError(
            f"{store.display_url(SUBSETS)} must hold the subsets of every block, (N, d) whole numbers from 0 to {K}; "
            f"it holds {columns.dtype} {columns.shape}."
        )
    return operators, columns, facts


def _operators(tensors: dict[str, Tensor], activation: str) -> Operators | None:
    """Operators from the tensors of a state dict; None if their names or shapes do not form operators."""
    shared, stacks = dict[str, Tensor](), list[Tensor]()
    for name, tensor in tensors.items():
        words = set(re.split(r"[^a-z]+", name.lower()))
        role = next(iter(words & {"in", "out"}), "")
        if not role:
            stacks.append(tensor)
        elif tensor.ndim == 2:
            # The weight of a linear layer has outputs first: the transpose of the paper's W_in and W_out.
            shared[role] = tensor.T if "weight" in words else tensor
    form = {2: "gate", 3: "matrix"}.get(stacks[0].ndim) if len(stacks) == 1 else None
    if form is None or set(shared) != ({"in", "out"} if form == "gate" else {"in"}):
        return None
    W_in = shared["in"].contiguous()
    W_out = shared["out"].T.contiguous() if form == "gate" else torch.eye(len(W_in))
    operators = Operators(Basis(form, W_in, W_out, activation), stacks[0])
    fits = operators.A.shape[1:] == operators.basis.shape and len(W_out) == len(W_in)
    return operators if fits and W_in.shape[1] == stacks[0].shape[1] else None
