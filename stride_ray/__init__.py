"""STRIDE training-data attribution as a data-curation pipeline on Ray.

    from stride_ray import Run, attribute, read_influence, shard

    run = Run("mine", changes={"corpus.input": "corpus/", "model.path": "model/"})
    shard(run)
    attribute(run, "queries.jsonl", "asked")
    print(read_influence(run, "asked").to_pandas().head())

Names are imported when they are first used, so that ``stride-ray --help`` does not wait for torch and Ray.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stride_ray.attribution.attribute import attribute, read_influence
    from stride_ray.attribution.query_set import QuerySet
    from stride_ray.contamination.items import read_set
    from stride_ray.contamination.nightly import scan
    from stride_ray.corpus.shard import shard
    from stride_ray.operators.fit import fit
    from stride_ray.runtime.config import Config
    from stride_ray.runtime.errors import StrideError
    from stride_ray.runtime.run import Run
    from stride_ray.selection.select import select

# Torch's idle threads spin by default. Where other processes want the same cores, as Ray's do, that makes a step of
# training ten times slower (measured: 3.6 s against 0.3 s); it must be set before torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = [
    "Config",
    "QuerySet",
    "Run",
    "StrideError",
    "attribute",
    "fit",
    "read_influence",
    "read_set",
    "scan",
    "select",
    "shard",
]

_HOMES = {
    "Config": "runtime.config",
    "QuerySet": "attribution.query_set",
    "Run": "runtime.run",
    "StrideError": "runtime.errors",
    "attribute": "attribution.attribute",
    "fit": "operators.fit",
    "read_influence": "attribution.attribute",
    "read_set": "contamination.items",
    "scan": "contamination.nightly",
    "select": "selection.select",
    "shard": "corpus.shard",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
