"""Options: TOML in and out, one sentence for what is wrong, and identities that change with what matters alone."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stride_ray.runtime.config import STAGES, Config, dumps, loads, option_fields, stage_hash, stage_keys
from stride_ray.runtime.errors import StrideError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
OPTIONS = option_fields()


def values(name):
    """Values that an option takes."""
    default, metadata = Config().flat()[name], OPTIONS[name].metadata
    low = metadata["low"]
    if metadata["choices"]:
        return st.sampled_from(metadata["choices"])
    if name == "recover.penalty_ratio":
        return st.floats(1e-6, 1)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(-(2**63) if low is None else int(low), 2**63 - 1)
    if isinstance(default, float):
        return st.floats(low, allow_nan=False, allow_infinity=False)
    if isinstance(default, dict):
        return st.dictionaries(TEXT, TEXT, max_size=3)
    return st.lists(TEXT.filter(str.strip), max_size=3) if isinstance(default, list) else TEXT


CHANGES = st.fixed_dictionaries({}, optional={name: values(name) for name in OPTIONS})


@settings(deadline=None)
@given(changes=CHANGES, comments=st.booleans())
def test_toml_there_and_back(changes, comments):
    config = Config().updated(changes)
    assert loads(dumps(config, comments)) == config
    assert {name: config.flat()[name] for name in changes} == changes


@given(
    name=st.sampled_from(sorted(k for k, value in Config().flat().items() if not isinstance(value, dict | list))),
    data=st.data(),
)
def test_a_typed_value_is_the_value(name, data):
    value = data.draw(values(name))
    assert Config().updated({name: str(value)}).flat()[name] == value


def test_lists_and_pairs_as_typed():
    config = Config().updated({"corpus.columns": "text=body, id = key", "corpus.input": "a,b", "seed": "1e3"})
    assert (config.corpus.columns, config.corpus.input, config.seed) == ({"text": "body", "id": "key"}, ("a,b",), 1000)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[fit]\nstepz = 3", "has the key 'fit.stepz', which is not an option; did you mean 'fit.steps'"),
        ("[corpsu]\ninput = []", "corpsu"),
        ("sed = 1", "did you mean 'seed'"),
        ("corpus = 3", "'corpus', which is not an option"),
        ("[fit]\nsteps = 0", "sets fit.steps to 0; it must be at least 1"),
        ("[fit]\nsteps = 1.5", "must be a whole number"),
        ("[fit]\nsteps = true", "must be a whole number"),
        ("seed = inf", "must be a whole number"),
        ("[fit]\nlearning_rate = nan", "must be a number"),
        ("[fit]\nlearning_rate = 'fast'", "must be a number"),
        ("[fit]\nmethod = 'magic'", "must be one of closed_form, train"),
        ("[compute]\ndevice = 'tpu'", "must be one of auto, cpu, cuda"),
        ("[recover]\npenalty_ratio = 0", "must be above 0 and at most 1"),
        ("[recover]\npenalty_ratio = 1.1", "must be above 0 and at most 1"),
        ("[recover]\nnonnegative = 'maybe'", "must be true or false"),
        ("[corpus]\ncolumns = 'text'", "must be role=column pairs"),
        ("[corpus]\ncolumns = ['text']", "must be role=column pairs"),
        ("[corpus]\ncolumns = {text = ['body']}", "must be role=column pairs"),
        ("[corpus]\ncolumns = {text = true}", "must be role=column pairs"),
        ("[corpus]\ninput = 3", "must be a list of paths"),
        ("[corpus]\ninput = ''", "must be a list of paths, none of them empty"),
        ("[corpus]\ninput = ['a', ' ']", "must be a list of paths, none of them empty"),
        ("[corpus]\ninput = [3]", "must be a list of paths"),
        ("[corpus]\ninput = [['a']]", "must be a list of paths"),
        ("[corpus]\ninput = {a = 'b'}", "must be a list of paths"),
        ("[select]\nquotas = 'web'", "must be source=share pairs"),
        ("[model]\npath = 3", "must be text"),
        ("[fit", "is not valid TOML"),
        ("seed = 1" + "0" * 5000, "is not valid TOML"),
        ("a = " + "[" * 100_000, "is not valid TOML: its lists or tables are nested too deeply"),
        ("a = " + "{b = " * 100_000, "is not valid TOML: its lists or tables are nested too deeply"),
    ],
)
def test_a_sentence_for_what_is_wrong(text, told):
    with pytest.raises(StrideError) as caught:
        loads(text, "run.toml")
    assert told in str(caught.value)
    assert str(caught.value).startswith("run.toml ")
    assert "\n" not in str(caught.value)


def test_a_mark_of_byte_order_and_paths_that_are_no_strings():
    assert loads("\ufeffseed = 5").seed == 5
    given = {"corpus.input": [Path("a"), "b"], "select.quotas": {"web": 0.5, "*": 1}}
    config = Config().updated(given)
    assert (config.corpus.input, config.select.quotas) == (("a", "b"), {"web": "0.5", "*": "1"})


def test_what_run_adds_is_no_option():
    assert loads(dumps(Config()) + '[run]\ncode_version = "1"\n') == Config()


def changed(name):
    """Another value than the default."""
    default, metadata = Config().flat()[name], OPTIONS[name].metadata
    if metadata["choices"]:
        return next(choice for choice in metadata["choices"] if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 1 if name != "recover.penalty_ratio" else 0.5
    return {"text": "b"} if isinstance(default, dict) else ["x"] if isinstance(default, list) else "x"


FITTED, EXACT = ("operators", "responses", "estimates", "influence"), ("curvature", "directions", "exact")
ALWAYS = {"blocks", *FITTED, *EXACT}
# What is known by its files, wherever they lie.
PLACES = {"corpus.input", "corpus.tokenizer", "model.path", "model.start", "model.checkpoints"}
# The stages whose output depends on an option; none for what changes no result.
DEPENDING = {
    **{name: ALWAYS for name in OPTIONS if name.startswith("corpus.") and name not in PLACES},
    **{name: {*FITTED} for name in OPTIONS if name.partition(".")[0] in ("membership", "operators", "fit")},
    **{name: {*FITTED, *EXACT} for name in ("seed", "model.dtype")},
    "model.split": {*FITTED},
    **{name: {"responses", "estimates", "influence"} for name in OPTIONS if name.startswith("respond.")},
    **{name: {"estimates", "influence"} for name in OPTIONS if name.startswith("recover.")},
    **{
        name: {"directions", "responses", "estimates", "influence", "exact"}
        for name in OPTIONS
        if name.startswith("solve.")
    },
    "attribute.top": {"responses", "estimates", "influence", "exact"},
    "attribute.negative_scale": {"responses", "estimates", "influence", "exact"},
    "attribute.candidates": {"influence"},
    "attribute.tokens": {"influence", "exact"},
    **{name: {*FITTED, *EXACT} for name in ("operators.layers", "operators.sites")},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stage_depends_on_its_own_keys_and_those_before(name):
    before, after = Config(), Config().updated({name: changed(name)})
    differ = {stage for stage in STAGES if stage_hash(before, stage) != stage_hash(after, stage)}
    assert differ == DEPENDING.get(name, set())
    assert {stage for stage in STAGES if name in stage_keys(before, stage)} == differ


def test_compute_and_places_are_no_ones_identity():
    assert {name for name in OPTIONS if name not in DEPENDING} == {
        "attribute.exact",
        *PLACES,
        *(name for name in OPTIONS if name.startswith(("compute.", "scan.", "select."))),
    }
