"""What stages cost is kept, and foretells what a larger run costs."""

import json
from argparse import ArgumentTypeError

import pytest

from stride_ray.cli.arguments import count, counts
from stride_ray.cli.main import main
from stride_ray.cli.plan import plan
from stride_ray.operators.site_fit import rows_for
from stride_ray.runtime import costs
from stride_ray.runtime.costs import phase, record_stage_costs
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store


def attempt(stage, *results, amount, total=None):
    """One attempt at a stage: a phase whose results cost (seconds, MB, worker) each; interrupted before its total."""
    with record_stage_costs(stage), phase("score", "blocks", total or amount) as under_way:
        for result in results:
            costs.add_result_cost(result)
        under_way.amount += amount
        if total:
            raise KeyboardInterrupt


def scored(tmp_path):
    """What the phase of ``attempt`` has cost so far."""
    found = json.loads((tmp_path / "cost.json").read_text())["phases"]["score"]
    return {key: found[key] for key in ("total", "amount", "busy")}


def test_costs_of_several_attempts_are_added(tmp_path):
    stage = Stage(Store(str(tmp_path)), "identity")
    attempt(stage, (2.0, 300, "a", {}), (4.0, 500, "b", {"start": 1.0}), *[(1.0, 200, "a", {})] * 6, amount=30)
    attempt(stage, (4.0, 400, "c", {}), amount=10)
    phases = json.loads((tmp_path / "cost.json").read_text())["phases"]
    # One second was told apart; the workers' first results took 2 and 3 s, the six later ones 1 s each.
    about = {"total": 30, "amount": 30, "unit": "blocks"}
    assert phases["start"] == {**about, "wall": 2.0, "busy": 0.0, "workers": 2, "peak_mb": 500}
    found = phases["score"]
    assert found.pop("wall") >= 0
    assert found == {"total": 40, "amount": 40, "unit": "blocks", "busy": 12.0, "workers": 2, "peak_mb": 500}


def test_the_starts_of_several_phases_are_added(tmp_path):
    stage = Stage(Store(str(tmp_path)), "identity")
    with record_stage_costs(stage):
        for label, start in (("score", 1.0), ("rank", 2.0)):
            with phase(label, "blocks", 1):
                costs.add_result_cost((5.0, 300, "a", {"start": start}))
    phases = json.loads((tmp_path / "cost.json").read_text())["phases"]
    assert phases["start"]["wall"] == 3.0
    assert (phases["score"]["busy"], phases["rank"]["busy"]) == (4.0, 3.0)


def test_an_attempt_without_results_leaves_costs_alone(tmp_path):
    stage = Stage(Store(str(tmp_path)), "identity")
    with pytest.raises(ValueError, match="lost"), record_stage_costs(stage), phase("score", "blocks", 3):
        raise ValueError("lost")
    with record_stage_costs(stage):
        pass
    assert not (tmp_path / "cost.json").exists()


def test_an_interrupted_attempt_counts_for_what_need_not_be_done_again(tmp_path):
    stage = Stage(Store(str(tmp_path)), "identity")
    with pytest.raises(KeyboardInterrupt):
        attempt(stage, (90.0, 300, "a", {}), amount=9, total=10)
    assert scored(tmp_path) == {"total": 10, "amount": 9, "busy": 90.0}
    attempt(stage, (10.0, 300, "b", {}), amount=1)
    assert scored(tmp_path) == {"total": 10, "amount": 10, "busy": 100.0}
    attempt(stage, (50.0, 300, "c", {}), amount=5)  # the corpus grew
    assert scored(tmp_path) == {"total": 15, "amount": 15, "busy": 150.0}


def test_an_interrupted_attempt_that_is_done_again_does_not_count_twice(tmp_path):
    stage = Stage(Store(str(tmp_path)), "identity")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            attempt(stage, (90.0, 300, "a", {}), amount=9, total=10)
    attempt(stage, (100.0, 300, "b", {}), amount=10)
    assert scored(tmp_path) == {"total": 10, "amount": 10, "busy": 100.0}
    with pytest.raises(KeyboardInterrupt):
        attempt(stage, (90.0, 300, "a", {}), amount=9, total=10)
    attempt(stage, (20.0, 300, "b", {}), amount=2)  # one of the nine was lost
    assert scored(tmp_path)["busy"] == pytest.approx(100 + 90 + 20 - 10, rel=0.01)


