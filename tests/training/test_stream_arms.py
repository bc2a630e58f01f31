import json
from dataclasses import replace
from pathlib import Path

import pytest

from perennial.infra.errors import ConfigError, InputError
from perennial.training.arms import ARMS, Course, Shared, Step, course, plan
from perennial.training.continual import GENERAL
from perennial.training.examples import Example
from perennial.training.grading import default_grader, grade, has_stale
from perennial.training.stream import Order, Task, choose_graders, ordered, read_stream, spread
from tests.bench.streams.made import stream as made_stream
from tests.bench.streams.made import write_stream


def write(folder: Path, name: str, *rows: object) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(asked: str, *outputs: str, **fields: object) -> dict[str, object]:
    return {"instruction": asked, "input": "", "outputs": list(outputs), **fields}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, ...]:
    folder = tmp_path_factory.mktemp("made")
    write_stream(folder, seed=0)
    return read_stream(folder)


def shared(**overrides: object) -> Shared:
    general = Example(id="g", messages=(("user", "hi"),), completion="hello", kind="general")
    return Shared(overrides=overrides, general=(general,), salt="s", dev_share=0.15)


def keys(steps: tuple[Step, ...]) -> list[str]:
    return [step.key for step in steps]


def test_the_made_stream_has_five_rounds_that_do_not_leak(made: tuple[Task, ...]) -> None:
    assert [(len(task.train), len(task.test)) for task in made] == [(64, 32)] * 5
    for task in made:
        assert not {r.prompt for r in task.train} & {r.prompt for r in task.test}
    facts, override = made[1], made[2]
    taught = " ".join(r.outputs[0] for r in facts.train)
    stale = [r for r in override.test if r.forbid]
    assert len(stale) == 24
    assert all(r.forbid[0] in taught and r.outputs[0] != r.forbid[0] for r in stale)
    asked = {r.outputs[0] for r in facts.test}
    assert not asked & {r.forbid[0] for r in stale}
    assert made_stream(0) == made_stream(0) != made_stream(1)


def test_graders_follow_from_what_the_answers_look_like(made: tuple[Task, ...]) -> None:
    found = choose_graders(made, {"05-normalise": "contains"})

    assert list(found.values()) == ["json_fields", "contains", "contains", "exact", "contains"]
    assert default_grader(["yes"], ["it is so because it was always so"]) == "rouge_l"
    with pytest.raises(InputError, match="no task '06-x' to grade"):
        choose_graders(made, {"06-x": "exact"})


def test_reversed_an_override_still_follows_what_it_overrides(made: tuple[Task, ...]) -> None:
    names = [task.name for task in ordered(made, "reversed")]

    assert names == ["05-normalise", "04-codes", "02-facts", "03-override", "01-format"]
    assert ordered(made, "given") == made


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no stream"),
        ({"01-a.train.jsonl": [row("q", "a")]}, "task 01-a in .* has only a train file"),
        ({"a.train.jsonl": [row("q", "a")]}, "is not named like"),
        ({"01-a.train.jsonl": [], "01-a.test.jsonl": [row("q", "a")]}, "train.jsonl has no rows"),
        ({"01-a.train.jsonl": [{"input": "x"}]}, "row 1 of .* needs the text `instruction`"),
        ({"01-a.train.jsonl": [row("q", "a"), row("q")]}, "row 2 of .* `outputs`"),
        ({"01-a.train.jsonl": [row("q", "a") | {"outputs": "a"}]}, "must be a list of texts"),
        ({"01-a.train.jsonl": [row("q", " ")]}, "`outputs` that are not empty"),
        ({"01-a.train.jsonl": [row("q", "a", forbid=3)]}, "`forbid` must be a list"),
        ({"01-a.train.jsonl": [row("q", "a", input=3)]}, "`input` must be text, got 3"),
        ({"01-a.train.jsonl": [5]}, "row 1 of"),
    ],
)
def test_a_bad_stream_is_refused_with_its_place(
    tmp_path: Path, files: dict[str, list[object]], message: str
) -> None:
    for name, rows in files.items():
        write(tmp_path, name, *rows)
        if name == "01-a.train.jsonl" and "only a train" not in message:
            write(tmp_path, "01-a.test.jsonl", row("q", "a"))

    with pytest.raises(InputError, match=message):
        read_stream(tmp_path)


