"""STRIDE training-data attribution as a data-curation pipeline on Ray.

Nothing is imported here: stages live in the module of their name (``from stride_ray.shard import shard``), so that
``stride-ray --help`` does not wait for torch and Ray.
"""

__version__ = "0.1.0"