def test_a_killed_attempt_has_written_its_costs(tmp_path, monkeypatch):
    stage = Stage(Store(str(tmp_path)), "identity")
    monkeypatch.setattr(costs, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(costs, "SAVE_SHARE", 0.0)
    with record_stage_costs(stage), phase("score", "blocks", 10) as under_way:
        for _ in range(3):
            costs.add_result_cost((2.0, 300, "a", {}))
            under_way.amount += 1
        assert scored(tmp_path)["busy"] == 6.0


@pytest.fixture
def pilot(tmp_path):
    """A run of 1,000 blocks and 10 queries on two workers, as its files tell."""
    run = Run(str(tmp_path / "pilot"), changes={"attribute.top": 100})

    def stage(name, part, manifest, phases, size):
        opened = run.stage(name, part)
        opened.store.write_json("manifest.json", manifest)
        told = {
            label: {"amount": 1, "unit": "", "wall": wall, "busy": busy, "workers": 2, "peak_mb": peak}
            for label, (wall, busy, peak) in phases.items()
        }
        opened.store.write_json("cost.json", {"wall": 1.0, "driver_mb": 1, "phases": told})
        opened.store.write("data", bytes(size))
        return opened

    stage("blocks", "", {"blocks": 1000, "fingerprint": "f"}, {"shard": (15.0, 20.0, 400)}, 50_000)
    stage(
        "curvature", "", {"gradient_bytes": 2**24}, {"count": (6.0, 2.0, 500), "precondition": (10.0, 12.0, 900)}, 1000
    )
    stage("directions", "asked", {}, {"queries": (3.0, 4.0, 700)}, 100)
    stage("exact", "asked", {"queries": 10}, {"score": (12.0, 20.0, 800), "rank": (2.0, 2.0, 300)}, 8000)
    run.save()
    return run


def test_work_grows_and_the_rest_does_not(pilot):
    blocks, curvature, directions, exact = plan(pilot, "asked", blocks=10_000, queries=128, workers=8)
    # shard: 5 s to start, and ten times 20 worker-seconds over eight.
    assert blocks.seconds == pytest.approx(5 + 200 / 8)
    assert blocks.worker_seconds == pytest.approx(200)
    assert blocks.writes == pytest.approx(10 * pilot.stage("blocks").store.size())
    # count grows, precondition is over a sample.
    assert curvature.seconds == pytest.approx((5 + 20 / 8) + (4 + 12 / 8))
    assert curvature.holds == 900
    assert directions.seconds == pytest.approx(1 + 12.8 * 4 / 8)
    # 128 queries of 2^22 numbers need two passes where one holds 2^28; rank grows with queries.
    assert exact.seconds == pytest.approx((2 + 2 * 10 * 20 / 8) + (1 + 12.8 * 2 / 8))
    assert exact.reads == pytest.approx(2 * blocks.writes)


def test_rows_grow_to_their_budget_and_what_lies_beside_them_does_not(tmp_path):
    pilot = Run(str(tmp_path / "rows"), changes={"operators.budget_gb": 1e-4, "operators.rows": "blocks"})
    rows = int(1000 * rows_for(pilot.config, 1000)[2])
    cost = {"amount": 1, "unit": "", "wall": 1.0, "busy": 1.0, "workers": 1, "peak_mb": 1}
    for stage, name, facts, size in (
        ("blocks", "", {"blocks": 1000, "fingerprint": "f"}, 10),
        ("operators", "", {}, rows + 5000),
        ("responses", "asked", {"queries": 10}, 10),
    ):
        opened = pilot.stage(stage, name)
        opened.store.write_json("manifest.json", facts)
        opened.store.write_json("cost.json", {"wall": 1.0, "driver_mb": 1, "phases": {"fit": cost}})
        opened.store.write("data", bytes(size))
    found = {each.stage: each for each in plan(pilot, "asked", blocks=2000, queries=10, workers=1)}
    beside = pilot.stage("operators").store.size() - rows
    assert found["operators"].writes == pytest.approx(2000 * rows_for(pilot.config, 2000)[2] + beside, rel=1e-4)


def test_workers_beyond_the_units_are_no_help(pilot):
    """1,024 blocks are in a unit of a pass, and 8 queries of 16 MiB in one of the directions and of the tables."""
    _, curvature, directions, exact = plan(pilot, "asked", blocks=20_480, queries=16, workers=1000)
    score, rank = 20.48 * 20, 1.6 * 2
    assert exact.seconds == pytest.approx((2 + score / 20) + (1 + rank / 2))
    assert curvature.seconds == pytest.approx((5 + 2 * 20.48 / 1000) + (4 + 12 / 16))
    assert directions.seconds == pytest.approx(1 + 1.6 * 4 / 2)


def test_the_papers_forms_respond_to_as_many_queries_at_once_however_large_their_gradients(tmp_path):
    pilot = Run(str(tmp_path / "paper"), changes={"operators.form": "matrix"})
    each = {"amount": 1, "unit": "", "wall": 1.0, "busy": 1.0, "workers": 1, "peak_mb": 1}
    for stage, name, facts, phases in (
        ("blocks", "", {"blocks": 1000, "fingerprint": "f"}, {"shard": each}),
        ("curvature", "", {"gradient_bytes": 2**27}, {"precondition": each}),
        ("responses", "asked", {"queries": 16}, {"respond": each}),
    ):
        opened = pilot.stage(stage, name)
        opened.store.write_json("manifest.json", facts)
        opened.store.write_json("cost.json", {"wall": 1.0, "driver_mb": 1, "phases": phases})
    found = {each.stage: each for each in plan(pilot, "asked", blocks=1000, queries=16, workers=8)}
    assert found["responses"].seconds == pytest.approx(1.0)


def test_the_verb_prints_a_table(pilot, capsys):
    command = ["plan", pilot.url, "--name", "asked", "--blocks", "1e6", "--queries", "128", "--workers", "8"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1,000,000 blocks, 128 queries, 8 workers"
    assert [line.split()[0] for line in lines[2:-1]] == ["blocks", "curvature", "directions", "exact", "all"]
    assert "41.8 min" in next(line for line in lines if line.startswith("blocks"))
    assert lines[-1].startswith(
        "operators take 2.15 kB a block; 1,600 candidates a query are fewer than the 2,748 that"
    )
    assert main([*command[:4], "--blocks", "1e5", *command[6:]]) == 0
    many = capsys.readouterr().out.splitlines()[-1]
    assert many == "operators take 21.5 kB a block; 35 candidates a query hold some 95 % of the exact best ten"
    assert main([*command[:4], "--blocks", "1e9", *command[6:]]) == 0
    few = capsys.readouterr().out.splitlines()[-1]
    assert few.startswith(
        "operators take 0.0246 B a block, as rows of 1,000 subsets; 1,600 candidates a query are fewer"
    )


def test_a_worker_that_holds_more_than_it_is_counted_with_is_told(pilot, capsys):
    command = ["plan", pilot.url, "--name", "asked", "--blocks", "1e6", "--queries", "128", "--workers", "8"]
    told = "a worker of curvature held 0.9 GiB in the pilot, and compute.worker_gb, by which workers are counted"
    assert main(command) == 0
    assert told not in capsys.readouterr().out
    Run(pilot.url, changes={"attribute.top": 100, "compute.worker_gb": 0.5}).save()
    assert main(command) == 0
    assert told in capsys.readouterr().out


def test_a_query_set_that_the_pilot_does_not_have_is_told(pilot, capsys):
    assert main(["plan", pilot.url, "--blocks", "1e6", "--queries", "128", "--workers", "8"]) == 1
    assert "no finished query set 'queries' to go by; --name one of: asked." in capsys.readouterr().err


def test_a_pilot_without_costs_is_told(tmp_path):
    with pytest.raises(StrideError, match="run shard and attribute"):
        plan(Run(str(tmp_path)), "asked", 10, 1, 1)


@pytest.mark.parametrize("count", ["0", "-3", "1.5", "1M", "inf", "nan"])
def test_sizes_are_whole_numbers(pilot, count, capsys):
    with pytest.raises(SystemExit):
        main(["plan", pilot.url, "--blocks", count, "--queries", "1", "--workers", "1"])
    assert f"--blocks: {count!r} is not a whole number of at least 1" in capsys.readouterr().err


def test_a_real_run_keeps_what_every_stage_cost(finished):
    for stage, phases in {
        "blocks": {"shard", "number"},
        "operators": {"count", "precondition", "fit", "sums", "reduce", "judge"},
    }.items():
        found = finished.run.stage(stage).store.read_json("cost.json")
        assert set(found["phases"]) - {"start"} == phases
        for label, each in found["phases"].items():
            assert (each["busy"] > 0) == (label != "start")
            assert each["workers"] in (1, 2)
            assert 100 < each["peak_mb"] < 20_000
    assert set(finished.run.stage("influence", "asked").store.read_json("cost.json")["phases"]) == {"rank"}
    phases = finished.run.stage("estimates", "asked").store.read_json("cost.json")["phases"]
    assert set(phases) == {"start", "columns", "recover"}
    assert min(phases["start"]["wall"], phases["recover"]["busy"]) > 0
    expected = {each.stage: each for each in plan(finished.run, "asked", finished.manifest["blocks"], 5, 2)}
    assert set(expected) == {"blocks", "operators", "responses", "estimates", "influence"}
    wall = finished.run.stage("blocks").store.read_json("cost.json")["wall"]
    assert expected["blocks"].seconds == pytest.approx(wall, rel=0.5)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "1e999", ""])
def test_what_is_no_count_is_told(text):
    assert (count("1e6"), counts("1e4,20")) == (1_000_000, [10_000, 20])
    with pytest.raises(ArgumentTypeError, match="is not a whole number of at least 1"):
        counts(f"4,{text}")
