from datetime import UTC, datetime
from pathlib import Path

from perennial.registry.card import Card, render_card, render_comparisons, render_description
from perennial.registry.gate import GateRules, SuiteKind, judge
from perennial.registry.versions import ModelVersion, VersionState
from tests.registry.builders import evidence, suite

VERDICT = judge(
    evidence(
        suite([0.0] * 40, [1.0] * 30 + [0.0] * 10, name="new answers"),
        suite([1.0] * 40, [1.0] * 20 + [0.0] * 20, name="kept", kind=SuiteKind.RETENTION),
        suite([2.0] * 20, [2.05] * 20, name="general", kind=SuiteKind.NLL),
    ),
    GateRules(num_resamples=499),
)
CARD = Card(
    version=ModelVersion(
        name="support-v2-0a1b2c3d", task="support", number=2, adapter_digest="0a1b2c3d" * 8,
        adapter_path=Path("adapter"), base_digest="b" * 64, round_id="rnd_2",
        parent="support-v1-00000000", dataset_digest="d" * 64, state=VersionState.REGISTERED,
        created_at=datetime(2026, 5, 1, 12, tzinfo=UTC),
    ),
    champion="support-v1-00000000",
    reason="drift",
    verdict=VERDICT,
    recipe={"rank": 16},
    examples={"correction": 90},
    samples=(("How long | is\nit?", "One year", "[Two](http://evil) <img src=x>"),),
)  # fmt: skip


def test_the_description_says_what_a_reviewer_needs() -> None:
    text = render_description(CARD)
    assert "**The gate rejected it.** Compared with `support-v1-00000000`" in text
    assert (
        "| new answers (gain wanted) | 40 / 40 | 0.0% [0.0%, 8.8%] | 75.0% [59.8%, 85.8%]" in text
    )
    assert "- **not met**: kept: change -50.0%" in text
    assert "| general (must not rise, nats/token) | 20 / 20 | 2.000 | 2.050 |" in text
    assert "Set the tag `approval` of this version to `approved`" in text
    assert "`perennial approve support-v2-0a1b2c3d`" in text


def test_text_of_users_can_neither_break_the_table_nor_become_markup() -> None:
    text = render_card(CARD)
    assert "| How long &#124; is it? | One year |" in text
    assert "[Two]" not in text
    assert "<img" not in text


def test_the_card_names_lineage_recipe_and_rows() -> None:
    text = render_card(CARD)
    for expected in ("| Trained from | support-v1-00000000 |", "| rank | 16 |", "0a1b2c3d" * 8,
                     "| correction | 90 |", "2026-05-01 12:00 UTC"):  # fmt: skip
        assert expected in text


def test_without_comparisons_it_says_so() -> None:
    assert render_comparisons(()) == "No suite could be compared."
