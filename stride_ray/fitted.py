"""Operators on disk, and the model that they steer: what fit leaves and respond takes up."""

from functools import lru_cache
from typing import Any

import torch
import transformers

from stride_ray.config import Config
from stride_ray.errors import StrideError
from stride_ray.membership import Membership
from stride_ray.model import SplitModel, load_model
from stride_ray.operators import Basis, Operators
from stride_ray.storage import Store, tensor_bytes, tensors_from


def membership_of(config: Config) -> Membership:
    """The run's membership matrix."""
    wanted = config.membership
    return Membership(wanted.subsets, wanted.degree, config.seed, wanted.form)


def load_run_model(config: Config, device: str, path: str = "") -> SplitModel:
    """The run's model, or another of its kind, split where its operators act: at ℓ, or at the end for the logit form.

    A process keeps the last two that it loaded.

    Raises:
        StrideError: as load_model does, and where no model is configured.
    """
    if not config.model.path:
        raise StrideError("No model is configured; give --model, a Hugging Face folder or hub id (model.path).")
    transformers.utils.logging.disable_progress_bar()
    split = config.model.split
    layer: int | float = 1.0 if config.operators.form == "logit" else (split if split < 1 else int(split))
    return _loaded(path or config.model.path, layer, config.model.dtype, device)


@lru_cache(maxsize=2)
def _loaded(path: str, layer: int | float, dtype: str, device: str) -> SplitModel:
    return load_model(path, split=layer, dtype=dtype, device=device)


def save_basis(store: Store, name: str, basis: Basis) -> None:
    """Publish a basis as ``name``.safetensors and ``name``.json."""
    store.write(f"{name}.safetensors", tensor_bytes({k: v.cpu() for k, v in basis.tensors().items()}))
    store.write_json(f"{name}.json", basis.facts())


def load_basis(store: Store, name: str) -> Basis:
    """Read what save_basis wrote."""
    return Basis(**store.read_json(f"{name}.json"), **tensors_from(store.read(f"{name}.safetensors")))


def save_operators(store: Store, operators: Operators, facts: dict[str, Any]) -> None:
    """Publish operators: operators.safetensors first, metadata.json (which says that they are complete) last."""
    tensors = {"A": operators.A.cpu(), **{k: v.cpu() for k, v in operators.basis.tensors().items()}}
    store.write("operators.safetensors", tensor_bytes(tensors))
    metadata = {"basis": operators.basis.facts(), "subsets": len(operators.A), "scale": operators.scale, **facts}
    store.write_json("metadata.json", metadata)


def load_operators(store: Store, device: str = "cpu") -> tuple[Operators, dict[str, Any]]:
    """Read what save_operators wrote, with the facts."""
    metadata = store.read_json("metadata.json")
    tensors = tensors_from(store.read("operators.safetensors"))
    A = tensors.pop("A")
    operators = Operators(Basis(**metadata["basis"], **tensors), A, metadata["scale"])
    return operators.to(torch.device(device)), metadata
