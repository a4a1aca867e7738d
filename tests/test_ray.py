"""Ray: the same labels from the actors of a cluster, also when a node is lost in the middle, and nothing is left."""

import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantdm.errors import QuantDMError
from quantdm.files import read_json
from quantdm.metrics.samples import Draw
from quantdm.pipelines.subject import look_at
from quantdm.runs.engines import local, means, mirror
from quantdm.runs.engines.choice import open_engine
from quantdm.runs.engines.outbox import Outbox
from quantdm.runs.engines.remote import RemoteWorker, facts_of
from quantdm.runs.evaluator import Job
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from tests.test_claims import Bar

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of Ray's own start
SETTINGS = {"workers": None, "batch_size": "auto"}


EAGER = ("RAY_worker_niceness", "0")  # Ray's workers would let every other test go first


@pytest.fixture
def temporary(monkeypatch):
    """The temporary folder of all nodes; short, since Ray keeps sockets beside it."""
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())
    monkeypatch.setenv(*EAGER)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)  # what is in the environment counts
        yield Path(folder)


@pytest.fixture
def cluster(temporary):
    """A cluster of three nodes with one core each, on this machine."""
    pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made, nodes
    import ray

    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def single():
    """This process is connected to a cluster of one node with one core, whose workers need not import this file."""
    ray = pytest.importorskip("ray")
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*EAGER)
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_node_that_is_lost_in_the_middle_changes_no_label_and_nothing_is_left(finished, dit, tmp_path, cluster):
    import ray

    made, nodes = cluster
    run = Run.open(finished[0])
    known = {path.stem: read_json(path) for path in sorted(run.path("trials").glob("*.json"))[:9]}
    draw = Draw(run.settings.seed * 1000, run.settings.label_images, run.settings.label_steps)
    jobs = {key: Job(draw, trial["config"], embeddings=run.settings.embeddings) for key, trial in known.items()}
    assert {job.key for job in jobs.values()} == set(jobs)
    kept = mirror.node_folder()

    class Killer(Bar):
        def update(self, n=1):
            super().update(n)
            if self.n == 2:
                made.remove_node(nodes[0], allow_graceful=False)
                self.files = list((kept / mirror.FILES).iterdir())

    with open_engine(run, look_at(dit), "ray", ray_address=made.address, **SETTINGS) as engine:
        assert (engine.workers, engine.accelerators) == (3, 0)
        bar = Killer()
        found = measure_jobs(engine, TrialStore(tmp_path / "trials"), jobs, progress=bar)
    assert {key: record["fid_fp"] for key, record in found.items()} == {k: t["fid_fp"] for k, t in known.items()}
    assert bar.files
    assert [*(kept / mirror.FILES).iterdir(), *(kept / mirror.WORKERS).iterdir()] == []
    assert not ray.is_initialized()  # who connected disconnects


def test_a_cluster_that_cannot_be_reached_is_one_clear_error(finished, dit):
    pytest.importorskip("ray")
    with pytest.raises(QuantDMError, match=r"ray: no cluster at 127\.0\.0\.1:1: "):
        open_engine(Run.open(finished[0]), look_at(dit), "ray", ray_address="127.0.0.1:1", **SETTINGS)


def test_an_unknown_engine_and_an_address_for_another_are_one_clear_error(finished, dit):
    run, subject = Run.open(finished[0]), look_at(dit)
    with pytest.raises(QuantDMError, match="engine: got 'slurm'"):
        open_engine(run, subject, "slurm", **SETTINGS)
    with pytest.raises(QuantDMError, match="ray address: got"):
        open_engine(run, subject, "local", ray_address="auto", **SETTINGS)


class Echo:
    """An actor that gets its place, loads and answers at once."""

    def __init__(self, device, batch_size, facts):
        pass

    def ready(self):
        import ray

        return ray.get_runtime_context().get_node_id(), "none"

    def load(self, parcel):
        return SimpleNamespace(record={"result": None}, files={})

    def answer(self, method, argument, parcel):
        return SimpleNamespace(record={"result": argument["base_seed"]}, files={})


class Late(Echo):
    """It takes longer to load than a job may."""

    def load(self, parcel):
        time.sleep(1.5)
        return super().load(parcel)


