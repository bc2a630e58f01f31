import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perennial.feedback.records import (
    Binary,
    Comment,
    Correction,
    Feedback,
    Implicit,
    Interaction,
    Judged,
    Message,
    Signal,
    Target,
)
from perennial.flows.curate import curate, data_folder
from perennial.infra.settings import load_settings
from perennial.training.examples import (
    Example,
    read_examples,
    read_judgements,
    read_pairs,
    write_examples,
)
from perennial.training.replay import ReplayStore, load_replay

AT = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = ("kettle", "lamp", "mower", "oven", "pump", "radio", "scale", "toaster", "vase", "watch")


def judged(number: int, question: str, answer: str, signal: Signal) -> Judged:
    interaction = Interaction(
        id=f"int_{number}",
        tenant="default",
        task="support",
        messages=(Message(role="user", content=question),),
        completion=answer,
        model_version="base",
        route_role="base",
        received_at=AT,
    )
    feedback = Feedback(
        id=f"fb_{number:03}",
        tenant="default",
        target=Target(interaction_id=interaction.id),
        signal=signal,
        source_kind="end_user",
        received_at=AT + timedelta(minutes=number),
        subject=f"user-{number}",
    )
    return Judged(feedback=feedback, interaction=interaction)


def deps(home: Path, rows: Sequence[Judged], **environment: str) -> Any:
    """The parts of `Deps` that curation reads."""
    (home / "general.jsonl").write_text('{"prompt": "hello", "answer": "hello there"}\n')
    (home / "perennial.toml").touch()
    general = str(home / "general.jsonl")
    settings = load_settings(
        {
            "PERENNIAL_HOME": str(home),
            "PERENNIAL_MODEL__CACHE_DIR": str(home / "models"),
            "PERENNIAL_TRAINING__PROBE_FILE": general,
            **environment,
        },
        home / "perennial.toml",
    )
    rounds = {f"rnd_{n}": a_round(n) for n in (1, 2)}
    return SimpleNamespace(
        settings=settings,
        feedback=SimpleNamespace(
            horizon=lambda: AT, feedback_between=lambda task, since, until: tuple(rows)
        ),
        ledger=SimpleNamespace(get=rounds.get, list_rounds=lambda task: tuple(rounds.values())),
    )


def a_round(number: int) -> Any:
    return SimpleNamespace(id=f"rnd_{number}", task="support", number=number, opened_at=AT)


def first_round() -> list[Judged]:
    corrected = [
        judged(n, f"Where is the {name} made?", "?", Correction(text=f"In the {name} works."))
        for n, name in enumerate(NAMES)
    ]
    edited = [
        judged(
            20 + n,
            f"Who repairs a {name} for me{' here' * (n // 10)}?",
            f"Nobody repairs a {name}.",
            Implicit(action="edit", text=f"The shop where the {name} was bought."),
        )
        for n, name in enumerate(NAMES * 2)
    ]
    thumbs = [
        judged(60 + n, f"Tell me of the {name} {n}", f"It is a {name}.", Binary(value=n < 18))
        for n, name in enumerate(NAMES * 4)
    ]
    return [*corrected, *edited, *thumbs, judged(120, "hm", "?", Comment(text="Nice."))]


def test_a_round_writes_rows_of_every_kind_and_says_what_it_did(tmp_path: Path) -> None:
    some = deps(tmp_path, first_round())
    folder = data_folder(some, "rnd_1")

    curate(some, a_round(1), None, tmp_path / "general.jsonl", folder)

    train, judge = (
        read_examples(folder / "train.jsonl"),
        read_examples(folder / "next_judged.jsonl"),
    )
    pairs, judgements = (
        read_pairs(folder / "pairs.jsonl"),
        read_judgements(folder / "judgements.jsonl"),
    )
    assert {row.kind for row in (*train, *judge)} == {"correction", "edit"}
    assert len(judgements) == 40
    assert len(pairs) + sum(row.kind == "edit" for row in judge) == 20
    asked = {row.prompt_key for row in judge}
    assert asked
    assert not asked & {row.prompt_key for row in (*train, *pairs, *judgements)}
    counts = json.loads((folder / "counts.json").read_bytes())
    assert counts["dropped"]["unsupported_kind"] == 1
    assert counts["rows"]["judgements"] == 40
    text = (folder / "diff.md").read_text()
    assert "# Training rows of round 1" in text
    assert "comments and labels are for people to read" in text


