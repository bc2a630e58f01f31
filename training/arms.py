"""The arms of the continual benchmark, and every training that they ask for, as values.

A step is known by a digest of all that it depends on, so arms share what they have in common (the
first round of `full` and of `no-replay`, say) and a killed benchmark finds what it has. Running the
steps is left to flows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from perennial.infra.errors import ConfigError
from perennial.training import config as configs
from perennial.training.config import TrainConfig
from perennial.training.continual import GENERAL
from perennial.training.examples import Example
from perennial.training.holdout import split_holdout
from perennial.training.recipes import shares_of
from perennial.training.replay import ReplayStore
from perennial.training.stream import Task

_OF_GENERAL = ("general_share", "kl_weight", "general_blend", "kl_budget")
_EVERY_LAYER = 10_000  # more than any model has
# Any: fields of TrainConfig
_BARE: Mapping[str, Any] = {
    "kl_budget": 0.0,
    "shrink": 1.0,
    "start": "parent",
    "rebuild_every": 0,
}
_PLAIN: Mapping[str, Any] = {**_BARE, "recipe": "replay", "mastered": 0.0}
_ALONE: Mapping[str, Any] = {**_BARE, "recipe": "sft"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to go through a stream: the recipe with `overrides`, less what it leaves out."""

    says: str
    rounds: Literal["none", "in-turn", "all-at-once", "each-alone"] = "in-turn"
    has_replay: bool = True
    has_general: bool = True
    tokens: Literal["own", "as-full"] = "own"  # as-full: epochs for as many tokens as `full`
    overrides: Mapping[str, Any] = field(default_factory=dict)  # Any: fields of TrainConfig


