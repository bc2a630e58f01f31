"""MLflow as the place where people look: runs, curves, evidence, versions, aliases.

The only module that imports MLflow. Nothing here decides: the database holds rounds, versions and
champions, and everything below can be done again with the same result. An adapter goes up as
safetensors and JSON, is read back and compared; nothing is unpickled, no model is loaded.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import requests
from mlflow.entities import Metric, Param, Run
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from perennial.infra.artifacts import MANIFEST, Manifest, verify
from perennial.infra.errors import IntegrityError, NotFoundError, UnavailableError
from perennial.registry.versions import BASE, ModelVersion

log = logging.getLogger(__name__)

APPROVAL_TAG = "approval"
CHAMPION_ALIAS = "champion"
PREVIOUS_ALIAS = "previous"
_ADAPTER = "adapter"
_ALLOWED = (".safetensors", ".json")
_HEALTH_TIMEOUT_S = 5.0
_UNREACHABLE = frozenset({"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRef:
    """A run in MLflow and where a person sees it."""

    run_id: str
    started_ms: int
    url: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionRef:
    """A registered version in MLflow; its number is MLflow's own."""

    number: str
    url: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AliasChange:
    """An alias that did not show what the database says, and was set right."""

    alias: str
    was: str | None
    now: str | None