class Broken(Echo):
    """Its node lacks what it needs."""

    def __init__(self, device, batch_size, facts):
        raise ModuleNotFoundError("No module named 'quantdm'")


def opened(monkeypatch, finished, dit, worker=Echo):
    from quantdm.runs.engines import ray as engines

    monkeypatch.setattr(engines, "RemoteWorker", worker)
    return engines.RayEngine(Run.open(finished[0]), look_at(dit))


DRAWS = [Draw(base, 2, 1) for base in range(3)]


def bases(engine):
    return sorted(result for _, result in engine.map("prepare", DRAWS))


def test_the_wait_for_a_place_counts_from_when_one_is_asked_for(monkeypatch, finished, dit, single):
    with opened(monkeypatch, finished, dit) as engine:
        engine._began -= 10_000  # a bank was built meanwhile
        assert bases(engine) == [0, 1, 2]
        single.kill(engine._actors[0])
        engine._began -= 10_000
        assert bases(engine) == [0, 1, 2]
    assert single.is_initialized()  # it was before


def test_whatever_ray_loses_is_asked_for_again(monkeypatch, finished, dit, single):
    lost = [single.exceptions.ObjectLostError("00" * 28, "", ""), single.exceptions.NodeDiedError("gone")]
    get = single.get

    def shaky(reference):
        found = get(reference)
        if lost and getattr(found, "record", {}).get("result") is not None:
            raise lost.pop()
        return found

    monkeypatch.setattr(single, "get", shaky)
    with opened(monkeypatch, finished, dit) as engine:
        assert bases(engine) == [0, 1, 2]
    assert not lost


def test_workers_that_cannot_start_end_the_search_with_the_reason(monkeypatch, finished, dit, single):
    with (
        opened(monkeypatch, finished, dit, Broken) as engine,
        pytest.raises(QuantDMError, match=r"could not start 3 times.*No module named 'quantdm'"),
    ):
        bases(engine)


def test_a_worker_that_opens_its_pipeline_does_not_hang(monkeypatch, finished, dit, single):
    monkeypatch.setattr(local, "LEAST_PATIENCE", 0.7)
    with opened(monkeypatch, finished, dit, Late) as engine:
        engine._slowest = {"images": 1e-9}
        assert bases(engine) == [0, 1, 2]


def test_a_node_with_other_libraries_or_feature_weights_is_refused_by_name(finished, single, temporary):
    run = Run.open(finished[0])
    own, outbox = facts_of(run.settings.protocol), Outbox(run, single.put)
    outbox.look()
    assert {"numpy", "scipy", "features"} <= own.keys()
    assert RemoteWorker("cpu", "auto", own).load(outbox.parcel()[1]).record == {"result": None}
    other = RemoteWorker("cpu", "auto", {**own, "scipy": "1.0", "features": "others"})
    error = other.load(outbox.parcel()[1]).record["error"]
    assert re.match(r"ray, on .*: has scipy .*, not 1\.0; features .*, not others as the driver", error)


def test_an_address_of_another_cluster_than_that_of_this_process_is_refused(finished, dit, single):
    with pytest.raises(QuantDMError, match=r"got 10\.9\.9\.9:6379, but this process is connected to"):
        open_engine(Run.open(finished[0]), look_at(dit), "ray", ray_address="10.9.9.9:6379", **SETTINGS)


class Quick:
    """A worker that says how fast it is."""

    def __init__(self, device):
        assert device == "cpu"

    def ready(self):
        return True

    def speed(self, settings, batch_size):
        return {"result": [2.0, 1.0]}


def test_a_plan_asks_a_worker_of_the_cluster_how_fast_it_is(monkeypatch, finished, dit, single):
    run, subject = Run.open(finished[0]), look_at(dit)
    address = single.get_runtime_context().gcs_address
    found = means.Gauge("cpu").speed(run.settings.model_dump(mode="json"), "auto")["result"]
    assert all(0 < seconds < 10 for seconds in found)
    monkeypatch.setattr(means, "Gauge", Quick)
    have = means.look_at_means(subject, run.settings, "ray", ray_address=address, **SETTINGS)
    assert (have.workers, have.accelerators, have.there) == (1, 0, means.Speed(2.0, 1.0))
    assert have.here != have.there
