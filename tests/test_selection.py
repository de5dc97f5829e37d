"""Ranking and choice on small tables: against plain pandas, limits, quotas, draws, near-duplicates and rounds."""

import functools
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stride_ray.attribution.tables import DOCUMENTS
from stride_ray.corpus.splits import plan
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import SelectConfig
from stride_ray.runtime.storage import Store
from stride_ray.selection import database, ranking
from stride_ray.selection.choice import (
    KEPT_UNNAMED,
    GreedyChooser,
    RandomChooser,
    check_options,
    reasons,
    write_manifest,
)
from stride_ray.selection.database import Database
from stride_ray.selection.duplicates import NearDuplicateIndex, signature
from stride_ray.selection.pool import POOL
from stride_ray.selection.ranking import (
    ORDERED,
    Target,
    batches,
    count_not_finite,
    random_order,
    rank_documents,
)
from stride_ray.selection.writing import _arrow_rows

SETS = {"maths": 5, "law": 12}
N = 200


def options(**changes):
    return Config().updated({f"select.{name}": value for name, value in changes.items()}).select


def influences(seed=0):
    """Per set a table of documents, of which the last 40 are named nowhere; influence has ties."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, queries in SETS.items():
        rows = []
        for query in range(queries):
            named = rng.choice(N - 40, 60, replace=False)
            values = np.round(rng.normal(0, 1, 60), 1)
            order = np.lexsort((named, -values))
            rows += [
                {"query_id": f"{name}{query}", "rank": rank, "document_id": f"d{named[i]:03d}", "influence": values[i]}
                for rank, i in enumerate(order, 1)
            ]
        numbers = [int(row["document_id"][1:]) for row in rows]
        found[name] = pd.DataFrame(rows).assign(source=[f"s{i % 4}" for i in numbers], blocks=1)
    return found


def documents(seed=1):
    rng = np.random.default_rng(seed)
    ids = np.arange(N)
    return pa.Table.from_pydict(
        {
            "document_id": [f"d{i:03d}" for i in ids],
            "source": [f"s{i % 4}" for i in ids],
            "part": ids // 64,
            "place": ids % 64 * 10,
            "tokens": rng.integers(5, 60, N),
            "signature": [None] * N,
        },
        POOL,
    )


def write(store, tables, pool, parts=3):
    """The files that ranking reads, tables cut into parts; returns targets and the pool's place."""
    targets = []
    for name, table in tables.items():
        pieces = np.array_split(np.arange(len(table)), parts)
        names = tuple(f"{name}-{i}.parquet" for i in range(parts))
        for each, rows in zip(names, pieces, strict=True):
            columns = {column: table.iloc[rows][column].to_numpy() for column in DOCUMENTS.names}
            store.write_table(each, pa.Table.from_pydict(columns, DOCUMENTS))
        targets.append(Target(name, store, names, tuple(dict.fromkeys(table["query_id"])), name))
    store.write_table("pool.parquet", pool)
    return targets, (store, ["pool.parquet"])


def ordered(folder, tables=None, pool=None, store=None, earlier=(), seed=0, parts=3, **changes):
    """All documents in the order in which they are considered, as a data frame."""
    store = store or Store(str(folder / "in"))
    targets, where = write(store, influences() if tables is None else tables, pool or documents(), parts)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    with Database(str(work)) as database:
        path = rank_documents(database, targets, where, earlier, options(**changes), seed)
        table = pa.concat_tables(batches(path)).cast(ORDERED)
    shutil.rmtree(work)
    return table


def chosen(table, seed=0, **changes):
    """The manifest that a choice over an ordered table gives."""
    wanted = options(**changes)
    check_options(wanted)
    named = table["mean_influence"].is_valid().to_numpy().sum() if table.num_rows else 0
    best = GreedyChooser(wanted, table.num_rows, sum(table["tokens"].to_pylist()), int(named))
    frames = []
    for start in range(0, table.num_rows, 37):
        batch = table.slice(start, 37)
        codes, alike = best.codes(batch)
        frames.append(batch.to_pandas().assign(code=codes, alike=alike or None, why=np.array(reasons(wanted))[codes]))
    return pd.concat(frames).assign(kept=lambda frame: frame["code"] <= KEPT_UNNAMED)