def test_pairs_and_judgements_are_counted_without_those_that_are_judged_by(tmp_path: Path) -> None:
    rows = [
        judged(n, f"Who mends {name}{n}?", "Nobody.", Implicit(action="edit", text=f"{name} {n}."))
        for n, name in enumerate((*NAMES, *NAMES[:6]))
    ]
    rows += [
        judged(40 + n, row.interaction.messages[0].content, f"No {n}.", Binary(value=False))
        for n, row in enumerate(rows)
        if row.interaction
    ]
    rows += [
        judged(80 + n, f"Is there a {name} {n}?", f"Yes {n}.", Binary(value=True))
        for n, name in enumerate(NAMES * 2)
    ]
    some = deps(tmp_path, rows)
    folder = data_folder(some, "rnd_1")

    curate(some, a_round(1), None, tmp_path / "general.jsonl", folder)

    num_apart = len(read_examples(folder / "next_judged.jsonl"))
    left = 16 - num_apart
    assert 0 < num_apart < 16
    assert read_pairs(folder / "pairs.jsonl") == ()
    assert read_judgements(folder / "judgements.jsonl") == ()
    text = (folder / "diff.md").read_text()
    assert f"No pairs are trained on: {left}, fewer than 16." in text
    few = f"20 desirable and {left} undesirable, fewer than 16 of one"
    assert f"No judgements are trained on: {few}." in text
    assert f"| left out, they ask what is judged by | {2 * num_apart} |" in text
    assert json.loads((folder / "counts.json").read_bytes())["dropped"] == {"too_few": 20 + left}


def test_the_next_round_trains_on_nothing_that_is_judged_by(tmp_path: Path) -> None:
    some = deps(tmp_path, first_round())
    curate(some, a_round(1), None, tmp_path / "general.jsonl", data_folder(some, "rnd_1"))
    judge = read_examples(data_folder(some, "rnd_1") / "next_judged.jsonl")
    again = [
        judged(200 + n, row.question, "?", Correction(text=row.completion))
        for n, row in enumerate(judge)
    ]
    fresh = judged(300, "May I return a gift?", "?", Correction(text="Yes, with its receipt."))
    later = deps(tmp_path, [*again, fresh])
    champion: Any = SimpleNamespace(round_id="rnd_1")

    curate(later, a_round(2), champion, tmp_path / "general.jsonl", data_folder(later, "rnd_2"))

    folder = data_folder(later, "rnd_2")
    assert [row.id for row in read_examples(folder / "train.jsonl")] == ["fb_300"]
    assert (
        f"| left out, they ask what is judged by | {len(judge)} |"
        in (folder / "diff.md").read_text()
    )
    kept = load_replay(folder / "next_replay.jsonl")
    assert {row.round_id for row in kept.rows} == {"rnd_1", "rnd_2"}


def test_a_click_against_what_an_earlier_round_was_taught_teaches_nothing(tmp_path: Path) -> None:
    some = deps(tmp_path, first_round())
    curate(some, a_round(1), None, tmp_path / "general.jsonl", data_folder(some, "rnd_1"))
    known = next(
        row
        for row in load_replay(data_folder(some, "rnd_1") / "next_replay.jsonl").rows
        if row.kind == "replay" and row.completion.startswith("In the")
    )
    clicks = [
        judged(400, known.question, "In another town.", Implicit(action="copy")),
        judged(401, known.question, known.completion, Binary(value=True)),
    ]
    many = [
        judged(500 + n, f"Is there a {name} {n}?", f"Yes {n}.", Binary(value=n < 20))
        for n, name in enumerate(NAMES * 4)
    ]
    later = deps(tmp_path, [*clicks, *many])
    champion: Any = SimpleNamespace(round_id="rnd_1")

    curate(later, a_round(2), champion, tmp_path / "general.jsonl", data_folder(later, "rnd_2"))

    folder = data_folder(later, "rnd_2")
    ids = {row.id for row in read_judgements(folder / "judgements.jsonl")}
    assert "fb_401" in ids
    assert "fb_400" not in ids
    assert json.loads((folder / "counts.json").read_bytes())["dropped"] == {"overruled": 1}


def test_a_blend_is_chosen_on_new_and_past_rows_that_are_not_trained_on(tmp_path: Path) -> None:
    some = deps(tmp_path, first_round())
    curate(some, a_round(1), None, tmp_path / "general.jsonl", data_folder(some, "rnd_1"))
    fresh = [
        judged(300 + n, f"Which colour has the {name}?", "?", Correction(text=f"It is {name}-red."))
        for n, name in enumerate(NAMES)
    ]
    blend = {"PERENNIAL_TRAINING__OVERRIDES": '{ start = "blend" }'}
    later = deps(tmp_path, fresh, **blend)
    champion: Any = SimpleNamespace(round_id="rnd_1")

    curate(later, a_round(2), champion, tmp_path / "general.jsonl", data_folder(later, "rnd_2"))

    folder = data_folder(later, "rnd_2")
    dev, train, replay = (
        read_examples(folder / f"{name}.jsonl") for name in ("dev", "train", "replay")
    )
    assert {row.kind == "replay" for row in dev} == {True, False}
    asked = {row.prompt_key for row in dev}
    assert not asked & {row.prompt_key for row in (*train, *replay)}
    kept = {row.id for row in load_replay(folder / "next_replay.jsonl").rows}
    assert {row.id for row in dev if row.kind != "replay"} <= kept
    assert read_examples(data_folder(later, "rnd_1") / "dev.jsonl") == ()