ARMS: Mapping[str, Arm] = {
    "base": Arm(says="the base model, never trained", rounds="none"),
    "naive": Arm(
        says="goes on with the same adapter",
        has_replay=False,
        has_general=False,
        overrides=_ALONE,
    ),
    "naive-same-tokens": Arm(
        says="naive, as many tokens as the full recipe",
        has_replay=False,
        has_general=False,
        tokens="as-full",
        overrides=_ALONE,
    ),
    "replay": Arm(says="plain replay of past rounds", has_general=False, overrides=_PLAIN),
    "replay-same-tokens": Arm(
        says="plain replay, as many tokens as the full recipe",
        has_general=False,
        tokens="as-full",
        overrides=_PLAIN,
    ),
    "full": Arm(says="the product's recipe"),
    "no-general": Arm(says="full without general rows", has_general=False),
    "no-replay": Arm(says="full without replay of past rounds", has_replay=False),
    "no-kd": Arm(says="full, replayed rows without teachers", overrides={"recipe": "anchor"}),
    "no-rest": Arm(says="full, mastered rows in every epoch", overrides={"mastered": 0.0}),
    "kl-only": Arm(
        says="full, general rows held to the base alone", overrides={"general_blend": 1.0}
    ),
    "no-dropout": Arm(says="full, questions always whole", overrides={"question_dropout": 0.0}),
    "no-shrink": Arm(says="full, the change as it was trained", overrides={"shrink": 1.0}),
    "all-layers": Arm(
        says="full with an adapter on every layer", overrides={"top_layers": _EVERY_LAYER}
    ),
    "from-base": Arm(
        says="full, each round rebuilt from the base", overrides={"start": "base"}
    ),
    "slow-fast": Arm(
        says="full, a slow average of the adapters is served", overrides={"start": "slow-fast"}
    ),
    "blend": Arm(
        says="full, old and new adapter blended as dev rows like it", overrides={"start": "blend"}
    ),
    "joint": Arm(
        says="all tasks at once: the usual upper bound",
        rounds="all-at-once",
        has_general=False,
        overrides=_ALONE,
    ),
    "single": Arm(
        says="each task alone from the base: how much can be learned",
        rounds="each-alone",
        has_general=False,
        overrides=_ALONE,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """Tasks in the order of the rounds, with what replay remembers before each of them.

    `union` are the rows of all tasks, for each prompt the newest. It does not ask the replay store
    what contradicts what: an upper bound must not fall with the recipe that is held against it.
    """

    tasks: tuple[Task, ...]
    past: tuple[tuple[Example, ...], ...]
    union: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What all arms share.

    `overrides` are fields over the recipe's defaults; `salt` names what else a result depends on:
    base model, test rows, limits of generation. `dev_share` of the new and of the replayed rows
    choose α where the start is "blend".
    """

    overrides: Mapping[str, Any]  # Any: fields of TrainConfig
    general: tuple[Example, ...]
    salt: str
    dev_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One training (none for the base model) and what is examined after it.

    `examined` are names of tasks and, where a model has been through all of them, `GENERAL`.
    """

    key: str
    index: int  # of the round, from 0
    config: TrainConfig | None
    parent: "Step | None"
    examined: tuple[str, ...]
    new: tuple[Example, ...] = ()
    replay: tuple[Example, ...] = ()
    general: tuple[Example, ...] = ()
    dev: tuple[Example, ...] = ()


def course(tasks: Sequence[Task], replay_rows: int) -> Course:
    """The rows of each round, as a product that keeps `replay_rows` would have them."""
    memory = ReplayStore(capacity=replay_rows)
    past = []
    for task in tasks:
        past.append(memory.supersede(_examples(task)).rows)
        memory = memory.add(_examples(task), task.name)
    newest = {row.prompt_key: row for task in tasks for row in _examples(task)}
    union = sorted(newest.values(), key=lambda row: row.id)
    return Course(tasks=tuple(tasks), past=tuple(past), union=tuple(union))


def plan(name: str, course: Course, seed: int, shared: Shared) -> tuple[Step, ...]:
    """The steps of one arm, in order.

    Raises:
        ConfigError: there is no such arm, or a field of the recipe is out of range.
    """
    if name not in ARMS:
        raise ConfigError(f"unknown arm {name!r}; known: {', '.join(ARMS)}", arm=name)
    arm, tasks, names = ARMS[name], course.tasks, tuple(task.name for task in course.tasks)
    last, everything = len(tasks) - 1, (*names, GENERAL)
    if arm.rounds == "none":
        key = _digest(shared, None, None, everything)
        return (Step(key=key, index=last, config=None, parent=None, examined=everything),)
    if arm.rounds == "all-at-once":
        return (_step(shared, arm, seed, last, course.union, examined=everything),)
    if arm.rounds == "each-alone":
        return tuple(
            _step(shared, arm, seed, index, _examples(task), examined=(task.name,))
            for index, task in enumerate(tasks)
        )
    steps: list[Step] = []
    for index, (task, past) in enumerate(zip(tasks, course.past, strict=True)):
        parent = steps[-1] if steps else None
        new, examined = _examples(task), everything if index == last else names
        step = _step(shared, arm, seed, index, new, examined=examined, past=past, parent=parent)
        steps.append(step)
    return tuple(steps)


def _step(
    shared: Shared,
    arm: Arm,
    seed: int,
    index: int,
    new: tuple[Example, ...],
    *,
    examined: tuple[str, ...],
    past: tuple[Example, ...] = (),
    parent: Step | None = None,
) -> Step:
    replay = past if arm.has_replay else ()
    general = shared.general if arm.has_general else ()
    config = _config(shared, arm, seed, has_past=bool(past))
    config = _read(config, has_replay=bool(replay), has_general=bool(general))
    dev: tuple[Example, ...] = ()
    if parent and config.start == "blend":
        for_new, for_past = (
            split_holdout(rows, shared.dev_share, draw=str(index)) for rows in (new, replay)
        )
        new, replay, dev = for_new.train, for_past.train, (*for_new.judge, *for_past.judge)
    sources = (new, replay, general, dev) if dev else (new, replay, general)
    return Step(
        key=_digest(shared, config, parent, examined, *sources),
        index=index,
        config=config,
        parent=parent,
        examined=examined,
        new=new,
        replay=replay,
        general=general,
        dev=dev,
    )


def _config(shared: Shared, arm: Arm, seed: int, *, has_past: bool) -> TrainConfig:
    """The recipe of the arm, with the epochs that its tokens ask for."""
    own = configs.from_json({**shared.overrides, **arm.overrides, "seed": seed})
    if arm.tokens == "own":
        return own
    full = configs.from_json({**shared.overrides, "seed": seed})
    if full.start == "base" or full.rebuild_every:
        raise ConfigError(
            "an arm with the tokens of `full` needs rounds that go on from each other; leave out "
            "the arm, or start 'base' and rebuild_every of the recipe",
            name="start",
        )
    has_general = bool(shared.general)
    theirs = _new_share(full, has_replay=has_past, has_general=has_general)
    ours = _new_share(
        own, has_replay=has_past and arm.has_replay, has_general=has_general and arm.has_general
    )
    return configs.from_json(own.to_json() | {"epochs": round(full.epochs * ours / theirs)})


def _read(config: TrainConfig, *, has_replay: bool, has_general: bool) -> TrainConfig:
    """The config without what no row asks for, so that steps that differ only there are one."""
    unread = {} if has_replay else dict.fromkeys(("replay_share", "mastered"), 0.0)
    if not has_general:
        unread |= dict.fromkeys(_OF_GENERAL, 0.0)
    return configs.from_json(config.to_json() | unread)


def _new_share(config: TrainConfig, *, has_replay: bool, has_general: bool) -> float:
    """Part of an epoch's tokens that are new rows, as `mix` deals them."""
    shares = shares_of(config)
    return 1 - shares.replay * has_replay - shares.general * has_general


def _examples(task: Task) -> tuple[Example, ...]:
    return tuple(row.example for row in task.train)


def _digest(
    shared: Shared,
    config: TrainConfig | None,
    parent: Step | None,
    examined: Sequence[str],
    *sources: Sequence[Example],
) -> str:
    """Sixteen hex digits over all that the result of a step depends on."""
    parts = [
        shared.salt,
        config.to_json() if config else None,
        parent.key if parent else None,
        sorted(examined),
        [[row.to_json() for row in rows] for rows in sources],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
