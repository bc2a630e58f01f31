"""Prefect and MLflow over HTTP, as a script or a person at their pages would use them.

For the demo and for tests: flows themselves use the libraries.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import httpx

DEPLOYMENT = "scheduled"

_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The state of a flow run as Prefect sees it."""

    type: str
    name: str
    message: str

    @property
    def is_final(self) -> bool:
        """Whether the run is over."""
        return self.type in _FINAL

    @property
    def is_completed(self) -> bool:
        """Whether the run is over and went well."""
        return self.type == "COMPLETED"


class PrefectRuns:
    """Starts and watches runs of deployments."""

    def __init__(self, api_url: str) -> None:
        self._http = httpx.Client(base_url=api_url, timeout=30, trust_env=False)

    def start(self, flow: str, parameters: Mapping[str, str]) -> str:
        """The id of a new run of a flow's scheduled deployment."""
        deployment = self._get(f"/deployments/name/{flow}/{DEPLOYMENT}")
        reply = self._http.post(
            f"/deployments/{deployment['id']}/create_flow_run",
            json={"parameters": dict(parameters), "state": {"type": "SCHEDULED"}},
        )
        return str(reply.raise_for_status().json()["id"])

    def state(self, run: str) -> RunState:
        """Where a run stands; a server that does not answer just now counts as running."""
        try:
            state = self._get(f"/flow_runs/{run}")["state"]
        except httpx.TransportError:
            return RunState(type="RUNNING", name="Unreachable", message="")
        return RunState(type=state["type"], name=state["name"], message=state.get("message") or "")

    def last_task(self, run: str) -> str:
        """The name of the task that a run started last, or nothing yet."""
        query = {
            "flow_runs": {"id": {"any_": [run]}},
            "sort": "EXPECTED_START_TIME_DESC",
            "limit": 1,
        }
        try:
            found = self._http.post("/task_runs/filter", json=query).raise_for_status().json()
        except httpx.HTTPError:
            return ""
        return str(found[0]["name"]).rsplit("-", 1)[0] if found else ""

    def _get(self, path: str) -> dict[str, dict[str, str]]:
        reply: dict[str, dict[str, str]] = self._http.get(path).raise_for_status().json()
        return reply


class MlflowReviewer:
    """Does what a reviewer does on MLflow's page of a model version."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/api/2.0/mlflow", timeout=30, trust_env=False)

    def waiting(self, model: str) -> str | None:
        """The newest version whose tag `approval` says `pending`."""
        query = {"filter": f"name='{model}'", "order_by": "version_number DESC"}
        try:
            reply = self._http.get("/model-versions/search", params=query).raise_for_status()
        except httpx.HTTPError:
            return None
        for version in reply.json().get("model_versions", []):
            tags = {tag["key"]: tag["value"] for tag in version.get("tags", [])}
            if tags.get("approval") == "pending":
                return str(version["version"])
        return None

    def approve(self, model: str, version: str, *, by: str) -> None:
        """Set the tags `approved_by` and `approval` = `approved`."""
        for key, value in (("approved_by", by), ("approval", "approved")):
            body = {"name": model, "version": version, "key": key, "value": value}
            self._http.post("/model-versions/set-tag", json=body).raise_for_status()
