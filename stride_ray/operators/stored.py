"""Storage of operators of the paper's forms, written by fit and read by respond."""

from typing import Any

import torch

from stride_ray.operators.forms import Basis, Operators
from stride_ray.runtime.storage import Store, tensor_bytes


def save_basis(store: Store, name: str, basis: Basis) -> None:
    """Publish a basis as ``name``.safetensors and ``name``.json."""
    store.write(f"{name}.safetensors", tensor_bytes({k: v.cpu() for k, v in basis.tensors().items()}))
    store.write_json(f"{name}.json", basis.facts())


def load_basis(store: Store, name: str) -> Basis:
    """Read a basis that save_basis wrote."""
    return Basis(**store.read_json(f"{name}.json"), **store.read_tensors(f"{name}.safetensors"))


def save_operators(store: Store, operators: Operators, facts: dict[str, Any]) -> None:
    """Publish operators: operators.safetensors, then manifest.json, which marks them as complete."""
    tensors = {"A": operators.A.cpu(), **{k: v.cpu() for k, v in operators.basis.tensors().items()}}
    store.write("operators.safetensors", tensor_bytes(tensors))
    metadata = {"basis": operators.basis.facts(), "subsets": len(operators.A), "scale": operators.scale, **facts}
    store.write_json("manifest.json", metadata)


def load_operators(store: Store, device: str = "cpu") -> tuple[Operators, dict[str, Any]]:
    """Read operators that save_operators wrote; returns them on ``device``, and the metadata."""
    metadata = store.read_json("manifest.json")
    tensors = store.read_tensors("operators.safetensors")
    A = tensors.pop("A")
    operators = Operators(Basis(**metadata["basis"], **tensors), A, metadata["scale"])
    return operators.to(torch.device(device)), metadata