@pytest.mark.parametrize("start", ["parent", "blend"])
def test_nothing_that_is_judged_by_is_replayed(tmp_path: Path, start: str) -> None:
    some = deps(tmp_path, first_round())
    past = data_folder(some, "rnd_1")
    curate(some, a_round(1), None, tmp_path / "general.jsonl", past)
    again = [
        judged(400 + n, row.question, "?", Correction(text=row.completion))
        for n, row in enumerate(read_examples(past / "train.jsonl"))
    ]
    overrides = {"PERENNIAL_TRAINING__OVERRIDES": f'{{ start = "{start}" }}'}
    later = deps(tmp_path, again, **overrides)
    champion: Any = SimpleNamespace(round_id="rnd_1")

    curate(later, a_round(2), champion, tmp_path / "general.jsonl", data_folder(later, "rnd_2"))

    folder = data_folder(later, "rnd_2")
    names = ("next_judged", "dev", "train", "replay")
    judge, dev, train, replay = (read_examples(folder / f"{name}.jsonl") for name in names)
    asked = {row.prompt_key for row in (*judge, *dev)}
    assert any(row.id.startswith("fb_4") for row in judge)
    assert bool(dev) == (start == "blend")
    assert replay
    assert not asked & {row.prompt_key for row in (*train, *replay)}
    kept = {row.prompt_key for row in load_replay(folder / "next_replay.jsonl").rows}
    assert not kept & {row.prompt_key for row in judge}
    assert kept >= {row.prompt_key for row in dev}


def remembered(number: int) -> Example:
    """A row of the first round that resembles no other."""
    word = "".join(chr(97 + int(digit)) for digit in f"{number:03}") * 3
    return Example(
        id=f"old-{number}",
        messages=(("user", f"{word}?"),),
        completion=f"{word[::-1]}.",
        kind="correction",
    )


def second_round(home: Path, num_past: int, capacity: int, **environment: str) -> Path:
    """The rows of a round that follows one which remembers `num_past` rows."""
    fresh = judged(300, "May I return a gift?", "?", Correction(text="Yes, with its receipt."))
    some = deps(home, [fresh], **environment)
    past = data_folder(some, "rnd_1")
    write_examples(past / "next_judged.jsonl", ())
    store = ReplayStore(capacity=capacity)
    store.add([remembered(n) for n in range(num_past)], "rnd_1").save(past / "next_replay.jsonl")
    champion: Any = SimpleNamespace(round_id="rnd_1")
    curate(some, a_round(2), champion, home / "general.jsonl", data_folder(some, "rnd_2"))
    return data_folder(some, "rnd_2")


def test_retention_is_judged_on_old_and_young_rows_alike(tmp_path: Path) -> None:
    folder = second_round(tmp_path, num_past=60, capacity=100)

    lines = (folder / "suites" / "retained.jsonl").read_text().splitlines()
    asked = [int(json.loads(line)["id"].rpartition("-")[2]) for line in lines]
    assert len(asked) == 45
    assert [sum(n // 15 == part for n in asked) for part in range(4)] == [12, 11, 11, 11]


def test_replay_shrinks_to_the_setting_of_now_and_the_diff_says_so(tmp_path: Path) -> None:
    small = {"PERENNIAL_TRAINING__REPLAY_ROWS": "8"}
    folder = second_round(tmp_path, num_past=20, capacity=100, **small)

    replayed = read_examples(folder / "replay.jsonl")
    smaller = ReplayStore(capacity=8).add([remembered(n) for n in range(20)], "rnd_1")
    assert replayed == smaller.rows
    kept = load_replay(folder / "next_replay.jsonl")
    assert (kept.capacity, len(kept.rows)) == (8, 8)
    assert "| evicted, no room | 13 |" in (folder / "diff.md").read_text()


def test_replay_grows_with_the_setting_of_now(tmp_path: Path) -> None:
    folder = second_round(tmp_path, num_past=8, capacity=8)

    kept = load_replay(folder / "next_replay.jsonl")
    assert (kept.capacity, len(kept.rows)) == (2000, 9)
