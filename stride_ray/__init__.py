"""STRIDE training-data attribution as a data-curation pipeline on Ray."""

__version__ = "0.1.0"