def by_hand(tables):
    """best_rank, mean_influence and share_helped of each named document and, per set, best rank and mean."""
    pieces = []
    for name, table in tables.items():
        queries = table["query_id"].nunique()
        helping = table[table["influence"] > 0]
        each = pd.DataFrame(
            {
                "best": helping.groupby("document_id")["rank"].min(),
                "mean": table.groupby("document_id")["influence"].sum() / queries,
                "share": helping.groupby("document_id").size() / queries,
            }
        )
        pieces.append(each.assign(set=name).reset_index())
    return pd.concat(pieces).fillna({"share": 0.0})


@pytest.mark.parametrize("names", [("maths",), ("law",), ("maths", "law")])
@pytest.mark.parametrize("by", ["rank", "mean", "share"])
def test_scores_and_their_order_are_those_of_a_plain_recomputation(tmp_path, names, by):
    tables = {name: influences()[name] for name in names}
    table = ordered(tmp_path, tables, by=by).to_pandas().set_index("document_id")
    plain = by_hand(tables)
    together = plain.groupby("document_id").agg(best=("best", "min"), mean=("mean", "sum"), share=("share", "sum"))
    together[["mean", "share"]] /= len(names)
    named = table.loc[together.index]
    assert len(table) == N
    np.testing.assert_allclose(named["mean_influence"], together["mean"], atol=1e-12)
    np.testing.assert_allclose(named["share_helped"], together["share"], atol=1e-12)
    np.testing.assert_array_equal(named["best_rank"], together["best"])
    absent = table[~table.index.isin(together.index)]
    assert absent[["score", "mean_influence", "best_rank", "share_helped"]].isna().all(axis=None)
    if by != "rank":
        np.testing.assert_allclose(named["score"], together[{"mean": "mean", "share": "share"}[by]], atol=1e-12)
    elif len(names) == 1:
        np.testing.assert_array_equal(named["score"], together["best"])
    else:
        best = plain.dropna(subset=["best"]).sort_values(["set", "best", "mean"], ascending=[True, True, False])
        places = best.assign(place=best.groupby("set").cumcount() + 1).groupby("document_id")["place"].min()
        # Exact ties between documents of a set go by a draw, so a place may differ by a tie's length.
        assert (named["score"].dropna() - places).abs().max() <= 3
        assert sorted(named["score"].dropna())[:2] == [1, 1]  # one from each set
    score = table["score"].to_numpy() * (-1 if by == "rank" else 1)
    key = np.nan_to_num(score, nan=-1e9 if by == "rank" else 0.0)
    assert (np.diff(key) <= 1e-12).all()
    tied = np.flatnonzero(np.diff(key) == 0)
    mean = table["mean_influence"].fillna(0).to_numpy()
    assert (mean[tied] >= mean[tied + 1] - 1e-12).all()
    # What only harms comes after what nobody names.
    harmful = named.index[(together["best"].isna() & (together["mean"] < 0)).to_numpy()]
    place = {document: i for i, document in enumerate(table.index)}
    if by != "share" or len(harmful):
        assert all(place[each] > max(place[other] for other in absent.index) for each in harmful)


def test_nothing_depends_on_parts_threads_or_where_the_files_are(tmp_path, monkeypatch):
    tables = {name: table.sample(frac=1, random_state=3) for name, table in influences().items()}
    for table in tables.values():
        table["influence"] *= 1e-7 / 3  # whose sums depend on their order, as floating-point numbers
    one = ordered(tmp_path, tables, by="mean")
    again = ordered(tmp_path, {name: table[::-1] for name, table in tables.items()}, parts=7, by="mean")
    assert one.equals(again)
    monkeypatch.setattr(database, "THREADS", 1)
    assert ordered(tmp_path, tables, by="mean").equals(one)
    ranks = ordered(tmp_path, tables)
    for few in (70, 3):  # three passes; more than there are documents of some
        monkeypatch.setattr(ranking, "PASS", few)
        assert ordered(tmp_path, tables, by="mean").equals(one)
        assert ordered(tmp_path, tables).equals(ranks)
    assert ordered(tmp_path, {"maths": tables["maths"].iloc[:0]}, by="mean")["score"].null_count == N
    assert ordered(tmp_path, tables, store=Store("memory://selection/in"), by="mean").equals(one)
    assert not ordered(tmp_path, tables, seed=1, by="mean").equals(one)  # ties


