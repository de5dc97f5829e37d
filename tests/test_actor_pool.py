"""A actors of actors: every unit once, in whatever order; units of slow and lost actors go to others."""

import os
import signal
import subprocess
import sys
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from stride_ray.runtime import actor_pool, tasks
from stride_ray.runtime.actor_pool import ActorPool
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.tasks import WorkerAllocation

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests


class Slow:
    """Sleeps over unit 0 where it is the first to have it."""

    def __init__(self, folder, seconds):
        self.folder, self.seconds = folder, seconds

    def __call__(self, unit):
        if unit == 0:
            first = self.folder / "taken"
            try:
                first.touch(exist_ok=False)
                time.sleep(self.seconds)
            except FileExistsError:
                pass
        return {"unit": unit}


def test_workers_that_run_no_model_import_no_torch():
    code = (
        "import sys, stride_ray.attribution.tables, stride_ray.corpus.numbering;"
        "import stride_ray.selection.pool, stride_ray.selection.writing;"
        "from stride_ray.runtime.tasks import use_threads; use_threads(1); print('torch' in sys.modules);"
        "import torch; print(torch.get_num_threads())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "1"]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(actor_pool, "PATIENCE", 1.0)
    monkeypatch.setattr(tasks, "PATIENCE", 0.5)


def test_units_of_a_slow_actor_are_given_to_one_that_has_nothing_to_do(one_ray, impatient, tmp_path):
    with ActorPool(WorkerAllocation(2, "cpu")) as members:
        # Both are up before it counts: a stall is thrice the longest unit, and the first waits for its process.
        while len({each["process"] for each in members.map(Named, (), range(4))}) < 2:
            pass
        started = time.monotonic()
        found = [each["unit"] for each in members.map(Slow, (tmp_path, 600.0), range(6))]
        assert sorted(found) == list(range(6))
        # The slow one still has its call; the next map does without it.
        assert sorted(each["unit"] for each in members.map(Slow, (tmp_path, 0.0), range(1, 9))) == list(range(1, 9))
        assert time.monotonic() - started < 300


class Named:
    """Says which process it is in."""

    def __call__(self, unit):
        return {"process": os.getpid()}


class Sleepy:
    """Takes a moment."""

    def __call__(self, unit):
        time.sleep(0.2)
        return {"unit": unit["unit"]}


class Killer:
    """Ends its process over unit 1."""

    def __call__(self, unit):
        if unit["unit"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"unit": unit}


@pytest.mark.cluster
@pytest.mark.parametrize("how", ["actors", "dataset"])
def test_a_unit_that_always_kills_its_worker_is_told(how, one_ray):
    units = [{"unit": i} for i in range(4)]
    mapped = {"actors": actor_pool.map_actors, "dataset": tasks.map_dataset}[how](
        Killer, (), units, WorkerAllocation(2, "cpu")
    )
    with pytest.raises(StrideError, match="killed its worker more than 5 times"):
        list(mapped)


@pytest.mark.cluster
@pytest.mark.parametrize("how", ["actors", "dataset"])
def test_half_the_nodes_are_lost_and_the_rest_goes_on(how, impatient):
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{at}") for at in (2, 3)]
    units = [{"unit": i} for i in range(40)]
    try:
        ray.init(cluster.address, logging_level="ERROR")
        mapped = {"actors": actor_pool.map_actors, "dataset": tasks.map_dataset}[how](
            Sleepy, (), units, WorkerAllocation(2, "cpu")
        )
        found = []
        for each in mapped:
            found.append(each["unit"])
            if len(found) == 4:
                cluster.remove_node(nodes[0], allow_graceful=False)
            if len(found) == 8:  # Ray Data wants as many actors as it was told of
                cluster.add_node(num_cpus=1, node_ip_address="127.0.0.4")
        assert sorted(found) == list(range(40))
    finally:
        ray.shutdown()
        cluster.shutdown()
