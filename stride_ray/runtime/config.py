"""The configuration of a run: a frozen tree of options, TOML input and output, and the keys each stage depends on.

Options are declared in options.py, from which the command line, the commented TOML and the checks are generated.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import tomli_w

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import (
    AttributeConfig,
    ComputeConfig,
    CorpusConfig,
    FitConfig,
    MembershipConfig,
    ModelConfig,
    OperatorConfig,
    RecoverConfig,
    RespondConfig,
    ScanConfig,
    SelectConfig,
    SolveConfig,
    _option,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Config:
    """The complete configuration of a run."""

    seed: int = _option(0, "seed of everything random: membership, bases, sketches, the training loop's order", low=0)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    operators: OperatorConfig = field(default_factory=OperatorConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    solve: SolveConfig = field(default_factory=SolveConfig)
    respond: RespondConfig = field(default_factory=RespondConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    attribute: AttributeConfig = field(default_factory=AttributeConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    scan: ScanConfig = field(default_factory=ScanConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def flat(self) -> dict[str, Any]:
        """All options as JSON-serialisable ``{"section.key": value}``, in order of declaration."""
        return {name: _tuple_to_list(_lookup(self, name)) for name in option_fields()}

    def updated(self, changes: Mapping[str, Any], where: str = "the command line") -> "Config":
        """A copy with ``{"section.key": value}`` applied; values may be strings from a command line.

        Args:
            changes: the new values.
            where: their origin, for error messages.

        Raises:
            StrideError: unknown key (the nearest one is suggested), or a value of the wrong type or out of range.
        """
        known = option_fields()
        config = self
        for name, value in changes.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise StrideError(
                    f"{where} has the key {name!r}, which is not an option"
                    + (f"; did you mean {near[0]!r}?" if near else "; 'stride-ray config' lists them all.")
                )
            config = _with_value(config, name.split("."), _validated_value(name, value, known[name], where))
        return config


# To be raised when a stage's files change in a way that later stages cannot continue from older ones.
FORMATS = {"blocks": 2, "curvature": 2, "operators": 2, "influence": 1, "exact": 1}
# By stage: the upstream stage, and the options (or sections) that the output depends on besides the stage's inputs. A
# stage's identity includes the keys of all upstream stages. Paths of models and tokenizers are not among them, because
# files may be moved: ``Run.begin`` takes fingerprints of their content instead.
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "blocks": ("", ("corpus.columns", "corpus.layout", "corpus.block_tokens", "corpus.shard_mb")),
    "curvature": ("blocks", ("seed", "model.dtype", "operators.sites", "operators.layers")),
    "operators": ("curvature", ("model.split", "membership", "operators", "fit")),
    "directions": ("curvature", ("solve",)),
    "responses": ("operators", ("solve", "respond", "attribute.top", "attribute.negative_scale")),
    "estimates": ("responses", ("recover",)),
    "influence": ("estimates", ("attribute.candidates", "attribute.tokens")),
    "exact": ("curvature", ("solve", "attribute.top", "attribute.tokens", "attribute.negative_scale")),
}


def stage_keys(config: Config, stage: str) -> dict[str, Any]:
    """Return what ``stage`` depends on: its options, those of its upstream stages, and the formats of their files."""
    prefixes: list[str] = []
    formats: dict[str, Any] = {}
    while stage:
        if stage in FORMATS:
            formats[f"{stage}.format"] = FORMATS[stage]
        stage, own = STAGES[stage]
        prefixes += own
    chosen = {k: v for k, v in config.flat().items() if any(k == p or k.startswith(p + ".") for p in prefixes)}
    return {**formats, **chosen}


def stage_hash(config: Config, stage: str) -> str:
    """Hash of the options that ``stage`` and its upstream stages depend on, 16 hexadecimal digits."""
    return digest(stage_keys(config, stage))


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, truncated to 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def loads(text: str, where: str = "the configuration") -> Config:
    """Parse a configuration from TOML; missing keys keep their defaults.

    Raises:
        StrideError: invalid TOML, an unknown key or an invalid value; the message names ``where`` and the key.
    """
    try:
        tree = tomllib.loads(text.removeprefix("\ufeff"))  # the byte-order mark of some editors
    except ValueError as error:  # TOMLDecodeError, or int's of a number with too many digits
        raise StrideError(f"{where} is not valid TOML: {error}.") from None
    except RecursionError:
        raise StrideError(f"{where} is not valid TOML: its lists or tables are nested too deeply.") from None
    flat: dict[str, Any] = {}
    tree.pop("run", None)  # Run.save writes facts there, not options
    for name, value in tree.items():
        if isinstance(value, dict) and is_dataclass(getattr(Config(), name, None)):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return Config().updated(flat, where)


def dumps(config: Config, comments: bool = False) -> str:
    """The configuration as canonical TOML; with ``comments``, each option is preceded by its help text."""
    lines, section, flat = [], "", config.flat()
    for name, declared in option_fields().items():
        parent, _, key = name.rpartition(".")
        if parent != section:
            lines += ["", f"[{parent}]"]
            section = parent
        if comments:
            choices = declared.metadata["choices"]
            lines.append(f"# {declared.metadata['help']}" + (f" [{' | '.join(choices)}]" if choices else ""))
        value = flat[name]
        if isinstance(value, dict):
            inner = ", ".join(tomli_w.dumps({k: v}).strip() for k, v in value.items())
            lines.append(f"{key} = {{ {inner} }}" if inner else f"{key} = {{}}")
        else:
            lines.append(tomli_w.dumps({key: value}).strip())
    return "\n".join(lines) + "\n"


def option_fields() -> dict[str, dataclasses.Field]:
    """Dotted name of every option to its declaration (default, help, choices, minimum)."""
    found: dict[str, dataclasses.Field] = {}
    for outer in fields(Config):
        value = getattr(Config(), outer.name)
        if is_dataclass(value):
            found.update({f"{outer.name}.{inner.name}": inner for inner in fields(value)})
        else:
            found[outer.name] = outer
    return found


def _lookup(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _with_value(node: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _with_value(getattr(node, path[0]), path[1:], value)
    return replace(node, **{path[0]: inner})


def _tuple_to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _validated_value(name: str, value: Any, declared: dataclasses.Field, where: str) -> Any:
    """``value`` converted to the option's type and validated; StrideError if it is invalid."""
    default = _lookup(Config(), name)
    metadata = declared.metadata
    try:
        value = _convert_to_type(value, default)
    except (TypeError, ValueError, OverflowError, AttributeError):
        kinds = {
            dict: "role=column pairs, each role once, as in prompt=instruction+input,answer=output",
            tuple: "a list of paths, none of them empty",
            bool: "true or false",
            str: "text",
        }
        kind = {**kinds, int: "a whole number", float: "a number"}[type(default)]
        if name == "select.quotas":
            kind = "source=share pairs, each source once, as in web=0.5,*=0.1"
        raise StrideError(f"{where} sets {name} to {value!r}; it must be {kind}.") from None
    if metadata["choices"] and value not in metadata["choices"]:
        raise StrideError(f"{where} sets {name} to {value!r}; it must be one of {', '.join(metadata['choices'])}.")
    low = metadata["low"]
    if low is not None and value < low:
        raise StrideError(f"{where} sets {name} to {value}; it must be at least {low}.")
    if name == "recover.penalty_ratio" and not 0 < value <= 1:
        raise StrideError(f"{where} sets {name} to {value}; it must be above 0 and at most 1.")
    return value


