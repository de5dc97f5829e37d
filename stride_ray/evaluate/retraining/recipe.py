"""The interface of a training recipe, and loading one by name.

LDS depends on the recipe that trained the model. The benchmarks' own recipe is built in (``finetune.FineTune``); any
other is a user's file or module with a callable that takes the benchmark and returns a ``Recipe``.
"""

import hashlib
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import first_line

if TYPE_CHECKING:
    from stride_ray.evaluate.retraining.benchmark import Benchmark

DEFAULT = "stride_ray.evaluate.retraining.finetune:fine_tune"


@runtime_checkable
class Recipe(Protocol):
    """How a benchmark's models are trained and evaluated; the same arguments must give the same numbers."""

    def train(self, rows: np.ndarray, seed: int) -> Any:
        """Train on these pool rows (int64, ascending) with this seed; the result is passed to ``losses``."""

    def losses(self, trained: Any) -> np.ndarray:
        """Return the mean next-token loss of each query, (Q,), in nats."""


def load_recipe(name: str, benchmark: "Benchmark") -> Recipe:
    """Load a recipe by name: ``package.module:attribute`` or ``file.py:attribute``.

    Args:
        name: the attribute is a callable, such as a class, that takes the benchmark and returns a ``Recipe``.
        benchmark: passed to that callable.

    Raises:
        StrideError: if the name cannot be loaded or does not give a ``Recipe``.
    """
    where, _, attribute = _parts(name)
    try:
        module = _from_file(where) if where.endswith(".py") else importlib.import_module(where)
    except StrideError:
        raise
    except Exception as error:
        # A user's file may raise anything on import; the class is more informative than most messages.
        raise StrideError(
            f"Recipe {name}: {where} cannot be loaded ({type(error).__name__}: {first_line(error)})."
        ) from error
    make = getattr(module, attribute, None)
    if not callable(make):
        raise StrideError(f"Recipe {name}: {where} has no callable {attribute!r}.")
    recipe = make(benchmark)
    if not isinstance(recipe, Recipe):
        raise StrideError(
            f"Recipe {name} gave a {type(recipe).__name__}, which lacks train(rows, seed) or losses(trained)."
        )
    return recipe


def recipe_identity(name: str) -> str:
    """Return the recipe's name, plus a content hash if it is a file, so that an edited file counts as another recipe.

    Raises:
        StrideError: if the file does not exist or the name is invalid.
    """
    where, colon, attribute = _parts(name)
    if not where.endswith(".py"):
        return name
    with open(_existing(where), "rb") as file:
        content = hashlib.sha256(file.read()).hexdigest()[:16]
    return f"{os.path.basename(where)}{colon}{attribute} {content}"


def _parts(name: str) -> tuple[str, str, str]:
    where, colon, attribute = name.rpartition(":")
    if not where or not attribute.isidentifier():
        raise StrideError(f"Recipe {name!r} is not package.module:attribute or file.py:attribute.")
    return where, colon, attribute


def _existing(path: str) -> str:
    if not os.path.isfile(path):
        raise StrideError(f"Recipe file {path} does not exist; give a path from the working folder.")
    return path


def _from_file(path: str) -> Any:
    name = "recipe_" + hashlib.sha256(os.path.abspath(_existing(path)).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise StrideError(f"Recipe file {path} cannot be loaded as Python.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
