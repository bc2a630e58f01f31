import http.client
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial.infra.errors import IntegrityError, NotFoundError, UnavailableError
from perennial.registry.mlflow_store import MlflowStore
from perennial.registry.reconcile import reconcile
from perennial.registry.server import client_environment
from perennial.registry.versions import ModelVersion
from tests.registry.builders import MlflowServer, World

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # raised by MLflow's own imports
    from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _client_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in client_environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(mlflow_server: MlflowServer) -> MlflowStore:
    return MlflowStore(mlflow_server.uri)


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """The hand of a person in the UI."""
    return MlflowClient(mlflow_server.uri)


@pytest.fixture
def task(request: pytest.FixtureRequest) -> str:
    """A task of its own for each test, so that one server serves all."""
    return request.node.name.replace("_", "-")[5:40]


@pytest.fixture
def version(sqlite_world: World, task: str) -> Iterator[ModelVersion]:
    return sqlite_world.version(1, task=task)


def registered(store: MlflowStore, version: ModelVersion, **tags: str) -> str:
    run = store.ensure_run(version.task, version.round_id, {})
    return store.register(run, version, "# decide", tags).number


def test_a_round_is_one_run_with_its_evidence(
    store: MlflowStore, client: MlflowClient, task: str, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>drift</p>")
    for _ in range(2):
        run = store.ensure_run(task, "rnd_1", {"reason": "drift"})
        store.log_params(run, {"rank": 16, "lr": 0.001})
        store.log_curve(run, "loss", [(step, 3.0 / (step + 1)) for step in range(5)])
        store.log_bytes(run, "plots/loss.png", b"png")
        store.log_file(run, report, "drift")
        store.finish_run(run, is_success=True)
    experiment = client.get_experiment_by_name(task)
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.data.params == {"rank": "16", "lr": "0.001"}
    assert only.data.tags["reason"] == "drift"
    assert [m.value for m in client.get_metric_history(run.run_id, "loss")] == [
        3.0, 1.5, 1.0, 0.75, 0.6,
    ]  # fmt: skip
    assert [a.path for a in client.list_artifacts(run.run_id, "plots")] == ["plots/loss.png"]
    assert only.info.status == "FINISHED"
    assert run.run_id in run.url


def test_registering_twice_is_one_ready_version(
    store: MlflowStore, client: MlflowClient, version: ModelVersion
) -> None:
    assert registered(store, version, gate="promote") == "1"
    assert registered(store, version, gate="promote") == "1"
    (found,) = client.search_model_versions(f"name = '{version.task}'")
    assert found.description == "# decide"
    assert found.tags["state"] == "ready"
    assert found.tags["gate"] == "promote"
    assert found.tags["adapter_sha256"] == version.adapter_digest
    assert found.tags["parent"] == "base"
    files = {a.path for a in client.list_artifacts(found.run_id, "adapter")}
    assert files == {
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/manifest.json",
    }  # fmt: skip
    store.verify_version(version)


def test_anything_but_safetensors_and_json_is_refused(
    store: MlflowStore, version: ModelVersion
) -> None:
    (version.adapter_path / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(IntegrityError, match=r"optimizer\.pt"):
        registered(store, version)


def test_an_adapter_that_changed_is_refused_before_upload(
    store: MlflowStore, version: ModelVersion
) -> None:
    (version.adapter_path / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(IntegrityError):
        registered(store, version)


def test_an_adapter_tampered_with_on_the_server_is_seen(
    store: MlflowStore, mlflow_server: MlflowServer, version: ModelVersion
) -> None:
    registered(store, version)
    run = store.ensure_run(version.task, version.round_id, {})
    (file,) = (mlflow_server.folder / "artifacts").glob(
        f"*/{run.run_id}/artifacts/adapter/adapter_config.json"
    )
    file.write_text('{"r": 8}')
    with pytest.raises(IntegrityError):
        store.verify_version(version)


def test_an_upload_that_was_cut_off_is_finished(
    store: MlflowStore, client: MlflowClient, version: ModelVersion
) -> None:
    registered(store, version)
    client.set_model_version_tag(version.task, "1", "state", "uploading")
    assert registered(store, version) == "1"
    assert client.get_model_version(version.task, "1").tags["state"] == "ready"


def test_the_approval_tag_is_seen_and_answered(
    store: MlflowStore, client: MlflowClient, version: ModelVersion
) -> None:
    registered(store, version)
    assert store.approval(version) is None
    client.set_model_version_tag(version.task, "1", "approval", " Approved ")
    assert store.approval(version) == "approved"
    store.set_tags(version, {"gate_note": "promoted"})
    assert client.get_model_version(version.task, "1").tags["gate_note"] == "promoted"


def test_a_version_that_mlflow_does_not_know_is_not_found(
    store: MlflowStore, version: ModelVersion
) -> None:
    with pytest.raises(NotFoundError, match="MLflow does not know"):
        store.approval(version)


def test_aliases_follow_and_a_moved_one_is_put_back(
    store: MlflowStore, client: MlflowClient, sqlite_world: World, task: str
) -> None:
    world = sqlite_world
    one, two = world.version(1, task=task), world.version(2, task=task)
    registered(store, one)
    registered(store, two)
    assert reconcile(task, world.champions, world.outbox, store) == ()
    world.promote(one.name, task=task)
    world.promote(two.name, one.name, task=task)
    reconcile(task, world.champions, world.outbox, store)
    assert client.get_registered_model(task).aliases == {"champion": "2", "previous": "1"}
    assert world.outbox.newest_pending(task) is None
    client.set_registered_model_alias(task, "champion", "1")
    (change,) = reconcile(task, world.champions, world.outbox, store)
    assert (change.alias, change.was, change.now) == ("champion", "1", "2")
    assert reconcile(task, world.champions, world.outbox, store) == ()
    for number in (1, 2):
        world.champions.rollback(task, decision_id=f"back{number}", decided_by="t", reason="test")
    reconcile(task, world.champions, world.outbox, store)
    assert client.get_registered_model(task).aliases == {}


def test_a_version_that_mlflow_lost_has_no_alias(
    store: MlflowStore, client: MlflowClient, sqlite_world: World, task: str
) -> None:
    world = sqlite_world
    one, two = world.version(1, task=task), world.version(2, task=task)
    world.promote(one.name, task=task)
    assert reconcile(task, world.champions, world.outbox, store) == ()
    registered(store, two)
    world.promote(two.name, one.name, task=task)
    reconcile(task, world.champions, world.outbox, store)
    assert client.get_registered_model(task).aliases == {"champion": "1"}
    assert world.outbox.newest_pending(task) is None


def test_a_killed_server_is_unavailable_and_works_after_restart(
    store: MlflowStore, mlflow_server: MlflowServer, sqlite_world: World, version: ModelVersion
) -> None:
    world = sqlite_world
    registered(store, version)
    world.promote(version.name, task=version.task)
    mlflow_server.kill()
    try:
        with pytest.raises(UnavailableError, match="does not answer"):
            store.ensure_run(version.task, "rnd_2", {})
        with pytest.raises(UnavailableError):
            reconcile(version.task, world.champions, world.outbox, store)
        assert world.outbox.newest_pending(version.task) is not None
    finally:
        mlflow_server.start()
    (change,) = reconcile(version.task, world.champions, world.outbox, store)
    assert (change.alias, change.now) == ("champion", "1")
    assert registered(store, version) == "1"


def test_the_server_is_one_process_on_loopback_that_refuses_other_hosts(
    mlflow_server: MlflowServer,
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", mlflow_server.port, timeout=10)
    connection.request("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0",
                       headers={"Host": "evil.example"})  # fmt: skip
    assert connection.getresponse().status == 403
    connection.close()
    assert mlflow_server.start_up_s < 60
