"""Bodies and queries generated from the app's own OpenAPI: no 5xx, and answers as described."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.key_cache import KeyCache
from perennial.feedback.keys import KeyStore, Scope
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import utc_now
from perennial.infra.db import Database, create_all

OPERATIONS = [
    ("POST", "/v1/interactions"),
    ("POST", "/v1/interactions/batch"),
    ("POST", "/v1/feedback"),
    ("POST", "/v1/feedback/batch"),
    ("GET", "/v1/interactions/{id}"),
    ("GET", "/v1/feedback/{id}"),
    ("GET", "/v1/interactions"),
    ("GET", "/v1/feedback"),
    ("POST", "/v1/traces"),
    ("DELETE", "/v1/subjects/{subject}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
]
# A score outside its own scale, a text with an action other than edit, and a time before 1970 are
# refused by rules that JSON Schema cannot say.
SKIPPED_CHECKS = [positive_data_acceptance]
# An empty list in a query is nothing in the URL, which is right again.
SKIPPED_WITHOUT_BODY = [*SKIPPED_CHECKS, negative_data_rejection]


class Guarded:
    """The app with API keys, its OpenAPI, and a key that opens it."""

    def __init__(self, database: Database) -> None:
        keys = KeyStore(database, utc_now)
        store = SqlFeedbackStore(database, utc_now)
        app = create_app(
            ApiDeps(
                store=store,
                committer=GroupCommitter(store.write),
                authenticate=KeyCache(keys.find, utc_now).authenticate,
            )
        )
        key = keys.issue("acme", frozenset({Scope.INGEST, Scope.READ}))
        self.headers = {"Authorization": f"Bearer {key.text}"}
        self.schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        rejection = self.schema.config.checks.negative_data_rejection
        rejection.expected_statuses = [*rejection.expected_statuses, "413"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder: Path = tmp_path_factory.mktemp("openapi")
    database = Database(f"sqlite:///{folder}/p.db")
    create_all(database)
    yield Guarded(database)
    database.dispose()


def test_every_operation_is_tried(guarded: Guarded) -> None:
    described = [found.ok() for found in guarded.schema.get_all_operations()]

    assert sorted((o.method.upper(), o.path) for o in described) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_generated_requests_are_answered_as_described(
    guarded: Guarded, method: str, path: str, mode: GenerationMode, pytestconfig: pytest.Config
) -> None:
    operation = guarded.schema[path][method]
    has_input = bool(operation.body or operation.path_parameters or operation.query)
    if mode is GenerationMode.NEGATIVE and not has_input:
        return
    skipped = SKIPPED_CHECKS if operation.body else SKIPPED_WITHOUT_BODY

    @given(st.data())
    @settings(
        max_examples=pytestconfig.getoption("cases"),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def answer_as_described(data: st.DataObject) -> None:
        case: Case = data.draw(operation.as_strategy(generation_mode=mode))
        case.call_and_validate(headers=guarded.headers, excluded_checks=skipped)

    answer_as_described()