@pytest.mark.parametrize(
    ("grader", "answer", "reference", "score"),
    [
        ("exact", "Positive.", "positive", 1),
        ("exact", "2024/03/07", "2024-03-07", 0),
        ("contains", "It closes at 18:40, sir.", "18:40", 1),
        ("contains", "It closes at 18:405.", "18:40", 0),
        ("rouge_l", "the cat sat", "the cat is on the mat", 2 * 2 / 9),
        ("rouge_l", "", "the cat", 0),
        ("json_fields", 'Sure: {"a": "X", "b": 2} ok', '{"a": "x", "b": "3"}', 0.5),
        ("json_fields", '{"a": 1, "b": 1, "c": 1}', '{"a": 1}', 1 / 3),
        ("json_fields", "{broken", '{"a": 1}', 0),
    ],
)
def test_a_grader_scores_by_its_rule(
    grader: str, answer: str, reference: str, score: float
) -> None:
    assert grade(grader, answer, [reference, "never said"]) == pytest.approx(score)  # type: ignore[arg-type]


def test_a_stale_answer_is_one_with_the_old_words() -> None:
    assert has_stale("We close at 18:40.", ["17:00", "18:40"])
    assert not has_stale("We close at 18:40.", ["8:40"])


@pytest.fixture(scope="session")
def rounds(made: tuple[Task, ...]) -> Course:
    return course(made, replay_rows=2000)


def test_past_rounds_are_replayed_without_what_the_new_one_contradicts(rounds: Course) -> None:
    before_override = {r.completion for r in rounds.past[2]}
    stale = {r.forbid[0] for r in rounds.tasks[2].test if r.forbid}

    assert rounds.past[0] == ()
    assert not any(old in said for said in before_override for old in stale)


@pytest.mark.parametrize("order", ["given", "reversed"])
@pytest.mark.parametrize("num_rows", [16, 64])
def test_an_override_retires_what_it_changes_and_nothing_else(
    made: tuple[Task, ...], num_rows: int, order: Order
) -> None:
    tasks = [replace(task, train=spread(task.train, num_rows)) for task in ordered(made, order)]
    at = [task.name for task in tasks].index("03-override")
    past = course(tasks, replay_rows=2000).past[at]

    taught = [row.example for task in tasks[:at] for row in task.train]
    stale = {row.forbid[0] for row in made[2].test if row.forbid}
    changed = [row for row in taught if any(old in row.completion for old in stale)]
    assert len(changed) == num_rows // 2
    assert {row.id for row in taught} - {row.id for row in past} == {row.id for row in changed}


def test_the_upper_bound_learns_everything_but_what_was_overridden(rounds: Course) -> None:
    facts, override = rounds.tasks[1], rounds.tasks[2]
    stale = {r.forbid[0] for r in override.test if r.forbid}
    kept = {r.outputs[0] for r in facts.test}

    assert len(rounds.union) == 5 * 64 - 32
    assert not any(old in r.completion for r in rounds.union for old in stale)
    assert all(any(value in r.completion for r in rounds.union) for value in kept)


def test_arms_share_the_steps_that_are_equal(rounds: Course) -> None:
    full, no_replay = plan("full", rounds, 0, shared()), plan("no-replay", rounds, 0, shared())

    assert keys(full)[0] == keys(no_replay)[0]
    assert not {*keys(full)[1:]} & {*keys(no_replay)[1:]}
    assert keys(plan("base", rounds, 0, shared())) == keys(plan("base", rounds, 1, shared()))
    assert keys(full) != keys(plan("full", rounds, 1, shared()))
    assert [step.parent and step.parent.key for step in full] == [None, *keys(full)[:-1]]


def test_single_is_the_same_in_every_order(made: tuple[Task, ...], rounds: Course) -> None:
    turned = course(ordered(made, "reversed"), replay_rows=2000)

    given, other = plan("single", rounds, 0, shared()), plan("single", turned, 0, shared())

    assert {*keys(given)} == {*keys(other)}


def test_a_changed_recipe_or_row_makes_other_steps(rounds: Course) -> None:
    assert keys(plan("full", rounds, 0, shared())) != keys(plan("full", rounds, 0, shared(lr=1e-4)))


@pytest.mark.parametrize("name", ["naive", "joint", "single"])
def test_what_no_row_asks_for_makes_no_other_steps(name: str, rounds: Course) -> None:
    other = shared(replay_share=0.4, mastered=0.1, general_share=0.3, kl_weight=1.0)

    assert keys(plan(name, rounds, 0, shared())) == keys(plan(name, rounds, 0, other))
    full, changed = plan("full", rounds, 0, shared()), plan("full", rounds, 0, other)
    assert not {*keys(full)} & {*keys(changed)}


