"""Ray: the same labels from the actors of a cluster, also when a node is lost in the middle."""

import warnings

import pytest

from quantdm.errors import QuantDMError
from quantdm.files import read_json
from quantdm.metrics.samples import Draw
from quantdm.pipelines.subject import look_at
from quantdm.runs.engines.choice import open_engine
from quantdm.runs.evaluator import Job
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from tests.test_claims import Bar

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of Ray's own start


@pytest.fixture
def cluster():
    """A cluster of three nodes with one core each, on this machine; this process is connected to the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made, nodes
    import ray

    ray.shutdown()
    made.shutdown()


def test_a_node_that_is_lost_in_the_middle_changes_no_label(finished, dit, tmp_path, cluster):
    made, nodes = cluster
    run = Run.open(finished[0])
    known = {path.stem: read_json(path) for path in sorted(run.path("trials").glob("*.json"))[:9]}
    draw = Draw(run.settings.seed * 1000, run.settings.label_images, run.settings.label_steps)
    jobs = {key: Job(draw, trial["config"], embeddings=run.settings.embeddings) for key, trial in known.items()}
    assert {job.key for job in jobs.values()} == set(jobs)

    class Killer(Bar):
        def update(self, n=1):
            super().update(n)
            if self.n == 2:
                made.remove_node(nodes[0], allow_graceful=False)

    opened = open_engine(run, look_at(dit), "ray", workers=None, batch_size="auto", ray_address=made.address)
    with opened as engine:
        assert (engine.workers, engine.accelerators) == (3, 0)
        found = measure_jobs(engine, TrialStore(tmp_path / "trials"), jobs, progress=Killer())
    assert {key: record["fid_fp"] for key, record in found.items()} == {k: t["fid_fp"] for k, t in known.items()}


def test_a_cluster_that_cannot_be_reached_and_an_unknown_engine_are_one_clear_error(finished, dit):
    run, subject = Run.open(finished[0]), look_at(dit)
    settings = {"workers": None, "batch_size": "auto"}
    with pytest.raises(QuantDMError, match=r"ray: no cluster at 127\.0\.0\.1:1: "):
        open_engine(run, subject, "ray", ray_address="127.0.0.1:1", **settings)
    with pytest.raises(QuantDMError, match="engine: got 'slurm'"):
        open_engine(run, subject, "slurm", **settings)
    with pytest.raises(QuantDMError, match="ray address: got"):
        open_engine(run, subject, "local", ray_address="auto", **settings)