def test_queries_that_do_not_count_are_left_out_and_empty_tables_name_nobody(tmp_path):
    tables = influences()
    maths = tables["maths"]
    store = Store(str(tmp_path / "in"))
    targets, where = write(store, {"maths": maths}, documents())
    some = ("maths1", "maths3")
    (tmp_path / "some").mkdir()
    with Database(str(tmp_path / "some")) as database:
        only = [Target("maths", store, targets[0].tables, some, "")]
        found = pq.read_table(rank_documents(database, only, where, (), options(by="mean"), 0)).to_pandas()
    plain = by_hand({"maths": maths[maths["query_id"].isin(some)]}).set_index("document_id")
    found = found.dropna(subset=["mean_influence"]).set_index("document_id")
    assert set(found.index) == set(plain.index)
    np.testing.assert_allclose(found.loc[plain.index, "mean_influence"], plain["mean"], atol=1e-12)
    nobody = ordered(tmp_path, {"maths": maths.iloc[:0]}, by="rank")
    assert nobody.num_rows == N
    assert nobody["score"].null_count == N
    names = nobody["document_id"].to_pylist()
    assert names != sorted(names)  # a draw, not the alphabet, which would favour a source
    kept = chosen(nobody, documents=10)
    assert kept["kept"].sum() == 10
    assert set(kept[kept["kept"]]["why"]) == {"taken without influence on any query"}


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_a_share_of_a_hundred_is_so_many(share):
    whole = round(100 * share)
    options = SelectConfig(documents=share, drop="bottom", drop_at=share, quotas={"web": str(share)})
    chooser = GreedyChooser(options, 100, 1000, 100)
    assert (chooser.documents, chooser.spared) == (whole, 100 - whole)
    assert GreedyChooser(replace(options, documents=100), 100, 1000, 100)._room("web") == whole


def test_limits_are_kept_and_what_does_not_fit_is_passed_over(tmp_path):
    table = ordered(tmp_path)
    tokens = sum(table["tokens"].to_pylist())
    assert list(chosen(table, documents=12)["kept"]) == [True] * 12 + [False] * (N - 12)
    assert chosen(table, documents=0.25)["kept"].sum() == N // 4
    for asked in (300, 0.2):
        found = chosen(table, tokens=asked)
        kept = found[found["kept"]]
        limit = asked if asked > 1 else int(asked * tokens)
        left, expected = limit, []
        for size in found["tokens"]:
            expected.append(size <= left)
            left -= size if expected[-1] else 0
        assert list(found["kept"]) == expected
        assert limit - 5 < kept["tokens"].sum() <= limit  # the smallest document has 5 tokens
        assert "asked for" in found[~found["kept"]]["why"].iloc[0]
    both = chosen(table, tokens=300, documents=3)
    assert both["kept"].sum() == 3


def test_quotas_bound_a_source_and_leave_its_room_to_others(tmp_path):
    table = ordered(tmp_path)
    free = chosen(table, documents=40)
    bounded = chosen(table, documents=40, quotas={"s0": "0.1", "*": "0.4"})
    kept = bounded[bounded["kept"]]["source"].value_counts()
    assert free[free["kept"]]["source"].value_counts()["s0"] > 4
    assert kept["s0"] == 4
    assert kept.sum() == 40
    assert kept.max() <= 16
    assert (bounded["why"] == "no room left for it in its source's quota").any()
    tokens = chosen(table, tokens=1000, quotas={"s1": "0"})
    assert "s1" not in set(tokens[tokens["kept"]]["source"])
    assert tokens[tokens["kept"]]["tokens"].sum() > 950


