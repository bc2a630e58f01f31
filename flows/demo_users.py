"""Simulated users of the demo desk: like any app, they know the platform by its HTTP API only."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from perennial.flows.demo_desk import Fact, is_right, is_stale

_CLIENTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One question, what came back, and whether it was right by the grader."""

    interaction_id: str
    fact_id: str
    model_version: str
    is_right: bool
    is_stale: bool


class Users:
    """A crowd of users, eight at a time."""

    def __init__(self, api_url: str, task: str) -> None:
        self._task = task
        self._local = threading.local()
        self._api_url = api_url

    def ask_and_judge(
        self, questions: Iterable[tuple[str, Fact]], on_done: Callable[[], None]
    ) -> tuple[Outcome, ...]:
        """Ask each question; thumbs for every answer and a correction for each wrong one."""
        return self._each(questions, on_done, self._judge)

    def measure(
        self, questions: Iterable[tuple[str, Fact]], label: str, on_done: Callable[[], None]
    ) -> tuple[Outcome, ...]:
        """Ask without judging. The tag `probe` keeps these out of windows and training."""
        return self._each(questions, on_done, lambda q, f, s: self._ask(q, f, s, label))

    def _each(
        self,
        questions: Iterable[tuple[str, Fact]],
        on_done: Callable[[], None],
        visit: Callable[[str, Fact, str], Outcome],
    ) -> tuple[Outcome, ...]:
        def one(numbered: tuple[int, tuple[str, Fact]]) -> Outcome:
            number, (question, fact) = numbered
            outcome = visit(question, fact, f"user-{number:03d}")
            on_done()
            return outcome

        with ThreadPoolExecutor(_CLIENTS) as crowd:
            return tuple(crowd.map(one, enumerate(questions)))

    def _judge(self, question: str, fact: Fact, subject: str) -> Outcome:
        outcome = self._ask(question, fact, subject, None)
        target = {"interaction_id": outcome.interaction_id}
        signals: list[dict[str, Any]] = [{"kind": "binary", "value": outcome.is_right}]
        if not outcome.is_right:
            signals.append({"kind": "correction", "text": fact.answer})
        for signal in signals:
            self._post("/v1/feedback", {"target": target, "signal": signal, "subject": subject})
        return outcome

    def _ask(self, question: str, fact: Fact, subject: str, probe: str | None) -> Outcome:
        body: dict[str, Any] = {
            "model": self._task,
            "messages": [{"role": "user", "content": question}],
            "user": subject,
            "max_tokens": 32,
        }
        if probe:
            body["metadata"] = {"probe": probe, "fact": fact.id}
        response = self._post("/v1/chat/completions", body)
        text = response.json()["choices"][0]["message"]["content"]
        return Outcome(
            interaction_id=response.headers["x-interaction-id"],
            fact_id=fact.id,
            model_version=response.headers["x-model-version"],
            is_right=is_right(text, fact),
            is_stale=is_stale(text, fact),
        )

    # Any: the JSON edge
    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        if not hasattr(self._local, "client"):
            self._local.client = httpx.Client(base_url=self._api_url, timeout=120, trust_env=False)
        response: httpx.Response = self._local.client.post(path, json=body)
        return response.raise_for_status()


def training_questions(facts: Sequence[Fact]) -> tuple[tuple[str, Fact], ...]:
    """Every wording that users ask before a round, wording by wording so that facts alternate."""
    num_wordings = max(len(fact.questions) for fact in facts)
    return tuple(
        (fact.questions[i], fact)
        for i in range(num_wordings)
        for fact in facts
        if i < len(fact.questions)
    )


def held_out_questions(facts: Sequence[Fact]) -> tuple[tuple[str, Fact], ...]:
    """Every wording that is asked only to measure."""
    return tuple((question, fact) for fact in facts for question in fact.held_out)
