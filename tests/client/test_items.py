from datetime import UTC, datetime

import pytest
from perennial_client import feedback, inline, interaction, score, thumb, trace
from perennial_client.items import encode

ASKED = {"task": "support", "messages": [{"role": "user", "content": "?"}], "completion": "!"}


def test_interaction_has_an_id_and_a_key_of_its_own() -> None:
    first, second = (interaction(**ASKED, model_version="m") for _ in range(2))

    assert first.body["id"] != second.body["id"]
    assert first.key != second.key


def test_given_id_and_key_are_kept_and_the_key_stays_out_of_the_body() -> None:
    item = interaction(**ASKED, model_version="m", id="int_1", idempotency_key="k")

    assert (item.body["id"], item.key) == ("int_1", "k")
    assert "idempotency_key" not in item.body


def test_what_is_none_is_not_sent() -> None:
    item = feedback("int_1", thumb(up=True), subject=None, tags={})

    assert item.body == {
        "source": {"kind": "end_user"},
        "target": {"interaction_id": "int_1"},
        "signal": {"kind": "binary", "value": True},
        "tags": {},
    }


def test_targets_are_distinct() -> None:
    assert trace("t") == {"trace_id": "t"}
    assert inline(task="support", messages=[]) == {"task": "support", "messages": []}


def test_time_is_sent_with_its_zone() -> None:
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)

    item = feedback("int_1", thumb(up=True), occurred_at=noon)

    assert item.body["occurred_at"] == "2026-05-01T12:00:00+00:00"


def test_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        feedback("int_1", thumb(up=True), occurred_at=datetime(2026, 5, 1))  # noqa: DTZ001


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode(score(bad, min=0, max=1))


def test_text_that_utf8_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        encode({"text": "\ud800"})