def test_filters_drop_what_harms_and_keep_what_nobody_names(tmp_path):
    table = ordered(tmp_path, by="mean")
    found = chosen(table, by="mean", drop="below")
    harmful = found["mean_influence"] < 0
    assert list(found["kept"]) == list(~harmful)
    assert set(found[harmful]["why"]) == {"score below 0"}
    bottom = chosen(table, by="mean", drop="bottom", drop_at=0.25)
    named = bottom.dropna(subset=["mean_influence"])
    gone = bottom[~bottom["kept"]]
    assert len(gone) == len(named) // 4
    assert gone["mean_influence"].max() <= named[named["kept"]]["mean_influence"].min()
    share = chosen(ordered(tmp_path, by="share"), by="share", drop="below", drop_at=0.2)
    assert list(share["kept"]) == list(~(share["share_helped"] < 0.2))
    both = chosen(table, by="mean", drop="below", documents=7)
    assert list(both[both["kept"]]["document_id"]) == list(table["document_id"].to_pylist()[:7])


def test_a_gumbel_draw_follows_from_seed_and_document_and_favours_the_first(tmp_path):
    plain = ordered(tmp_path)
    drawn = ordered(tmp_path, temperature=1.0)
    names = drawn["document_id"].to_pylist()
    assert sorted(names) == sorted(plain["document_id"].to_pylist())
    assert names != plain["document_id"].to_pylist()
    # Neither the order of the rows nor the number of files matters.
    shuffled = documents().take(pa.array(np.random.default_rng(0).permutation(N)))
    assert ordered(tmp_path, pool=shuffled, parts=5, temperature=1.0)["document_id"].to_pylist() == names
    assert ordered(tmp_path, temperature=1.0, seed=7)["document_id"].to_pylist() != names
    assert ordered(tmp_path, temperature=1e-3)["document_id"].to_pylist() == plain["document_id"].to_pylist()
    place = {name: i for i, name in enumerate(plain["document_id"].to_pylist(), 1)}
    # Place i comes before place j with odds j / i, so place 1 before each of the others in 1 − Σ 1 / (1 + j) of them.
    before = sum(each > names.index(plain["document_id"][0].as_py()) for each in map(names.index, names))
    assert before > N / 2
    half = {place[name] for name in names[: N // 4]}
    assert np.mean(list(half)) < N / 3


def test_near_duplicates_are_passed_over_and_name_their_twin(tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 1000, 80) for _ in range(N)]
    pool = documents()
    order = ordered(tmp_path)["document_id"].to_pylist()
    twins = {order[5]: order[1], order[9]: order[1], order[11]: order[190]}
    for copy, original in twins.items():
        text = texts[int(original[1:])].copy()
        text[40] = 7
        texts[int(copy[1:])] = text
    signed = pa.array([signature(text) for text in texts], POOL.field("signature").type)
    table = ordered(tmp_path, pool=pool.set_column(5, POOL.field("signature"), signed))
    found = chosen(table, documents=20, near_duplicates=0.7).set_index("document_id")
    twin = (f"s{int(order[1][1:]) % 4}", order[1])
    assert found.loc[order[5], "alike"] == found.loc[order[9], "alike"] == twin
    assert found.loc[order[11], "kept"]  # its twin comes later, and after the end
    assert not found.loc[[order[5], order[9]], "kept"].any()
    assert found["kept"].sum() == 20
    everything = chosen(table, documents=N, near_duplicates=0.7)
    assert (~everything["kept"]).sum() == 3
    assert signature(texts[3][:2]) != signature(texts[3][:3])


def test_signatures_estimate_the_jaccard_similarity():
    rng = np.random.default_rng(1)
    one = rng.integers(0, 5000, 400)
    taken = NearDuplicateIndex(0.5)
    taken.add(("s", "one"), signature(one))
    assert taken.like(signature(one)) == ("s", "one")
    for cut, expected in ((40, ("s", "one")), (320, None)):
        other = one.copy()
        other[:cut] = rng.integers(0, 5000, cut)
        grams = [{tuple(text[i : i + 5]) for i in range(396)} for text in (one, other)]
        jaccard = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
        same = np.frombuffer(signature(one), "<u4") == np.frombuffer(signature(other), "<u4")
        assert same.mean() == pytest.approx(jaccard, abs=0.12)
        assert taken.like(signature(other)) == expected


def test_an_index_in_a_file_finds_what_a_search_over_all_finds(tmp_path):
    rng = np.random.default_rng(2)
    values = rng.integers(0, 2**32, (300, 128), dtype=np.uint64).astype("<u4")
    for at in range(1, 300, 3):  # like an earlier one, more or less
        values[at] = values[rng.integers(0, at)]
        values[at, rng.random(128) < rng.choice([0.0, 0.1, 0.4])] = at
    taken, kept = NearDuplicateIndex(0.8, str(tmp_path)), []
    for at, row in enumerate(values):
        similar = [float((values[other] == row).mean()) for other in kept]
        # A band agrees for certain only well above the threshold.
        if max(similar, default=0.0) > 0.85:
            assert taken.like(row.tobytes()) == ("a", str(kept[int(np.argmax(similar))]))
        elif max(similar, default=0.0) < 0.8:
            assert taken.like(row.tobytes()) is None
            taken.add(("a", str(at)), row.tobytes())
            kept.append(at)
    assert 200 < len(kept) < 280
    assert (tmp_path / "duplicates.sqlite").stat().st_size > 0
    taken._sql.execute("PRAGMA max_page_count = 1")  # as on a full disk
    with pytest.raises(StrideError, match=r"Comparing near-duplicates failed \(.*full\)"):
        any(taken.add(("b", str(at)), rng.bytes(512)) for at in range(200))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_influence_that_is_not_finite_is_ignored_and_counted(tmp_path, value, statistics, monkeypatch):
    if not statistics:
        monkeypatch.setattr(pq, "write_table", functools.partial(pq.write_table, write_statistics=False))
    tables = influences()
    tables["maths"].loc[[3, 70], "influence"] = value
    without = {**tables, "maths": tables["maths"].drop(index=[3, 70])}
    store = Store(str(tmp_path / "in"))
    # The means are over the queries, of which each has other rows.
    assert ordered(tmp_path, tables, store=store).equals(ordered(tmp_path, without))
    targets, _ = write(store, tables, documents())
    (tmp_path / "work").mkdir()
    with Database(str(tmp_path / "work")) as database:
        assert count_not_finite(database, targets) == 2
        tables["law"]["influence"] = value
        targets, _ = write(store, tables, documents())
        with pytest.raises(
            StrideError, match=r"in 720 of 720 rows of .*documents-\*.parquet is not finite, more than 5%"
        ):
            count_not_finite(database, targets)


def test_a_table_that_was_damaged_is_not_ranked(tmp_path):
    """DuckDB does not look at the checksums of pages, and would read another number."""
    store = Store(str(tmp_path / "in"))
    targets, pool = write(store, influences(), documents(), parts=1)
    whole = store.read("law-0.parquet")
    (tmp_path / "work").mkdir()
    for place in range(40, len(whole), len(whole) // 20):
        store.write("law-0.parquet", whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with (
            Database(str(tmp_path / "work")) as sql,
            pytest.raises(StrideError, match=r"law-0.parquet cannot be read as Parquet: it was damaged or changed"),
        ):
            rank_documents(sql, targets, pool, (), options(documents=3), 0)
        (tmp_path / "work/select.duckdb").unlink()


def test_what_an_earlier_selection_took_is_not_taken_again(tmp_path):
    table, store = ordered(tmp_path), Store(str(tmp_path / "first"))
    wanted = options(documents=30)
    (tmp_path / "choice").mkdir()
    with Database(str(tmp_path / "choice")) as sql:
        parts = [table.slice(0, 90), table.slice(90)]
        first, _ = write_manifest(GreedyChooser(wanted, N, 0, 0), parts, reasons(wanted), 1, store, sql)
    assert (first.documents, sum(each["documents"] for each in first.sources.values())) == (30, 30)
    assert sum(each["tokens"] for each in first.sources.values()) == first.tokens
    assert list(first.sources) == sorted(first.sources, key=lambda name: (-first.sources[name]["tokens"], name))
    manifest = store.read_table("manifest.parquet").to_pandas()
    assert list(manifest["rank"]) == list(range(1, N + 1))
    assert manifest["round"].dropna().eq(1).all()
    second = chosen(ordered(tmp_path, earlier=[(store, "manifest.parquet")]), documents=30)
    assert not set(second[second["kept"]]["document_id"]) & set(manifest[manifest["kept"]]["document_id"])
    assert (second["why"] == "taken by an earlier selection").sum() == 30
    assert list(second[second["kept"]]["document_id"]) == table["document_id"].to_pylist()[30:60]


def test_the_random_arm_has_each_sources_tokens(tmp_path):
    table, work = ordered(tmp_path), tmp_path / "draw"
    wanted = {"s0": 600, "s2": 150}
    work.mkdir()
    pq.write_table(table, work / "ordered.parquet")
    with Database(str(work)) as database:
        path = random_order(database, str(work / "ordered.parquet"), 0)
        drawn, _ = write_manifest(
            RandomChooser(wanted),
            batches(path),
            reasons(SelectConfig(), drawn=True),
            1,
            Store(str(work)),
            database,
        )
        one = pq.read_table(path)
        other = pq.read_table(random_order(database, str(work / "ordered.parquet"), 1))
    assert drawn.sources.keys() == wanted.keys()
    for source, tokens in wanted.items():
        assert tokens - 10 < drawn.sources[source]["tokens"] <= tokens
    assert drawn.reasons == {"drawn at random": drawn.documents, "not drawn": N - drawn.documents}
    assert not other.equals(one)


@pytest.mark.parametrize("by", ["rank", "mean", "share"])
@pytest.mark.parametrize("names", [["maths"], ["maths", "law"]])
def test_documents_with_the_same_id_in_other_sources_keep_their_own_influence(tmp_path, monkeypatch, by, names):
    monkeypatch.setattr(ranking, "PASS", 64)
    unique = {name: influences()[name] for name in names}
    pool = documents().to_pandas()
    expected = ordered(tmp_path, unique, by=by).to_pandas()
    same = {name: table.assign(document_id=_in_its_source(table["document_id"])) for name, table in unique.items()}
    pool["document_id"] = _in_its_source(pool["document_id"])
    assert pool["document_id"].nunique() == N // 4
    found = ordered(tmp_path, same, pa.Table.from_pandas(pool, POOL, preserve_index=False), by=by).to_pandas()
    columns = ["mean_influence", "share_helped", "best_rank"]
    if by != "rank" or len(names) == 1:  # else exact ties within a set go by a draw, which depends on the id
        columns.append("score")
    sides = [each.sort_values(["part", "place"])[columns].reset_index(drop=True) for each in (found, expected)]
    pd.testing.assert_frame_equal(*sides)


def _in_its_source(ids):
    return [f"d{int(name[1:]) // 4:03d}" for name in ids]


def test_tables_of_other_blocks_are_refused(tmp_path):
    tables = {name: table.assign(source="elsewhere") for name, table in influences().items()}
    with pytest.raises(StrideError, match="of the source 'elsewhere', which is not in the blocks"):
        ordered(tmp_path, tables)


def test_sources_of_one_document_are_drawn_from_together(tmp_path):
    pool = documents().to_pandas()
    alone = pool.index[pool["source"].isin(["s1", "s2", "s3"])]
    pool.loc[alone, "source"] = [f"file-{i}" for i in alone]
    tables = influences()
    for each in tables.values():
        each["source"] = pool.set_index("document_id")["source"].loc[each["document_id"]].to_numpy()
    table = ordered(tmp_path, tables, pa.Table.from_pandas(pool, POOL, preserve_index=False))
    strata = table.to_pandas().set_index("source")["stratum"]
    assert strata.notna().sum() == (pool["source"] == "s0").sum()
    assert set(strata.dropna().items()) == {("s0", "s0")}
    drawn = RandomChooser({None: 500})
    codes, _ = drawn.codes(table)
    taken = table.filter(pa.array(codes <= KEPT_UNNAMED)).to_pandas()
    assert not set(taken["source"]) & {"s0"}
    assert 450 < taken["tokens"].sum() <= 500


def test_what_only_fits_because_larger_ones_did_not_is_told(tmp_path):
    found = chosen(ordered(tmp_path), tokens=1000)
    passed = (found["why"] == "no room left for it in the 1000 tokens asked for").to_numpy()
    kept, first = found["kept"].to_numpy(), int(np.argmax(passed))
    small = "taken by best rank, fits the budget left by larger ones"
    assert set(found["why"][:first]) == {"taken by best rank"}
    assert set(found["why"][first:][kept[first:]]) == {small}


@pytest.mark.parametrize("folder", ["tokens=0.2", "v[1]", "source=wiki"])
def test_folders_names_are_no_columns_and_no_patterns(tmp_path, folder):
    plain = ordered(tmp_path)
    (tmp_path / "v1").mkdir()
    odd = ordered(tmp_path, store=Store(str(tmp_path / folder)))
    assert odd.equals(plain)


def test_batches_are_of_one_size_whatever_the_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(ranking, "BATCH", 64)
    table = ordered(tmp_path)
    for group in (7, 64, 150, 1000):
        pq.write_table(table, tmp_path / "file.parquet", row_group_size=group)
        pieces = list(batches(str(tmp_path / "file.parquet")))
        assert [each.num_rows for each in pieces] == [64, 64, 64, 8]
        assert pa.concat_tables(pieces).equals(table)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "Say how much to take"),
        ({"drop": "below"}, "A rank has no threshold"),
        ({"drop": "bottom", "drop_at": 1.5}, "must lie between 0 and 1"),
        ({"drop": "below", "by": "mean", "temperature": 1}, "use one of the two"),
        ({"tokens": 1.5}, "neither a share below 1 nor a whole number"),
        ({"drop": "bottom", "drop_at": 0.1, "quotas": {"a": "0.1"}}, "Quotas are shares of a size"),
        ({"documents": 5, "near_duplicates": 1.5}, "at most 1"),
        ({"documents": 5, "quotas": {"a": "lots"}}, "The quota of the source 'a' is 'lots'"),
        ({"documents": 5, "quotas": {"a": "1.5"}}, "must be a share from 0 to 1"),
    ],
)
def test_options_that_do_not_go_together_are_told(changes, told):
    with pytest.raises(StrideError, match=told):
        check_options(options(**changes))


