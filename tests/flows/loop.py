"""A whole installation with a tiny model, and the worker that the tests kill.

Run as a script it is one worker: it runs the lifecycle once and kills itself where it is told to.
"""

import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perennial.feedback.records import (
    Binary,
    Correction,
    Feedback,
    Implicit,
    Interaction,
    Message,
    Signal,
    Target,
)
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import new_id, utc_now
from perennial.infra.db import Database
from perennial.infra.migrate import upgrade
from perennial.infra.settings import Settings, load_settings
from tests.feedback.writing import put

TASK = "support"
NUM_FACTS, NUM_JUDGED = 14, 16
WORDINGS = ("where is box {}?", "tell me the place of box {}", "box {}: which pier?")
ANSWER = "Box {} is at pier seven."
WRONG = "I have no idea, sorry."


def tiny_settings(
    home: Path, model: Path, mlflow: str, prefect: str, *, api_port: int = 9
) -> Settings:
    """Settings under which a round of the tiny model takes seconds and is promoted.

    At the default `api_port` nothing answers: no gateway has to follow.
    """
    overrides = (
        "{ lr = 0.01, epochs = 12, top_layers = 2, checkpoint_steps = 4, rank = 16, "
        "general_share = 0.1, question_dropout = 0.0 }"
    )
    return load_settings(
        {
            "PERENNIAL_HOME": str(home),
            "PERENNIAL_TASK": TASK,
            "PERENNIAL_MODEL__NAME": str(model),
            "PERENNIAL_MODEL__THREADS": "1",
            "PERENNIAL_API__PORT": str(api_port),
            "PERENNIAL_MLFLOW__URI": mlflow,
            "PERENNIAL_PREFECT__API_URL": prefect,
            "PERENNIAL_CHECK__MIN_EXAMPLES": "10",
            "PERENNIAL_CHECK__MIN_ROWS": "10",
            "PERENNIAL_CHECK__COOLDOWN_S": "0",
            "PERENNIAL_TRAINING__OVERRIDES": overrides,
            "PERENNIAL_GATE__MIN_ROWS": "6",
            "PERENNIAL_GATE__NLL_MARGIN": "5",
            "PERENNIAL_APPROVAL__MODE": "auto",
        },
        _empty(home),
    )


def save_parrot(folder: Path) -> Path:
    """A tiny model that has learned one wrong answer to everything, so that a round can win."""
    import torch

    from tests.training.builders import save_tiny, tiny_model, tiny_tokenizer

    torch.set_num_threads(1)
    save_tiny(folder)
    model, tokenizer = tiny_model().requires_grad_(True).train(), tiny_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        question = WORDINGS[step % 3].format(step % NUM_FACTS)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": WRONG}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        loss = model(input_ids=ids["input_ids"], labels=ids["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def fill(settings: Settings) -> None:
    """Traffic of a model that knows nothing; users correct it, edit its answers and judge some."""
    upgrade(settings.resolved_database_url)
    database = Database(settings.resolved_database_url)
    store = SqlFeedbackStore(database, utc_now)
    for fact in range(NUM_FACTS):
        right = ANSWER.format(fact)
        first, *others = (wording.format(fact) for wording in WORDINGS)
        _ask(store, first, "?", Binary(value=False), Correction(text=right))
        for question in others:
            _ask(store, question, "?", Implicit(action="edit", text=right))
    for number in range(NUM_JUDGED):
        _ask(store, f"is hall {number} open?", f"Hall {number} is open.", Binary(value=True))
        _ask(store, f"how far is hall {number}?", WRONG, Binary(value=False))
    database.dispose()


def _ask(store: SqlFeedbackStore, question: str, answer: str, *signals: Signal) -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    interaction = Interaction(
        id=new_id("int"),
        tenant="default",
        task=TASK,
        messages=(Message(role="user", content=question),),
        completion=answer,
        model_version="base",
        route_role="base",
        received_at=at,
        subject=question,
    )
    put(store, interaction)
    for said in signals:
        put(
            store,
            Feedback(
                id=new_id("fb"),
                tenant="default",
                target=Target(interaction_id=interaction.id),
                signal=said,
                source_kind="end_user",
                received_at=at,
            ),
        )


def _empty(home: Path) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    file = home / "perennial.toml"
    file.touch()
    return file


def work(point: str) -> None:
    """Run the lifecycle, and die at `point`: `before:STEP`, `after:STEP`, or never for `none`."""
    from perennial.flows import release
    from perennial.flows.lifecycle import lifecycle
    from perennial.registry.champion import ChampionStore
    from perennial.registry.rounds import Ledger

    when, _, step = point.partition(":")

    def deadly(real: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if when == "before" and name(*args) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if when == "after" and name(*args) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    Ledger.finish_step = deadly(Ledger.finish_step, lambda _s, _l, name, *_: name)  # type: ignore[method-assign]  # this process is the victim
    Ledger.open_round = deadly(Ledger.open_round, lambda *_: "open")  # type: ignore[method-assign]  # as above
    Ledger.close_round = deadly(Ledger.close_round, lambda *_: "close")  # type: ignore[method-assign]  # as above
    ChampionStore.promote = deadly(ChampionStore.promote, lambda *_: "promote")  # type: ignore[method-assign]  # as above
    release.reconcile = deadly(release.reconcile, lambda *_: "reconcile")
    lifecycle(task_name=TASK)


if __name__ == "__main__":
    work(sys.argv[1])