def _convert_to_type(value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise TypeError
    if isinstance(default, dict):
        if isinstance(value, str):
            pairs = [item.partition("=") for item in value.split(",") if item]
            if not all(separator for _, separator, _ in pairs) or len({key for key, _, _ in pairs}) < len(pairs):
                raise ValueError
            return {key.strip(): item.strip() for key, _, item in pairs}
        if not all(type(item) in (str, int, float) for item in value.values()):
            raise TypeError
        return {str(key): str(item) for key, item in value.items()}
    if isinstance(default, tuple):
        items = value if isinstance(value, (list, tuple)) else [value]
        # An empty path would be the working folder.
        if not all(isinstance(item, (str, os.PathLike)) and os.fspath(item).strip() for item in items):
            raise TypeError
        return tuple(os.fspath(item) for item in items)
    if isinstance(default, str) and not isinstance(value, str):
        raise TypeError
    if isinstance(value, bool):
        raise TypeError
    if isinstance(default, int):
        try:
            whole = int(value)  # not through a float, which would round beyond 53 bits
        except ValueError:
            whole = int(float(value))  # for example "1e9"
            value = float(value)
        if not isinstance(value, str) and whole != value:
            raise ValueError
        return whole
    if isinstance(default, float) and not math.isfinite(float(value)):
        raise ValueError
    return type(default)(value)
