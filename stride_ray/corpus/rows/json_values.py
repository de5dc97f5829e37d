"""Values that Arrow and Parquet keep as JSON (``arrow.json``), at any depth of a column.

The library datasets has this type for what has no fixed one, such as the arguments of tools, and chooses it by itself
when it reads JSON; DuckDB writes it too. A string among such values is stored with its quotes.
"""

import json
from functools import cache
from typing import Any

import pyarrow as pa

from stride_ray.corpus.rows.json_strings import with_strings


@cache
def holds_json(of: pa.DataType) -> bool:
    """Whether values of a type are or hold JSON."""
    return getattr(of, "extension_name", "") == "arrow.json" or any(map(holds_json, _parts(of)))


def decoded(of: pa.DataType, value: Any) -> Any:
    """A value as Python has it, its JSON parsed.

    Example:
        >>> decoded(pa.list_(pa.json_()), ['{"a": 1}', '"a"', None])
        [{'a': 1}, 'a', None]

    Raises:
        ValueError: something is not JSON.
    """
    if value is None or not holds_json(of):
        return value
    if isinstance(of, pa.BaseExtensionType):
        try:
            return json.loads(value)
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None
    if isinstance(of, pa.StructType):
        return {field.name: decoded(field.type, value[field.name]) for field in of}
    if isinstance(of, pa.MapType):
        return {key: decoded(of.item_type, part) for key, part in value.items()}
    return [decoded(of.value_type, part) for part in value]


def encoded(of: pa.DataType, stored: Any, before: Any, after: Any) -> Any:
    """What to store for a value changed from ``before``, which is ``decoded(of, stored)``, in strings only."""
    if before == after or not holds_json(of):
        return after if before != after else stored
    if isinstance(of, pa.BaseExtensionType):
        return with_strings(stored, before, after)
    if isinstance(of, pa.StructType):
        return {f.name: encoded(f.type, stored[f.name], before[f.name], after[f.name]) for f in of}
    if isinstance(of, pa.MapType):
        return {key: encoded(of.item_type, stored[key], before[key], after[key]) for key in stored}
    return [encoded(of.value_type, *parts) for parts in zip(stored, before, after, strict=True)]


def stored_as(of: pa.DataType) -> pa.DataType:
    """The type with strings in place of JSON: pyarrow makes nested arrays of these only."""
    if not holds_json(of):
        return of
    if isinstance(of, pa.BaseExtensionType):
        return of.storage_type
    if isinstance(of, pa.StructType):
        return pa.struct([field.with_type(stored_as(field.type)) for field in of])
    if isinstance(of, pa.MapType):
        return pa.map_(of.key_field, of.item_field.with_type(stored_as(of.item_type)), of.keys_sorted)
    item = of.value_field.with_type(stored_as(of.value_type))
    if isinstance(of, pa.FixedSizeListType):
        return pa.list_(item, of.list_size)
    make = {pa.LargeListType: pa.large_list, pa.ListViewType: pa.list_view, pa.LargeListViewType: pa.large_list_view}
    return make.get(type(of), pa.list_)(item)


def _parts(of: pa.DataType) -> list[pa.DataType]:
    if isinstance(of, pa.StructType):
        return [field.type for field in of]
    if isinstance(of, pa.MapType):
        return [of.item_type]
    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
    return [of.value_type] if isinstance(of, lists) else []
