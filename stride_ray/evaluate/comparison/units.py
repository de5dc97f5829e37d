"""The comparison's units of work: every method by its command-line name, and the inputs that several share."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stride_ray
from stride_ray.evaluate.baselines import METHODS, variable_set
from stride_ray.evaluate.comparison import stride_variants
from stride_ray.evaluate.comparison.table import Entry
from stride_ray.evaluate.fitted_methods import FITTED_METHODS
from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.runtime.errors import StrideError

# Files that STRIDE's results, and the baselines', depend on.
STRIDE_SOURCES = ("runtime/*.py", "corpus/*.py", "models/**/*.py", "operators/**/*.py", "attribution/**/*.py")
BASELINE_SOURCES = ("evaluate/baselines/**/*.py", "models/causal_lm.py")
# Inputs shared by several methods, with markers like the methods'.
CHECKPOINTS, POOL = "checkpoints", "pool"


@dataclass(frozen=True)
class Unit:
    """A method to score, or an input shared by several methods.

    Attributes:
        slug: its name in files; variants of one configuration share it.
        entry: its row in the table, without measurements.
        keys: everything its result depends on.
        needs: slugs of the units it depends on.
        variant: STRIDE's variant; None for others.
    """

    slug: str
    entry: Entry
    keys: dict[str, Any]
    needs: tuple[str, ...] = ()
    variant: stride_variants.Variant | None = None


def method_names() -> list[str]:
    """Return every method's name on the command line."""
    return [*METHODS, *FITTED_METHODS, *(variant.slug for variant in stride_variants.VARIANTS)]


def known_units(benchmark: Benchmark) -> dict[str, Unit]:
    """Every method by its command-line name, and the units that several of them need."""
    theirs, mine = code_version(*BASELINE_SOURCES), code_version(*STRIDE_SOURCES)
    fingerprint = {"benchmark": benchmark.fingerprint}
    recipe = {**fingerprint, "code": code_version("evaluate/retraining/finetune.py")}
    units = [Unit(CHECKPOINTS, Entry(CHECKPOINTS), recipe), Unit(POOL, Entry(POOL), fingerprint | {"code": mine})]
    for slug, baseline in METHODS.items():
        entry = Entry(baseline.name, lexical=baseline.lexical, note=baseline.note)
        needs = (CHECKPOINTS,) if baseline.checkpoints else ()
        keys = {**fingerprint, "method": slug, "code": theirs, **variable_set(baseline.variable)}
        keys |= {"recipe": recipe["code"]} if needs else {}
        units.append(Unit(slug, entry, keys, needs))
    truth = hashlib.sha256(b"".join(rows.tobytes() + b";" for rows in benchmark.retrained().subsets))
    truth.update(benchmark.retrained().losses.tobytes())
    for slug, fitted in FITTED_METHODS.items():
        keys = {**fingerprint, "method": slug, "code": code_version(*fitted.sources), "truth": truth.hexdigest()[:16]}
        keys |= variable_set(fitted.variable)
        units.append(Unit(slug, Entry(fitted.name, note=fitted.note), keys))
    found = {unit.slug: unit for unit in units}
    for variant in stride_variants.VARIANTS:
        alone = next(each for each in stride_variants.VARIANTS if each.identity == variant.identity and not each.plus)
        lexical = bool(variant.plus) and METHODS[variant.plus].lexical
        note = variant.note if variant.plus or variant is alone else f"the same configuration as {alone.name}"
        entry = Entry(variant.name, True, variant.default, variant.paper, lexical, note=note)
        keys = {**fingerprint, "config": variant.identity, "code": mine}
        if variant.plus:
            keys |= {"plus": variant.plus, "theirs": theirs}
            found[variant.slug] = Unit(variant.slug, entry, keys, (alone.slug, variant.plus), variant)
        else:
            more = {"recipe": recipe["code"]} if variant.checkpoints else {}
            shared = (POOL, *((CHECKPOINTS,) if more else ()))
            found[variant.slug] = Unit(alone.slug, entry, keys | more, shared, alone)
    return found


def code_version(*patterns: str) -> str:
    """Return the package's version plus eight hash digits of the files, by pattern, that a result depends on."""
    root, content = Path(stride_ray.__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        content.update(path.name.encode() + path.read_bytes())
    return f"{stride_ray.__version__}+{content.hexdigest()[:8]}"


def chosen_methods(methods: Sequence[str] | None, ablations: bool) -> list[str]:
    """Deduplicate the requested methods; None: all but the ablations. Requested ablations come last.

    Raises:
        StrideError: for an unknown method.
    """
    known = method_names()
    if unknown := [each for each in methods or () if each not in known]:
        raise StrideError(f"Unknown method {unknown[0]!r}; known are {', '.join(known)}.")
    extra = [slug for slug, baseline in METHODS.items() if baseline.ablation]
    extra += [variant.slug for variant in stride_variants.VARIANTS if variant.ablation]
    wanted = [slug for slug in known if slug not in extra] if methods is None else methods
    return list(dict.fromkeys([*wanted, *(extra if ablations else ())]))