class MlflowStore:
    """Writes to one MLflow server. Every method raises UnavailableError when it does not answer."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def ensure_run(self, task: str, round_id: str, tags: Mapping[str, str]) -> RunRef:
        """The run of a round, made now or found again."""
        with self._reachable():
            experiment_id = self._ensure_experiment(task)
            found = self._client.search_runs([experiment_id], f"tags.round_id = '{round_id}'")
            run = found[0] if found else self._new_run(experiment_id, task, round_id)
            for key, value in tags.items():
                self._client.set_tag(run.info.run_id, key, value)
            return self._run_ref(run)

    def log_params(self, run: RunRef, params: Mapping[str, str | int | float]) -> None:
        """Add parameters; one that is there keeps its first value, as MLflow demands."""
        with self._reachable():
            known = self._client.get_run(run.run_id).data.params
            new = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in known]
            for start in range(0, len(new), 100):
                self._client.log_batch(run.run_id, params=new[start : start + 100])

    def log_curve(self, run: RunRef, name: str, points: Sequence[tuple[int, float]]) -> None:
        """Add (step, value) points of a metric.

        All carry the time the run began, so that the same point again is the same row.
        """
        metrics = [Metric(name, float(value), run.started_ms, step) for step, value in points]
        with self._reachable():
            for start in range(0, len(metrics), 500):
                self._client.log_batch(run.run_id, metrics=metrics[start : start + 500])

    def log_bytes(self, run: RunRef, path: str, content: bytes) -> None:
        """Put a file into the run's artefacts at `folder/name`, replacing it if it is there."""
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch, self._reachable():
            file = Path(scratch) / name
            file.write_bytes(content)
            self._client.log_artifact(run.run_id, str(file), folder or None)

    def log_file(self, run: RunRef, file: Path, folder: str | None = None) -> None:
        """Put a file into the run's artefacts, replacing it if it is there."""
        with self._reachable():
            self._client.log_artifact(run.run_id, str(file), folder)

    def finish_run(self, run: RunRef, *, is_success: bool) -> None:
        """Mark the run as ended."""
        with self._reachable():
            self._client.set_terminated(run.run_id, "FINISHED" if is_success else "FAILED")

    def register(
        self, run: RunRef, version: ModelVersion, description: str, tags: Mapping[str, str]
    ) -> VersionRef:
        """The version in MLflow with its adapter uploaded and compared; safe to run again.

        The tag `state` becomes `ready` last, so whoever sees it may trust the rest.

        Raises:
            IntegrityError: the folder holds anything but safetensors and JSON, differs from its
                manifest or from the registered digest, or came back different from MLflow.
        """
        manifest = check_adapter(version.adapter_path, version.adapter_digest)
        with self._reachable():
            self._ensure_model(version.task)
            found = self._find(version.task, version.name)
            if found is None or found.tags.get("state") != "ready":
                self._upload(run, version.adapter_path, manifest)
                self._compare(run.run_id, manifest, version.name)
            if found is None:
                found = self._create(run, version, description)
            number = str(found.version)
            self._client.update_model_version(version.task, number, description)
            for key, value in {**_tags_of(version), **tags, "state": "ready"}.items():
                self._client.set_model_version_tag(version.task, number, key, value[:5000])
            return self._version_ref(version.task, number)

    def verify_version(self, version: ModelVersion) -> None:
        """Nothing, when the adapter in MLflow is the registered one, file by file.

        Raises:
            NotFoundError: MLflow does not know the version.
            IntegrityError: a file is missing, added or different.
        """
        manifest = check_adapter(version.adapter_path, version.adapter_digest)
        with self._reachable():
            found = self._require(version.task, version.name)
            self._compare(str(found.run_id), manifest, version.name)

    def approval(self, version: ModelVersion) -> str | None:
        """What a person set the tag `approval` to, in lower case, or None."""
        with self._reachable():
            value = self._require(version.task, version.name).tags.get(APPROVAL_TAG)
            return None if value is None else value.strip().lower()

    def approver(self, version: ModelVersion) -> str:
        """Who a person said to be in the tag `approved_by`; MLflow itself does not tell."""
        with self._reachable():
            tags = self._require(version.task, version.name).tags
            return str(tags.get("approved_by") or "a reviewer in MLflow")

    def set_tags(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version, for example why an approval was not followed."""
        with self._reachable():
            number = str(self._require(version.task, version.name).version)
            for key, value in tags.items():
                self._client.set_model_version_tag(version.task, number, key, value[:5000])

    def set_aliases(
        self, task: str, champion: str | None, previous: str | None
    ) -> tuple[AliasChange, ...]:
        """What had to be changed so that both aliases show these versions; None has no alias.

        Nor has a version that MLflow does not know, as when its own state was lost or deleted.
        """
        with self._reachable():
            if not self._has_model(task):
                return ()
            aliases = self._client.get_registered_model(task).aliases
            changes = (
                self._set_alias(task, CHAMPION_ALIAS, champion, aliases),
                self._set_alias(task, PREVIOUS_ALIAS, previous, aliases),
            )
            return tuple(change for change in changes if change is not None)

    def version_url(self, version: ModelVersion) -> str:
        """Where a person sees the version."""
        with self._reachable():
            number = str(self._require(version.task, version.name).version)
            return self._version_ref(version.task, number).url

    def _ensure_experiment(self, task: str) -> str:
        found = self._client.get_experiment_by_name(task)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(task))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self._client.get_experiment_by_name(task).experiment_id)

    def _new_run(self, experiment_id: str, task: str, round_id: str) -> Run:
        tags = {"round_id": round_id, "task": task}
        return self._client.create_run(experiment_id, tags=tags, run_name=round_id)

    def _has_model(self, task: str) -> bool:
        return bool(self._client.search_registered_models(f"name = '{task}'", max_results=1))

    def _ensure_model(self, task: str) -> None:
        try:
            if not self._has_model(task):
                self._client.create_registered_model(
                    task, description=f"Adapters of the task `{task}`, one version per round."
                )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _find(self, task: str, name: str) -> MlflowVersion | None:
        query = f"name = '{task}' and tags.version = '{name}'"
        found = self._client.search_model_versions(query, max_results=1)
        return found[0] if found else None

    def _require(self, task: str, name: str) -> MlflowVersion:
        found = self._find(task, name)
        if found is None:
            raise NotFoundError(f"MLflow does not know {name}", version=name)
        return found

    def _create(self, run: RunRef, version: ModelVersion, description: str) -> MlflowVersion:
        root = self._client.get_run(run.run_id).info.artifact_uri
        return self._client.create_model_version(
            version.task,
            source=f"{root}/{_ADAPTER}",
            run_id=run.run_id,
            tags={"version": version.name, "state": "uploading"},
            description=description,
        )

    def _upload(self, run: RunRef, folder: Path, manifest: Manifest) -> None:
        for name in (*sorted(manifest.files), MANIFEST):
            parent = Path(_ADAPTER, name).parent
            self._client.log_artifact(run.run_id, str(folder / name), parent.as_posix())

    def _compare(self, run_id: str, manifest: Manifest, name: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(self._client.download_artifacts(run_id, _ADAPTER, scratch))
            found = verify(folder)
        if found.digest != manifest.digest:
            raise IntegrityError(
                f"the adapter of {name} in MLflow has digest {found.digest[:12]}…, "
                f"registered was {manifest.digest[:12]}…",
                version=name,
            )

    def _set_alias(
        self, task: str, alias: str, name: str | None, aliases: Mapping[str, str]
    ) -> AliasChange | None:
        was = aliases.get(alias)
        found = None if name is None else self._find(task, name)
        if name is not None and found is None:
            log.warning("version unknown to MLflow task=%s alias=%s version=%s", task, alias, name)
        now = None if found is None else str(found.version)
        if was == now:
            return None
        if now is None:
            self._client.delete_registered_model_alias(task, alias)
        else:
            self._client.set_registered_model_alias(task, alias, now)
        return AliasChange(alias=alias, was=was, now=now)

    def _run_ref(self, run: Run) -> RunRef:
        info = run.info
        url = f"{self._uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
        return RunRef(run_id=info.run_id, started_ms=int(info.start_time), url=url)

    def _version_ref(self, task: str, number: str) -> VersionRef:
        url = f"{self._uri}/#/models/{quote(task)}/versions/{number}"
        return VersionRef(number=number, url=url)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Turn whatever a server that is not there causes into UnavailableError."""
        try:
            # Asked first, since MLflow's client retries for long against a closed port.
            urlopen(f"{self._uri}/health", timeout=_HEALTH_TIMEOUT_S).close()
            yield
        except (URLError, TimeoutError, requests.exceptions.RequestException) as error:
            raise self._unavailable(error) from error
        except MlflowException as error:
            is_transport = isinstance(error.__cause__, requests.exceptions.RequestException)
            lost = isinstance(error.__context__, requests.exceptions.RequestException)
            if is_transport or lost or error.error_code in _UNREACHABLE:
                raise self._unavailable(error) from error
            raise

    def _unavailable(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"MLflow at {self._uri} does not answer: {error}", uri=self._uri)


def check_adapter(folder: Path, digest: str) -> Manifest:
    """The manifest of an adapter folder that may be uploaded.

    Raises:
        IntegrityError: it holds anything but safetensors and JSON, or has another digest.
    """
    odd = [p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in _ALLOWED]
    if odd:
        raise IntegrityError(f"{folder} may hold safetensors and JSON only, found {sorted(odd)}")
    manifest = verify(folder)
    if manifest.digest != digest:
        raise IntegrityError(
            f"{folder} has digest {manifest.digest[:12]}…, registered was {digest[:12]}…"
        )
    return manifest


def _tags_of(version: ModelVersion) -> dict[str, str]:
    return {
        "version": version.name,
        "round_id": version.round_id,
        "adapter_sha256": version.adapter_digest,
        "base_sha256": version.base_digest,
        "dataset_sha256": version.dataset_digest,
        "parent": version.parent or BASE,
    }