_BAD_UTF8 = pa.array([b"u", b"\xff", b"w"]).buffers()
_UNION = pa.UnionArray.from_dense(
    pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array([1, 2]), pa.array(["x"])]
)


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize(
    ("column", "ending"),
    [
        (pa.array([2**30, 1, 2], pa.date32()), ".parquet"),
        (pa.array([2**60, 1, 2], pa.timestamp("ms")), ".parquet"),
        (pa.array([1, 2, 3], pa.time64("ns")), ".parquet"),
        (pa.StringArray.from_buffers(3, _BAD_UTF8[1], _BAD_UTF8[2]), ".parquet"),
        (pa.array([[("a", 1), ("a", 2)], None, []], pa.map_(pa.string(), pa.int32())), ".parquet"),
        (pa.array([(1, 2, 3), None, (4, 5, 6)], pa.month_day_nano_interval()), ".arrow"),
        (_UNION, ".arrow"),
    ],
)
def test_rows_of_arrow_files_are_copied_whatever_they_hold(tmp_path, column, ending, framed):
    table = pa.table({"text": ["a", "b", "c"], "c": column})
    with (pa.ipc.new_file if framed else pa.ipc.new_stream)(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    kinds = []
    for wanted in ({1}, {0, 2}):
        kind, count = _arrow_rows(plan([str(tmp_path)], 1 << 20)[0], wanted, str(tmp_path / ".out"))
        with open(tmp_path / ".out", "rb") as file:
            held = pq.read_table(file) if kind == ".parquet" else pa.ipc.open_stream(file).read_all()
        assert held.schema.equals(table.schema)
        assert count == len(wanted)
        assert pa.concat_arrays(held["c"].chunks).equals(pa.concat_arrays([column[n : n + 1] for n in sorted(wanted)]))
        kinds.append(kind)
    assert kinds == [ending] * 2