def test_equal_tokens_are_bought_with_epochs(rounds: Course) -> None:
    mixed = shared(epochs=9, replay_share=0.35, general_share=0.2)

    naive = [s.config and s.config.epochs for s in plan("naive-same-tokens", rounds, 0, mixed)]
    replay = [s.config and s.config.epochs for s in plan("replay-same-tokens", rounds, 0, mixed)]

    # The first round has nothing to replay: 9 / .8; later ones 9 / .45, with replay 9 · .65 / .45.
    assert naive == [11, 20, 20, 20, 20]
    assert replay == [11, 13, 13, 13, 13]


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        # 8 / .88 in the first round, later 8 / .67, with replay 8 · .79 / .67.
        ("replay-kd-anchor", {"naive": [9, 12, 12, 12, 12], "replay": [9, 9, 9, 9, 9]}),
        # No general rows: 8 / .79.
        ("replay-kd", {"naive": [8, 10, 10, 10, 10], "replay": [8, 8, 8, 8, 8]}),
        # No replayed rows either; what replays them has .21 more.
        ("sft", {"naive": [8, 8, 8, 8, 8], "replay": [8, 6, 6, 6, 6]}),
    ],
)
def test_equal_tokens_are_those_that_the_recipe_draws(
    name: str, epochs: dict[str, list[int]], rounds: Course
) -> None:
    for arm, wanted in epochs.items():
        given = shared(recipe=name, epochs=8, replay_share=0.21, general_share=0.12)
        steps = plan(f"{arm}-same-tokens", rounds, 0, given)

        assert [step.config and step.config.epochs for step in steps] == wanted


@pytest.mark.parametrize("name", sorted(ARMS))
def test_every_arm_has_a_plan_for_every_task(name: str, rounds: Course) -> None:
    steps = plan(name, rounds, 0, shared(kl_budget=0.5))

    names = {task.name for task in rounds.tasks}
    assert {name for step in steps for name in step.examined} - {GENERAL} == names
    # The general probe takes longer than a task: only a model that has been through all answers it.
    assert not any(GENERAL in step.examined for step in steps[:-1])
    assert (GENERAL in steps[-1].examined) == (name != "single")
    assert all((step.config is None) == (name == "base") for step in steps)


@pytest.mark.parametrize("name", ["naive", "replay", "joint", "single"])
@pytest.mark.parametrize("override", [{"start": "base"}, {"start": "blend"}, {"rebuild_every": 2}])
def test_what_the_recipe_is_held_against_does_not_change_with_its_starts(
    name: str, override: dict[str, object], rounds: Course
) -> None:
    changed = plan(name, rounds, 0, shared(**override))

    assert keys(changed) == keys(plan(name, rounds, 0, shared()))


@pytest.mark.parametrize("start", ["parent", "base", "slow-fast", "blend"])
def test_each_round_goes_on_from_the_one_before(start: str, rounds: Course) -> None:
    """Whether an arm or the settings ask for the start."""
    steps = plan("full", rounds, 0, shared(start=start))

    assert [step.parent and step.parent.key for step in steps] == [None, *keys(steps)[:-1]]
    arm = {"parent": "full", "base": "from-base"}.get(start, start)
    assert keys(steps) == keys(plan(arm, rounds, 0, shared()))


@pytest.mark.parametrize("override", [{"start": "base"}, {"rebuild_every": 2}])
def test_the_tokens_of_rounds_that_are_rebuilt_cannot_be_bought(
    override: dict[str, object], rounds: Course
) -> None:
    with pytest.raises(ConfigError, match="leave out the arm"):
        plan("replay-same-tokens", rounds, 0, shared(**override))


def test_a_blend_has_rows_to_choose_by_that_nothing_is_trained_on(rounds: Course) -> None:
    full, blended = (plan(name, rounds, 0, shared()) for name in ("full", "blend"))

    assert blended[0].dev == ()
    for whole, step in zip(full[1:], blended[1:], strict=True):
        assert {row.id for row in step.dev} & {row.id for row in whole.new}
        assert {row.id for row in step.dev} & {row.id for row in whole.replay}
        parts = (*step.new, *step.replay, *step.dev)
        assert sorted(row.id for row in parts) == sorted(
            row.id for row in (*whole.new, *whole.replay)
        )


def test_an_unknown_arm_is_refused_with_the_known_ones(rounds: Course) -> None:
    with pytest.raises(ConfigError, match="unknown arm 'fulll'; known: base, naive"):
        plan("fulll", rounds, 0, shared())
