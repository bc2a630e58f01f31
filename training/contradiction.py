"""When a newer answer makes an older one wrong, though nobody asked in the same words.

A rule on words, measured where its numbers are stated. What leaves because of it is the business of
`replay` and of whoever keeps rows to judge by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from perennial.training.examples import Example
from perennial.training.text import TfIdf, cosine, fit_tfidf, normalise, numbers, words


@dataclass(frozen=True, kw_only=True, slots=True)
class Contradiction:
    """When a newer answer replaces an older one to a question in other words.

    Rows with one answer are one statement. Two statements are about the same thing when their
    answers are alike (cosine of TF-IDF at least `min_answer`), their closest questions are (at
    least `min_question`), and both together reach `min_sum`. Measured on the demo's desk with any
    one to three wordings of each side: the four changed facts reach 0.60 or more, any other pair
    with answers alike 0.42 or less.

    Guards keep what only fills the same template. Questions with other numbers, and answers
    that each repeat a word of half their questions that the other side never says ("the lamp
    works", "the fax of sales is 12" beside "the phone of sales is 34"), are about other things.
    An answer to more than `max_wordings` questions may be a class label: each old row then
    stands alone, and its question must be nearly that of a new one (`min_label_question`). An
    old statement that another old one passes for being about the same as stays. Of 250 Dolly
    answers the next 249 contradict 3; in the made stream of the continual benchmark (seeds
    0-19, 16 to 64 rows a task, both orders) the changed facts leave and nothing else. Two facts
    whose questions share their words ("until what time is it open?", "when does it open?") are
    still taken for one. The rule errs too often where facts are many for one thing to be used
    within a round, whose rows are new and whose equal prompts need no rule.
    """

    min_answer: float = 0.3
    min_question: float = 0.15
    min_sum: float = 0.58
    max_wordings: int = 8
    min_label_question: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measure:
    questions: TfIdf
    answers: TfIdf


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    vector: Mapping[str, float]
    numbers: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Statement:
    """One answer and the rows that say it; `key` is the answer normalised.

    said: the stems of answer and questions. named: those in the answer and in half the questions.
    """

    key: str
    rows: tuple[Example, ...]
    answer: Mapping[str, float]
    asked: tuple[_Asked, ...]
    num_wordings: int
    said: frozenset[str]
    named: frozenset[str]


def contradicted(
    old: Sequence[Example], new: Sequence[Example], rule: Contradiction
) -> tuple[Example, ...]:
    """The old rows that a new one answers otherwise; a row that agrees stays."""
    measure = _fit((*old, *new))
    news = _statements(new, measure)
    answers: dict[str, set[str]] = {}
    for statement in news:
        for row in statement.rows:
            answers.setdefault(row.prompt_key, set()).add(statement.key)
    olds, gone = _statements(old, measure), []
    for statement in olds:
        said = {row.id for row in _said_otherwise(statement, news, olds, rule)}
        gone += [
            row
            for row in statement.rows
            if row.id in said or answers.get(row.prompt_key, set()) - {statement.key}
        ]
    return tuple(gone)


def _said_otherwise(
    old: _Statement, news: Sequence[_Statement], beside: Sequence[_Statement], rule: Contradiction
) -> list[Example]:
    """The rows of `old` that one of `news` is about, unless one of those `beside` it is as well."""
    return [
        row
        for part in _parts(old, rule)
        if any(_is_about_same(part, other, rule) for other in news)
        and not any(_is_about_same(part, other, rule) for other in beside)
        for row in part.rows
    ]


def _fit(rows: Sequence[Example]) -> _Measure:
    return _Measure(
        questions=fit_tfidf([row.question for row in rows]),
        answers=fit_tfidf(sorted({normalise(row.completion) for row in rows})),
    )


def _statements(rows: Sequence[Example], measure: _Measure) -> list[_Statement]:
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(normalise(row.completion), []).append(row)
    return [_statement(key, tuple(group), measure) for key, group in groups.items()]


def _statement(key: str, rows: tuple[Example, ...], measure: _Measure) -> _Statement:
    asked = [_stems(row.question) for row in rows]
    told = _stems(key)
    return _Statement(
        key=key,
        rows=rows,
        answer=measure.answers.vector(key),
        asked=tuple(
            _Asked(vector=measure.questions.vector(row.question), numbers=numbers(row.question))
            for row in rows
        ),
        num_wordings=len(rows),
        said=told.union(*asked),
        named=frozenset(
            stem for stem in told if 2 * sum(stem in own for own in asked) >= len(asked)
        ),
    )


def _stems(text: str) -> frozenset[str]:
    """The beginnings of the longer words: "opens" is said of what is asked with "opening"."""
    return frozenset(word[:4] for word in words(text) if len(word) > 2)


def _parts(statement: _Statement, rule: Contradiction) -> list[_Statement]:
    """What leaves together: a statement with its wordings, or each row of a class label."""
    if statement.num_wordings <= rule.max_wordings:
        return [statement]
    each = zip(statement.rows, statement.asked, strict=True)
    return [replace(statement, rows=(row,), asked=(asked,)) for row, asked in each]


def _is_about_same(old: _Statement, new: _Statement, rule: Contradiction) -> bool:
    if old.key == new.key or (old.named - new.said and new.named - old.said):
        return False
    told = cosine(old.answer, new.answer)
    if told < rule.min_answer:
        return False
    is_label = max(old.num_wordings, new.num_wordings) > rule.max_wordings
    asked = max(
        (cosine(a.vector, b.vector) for a in old.asked for b in new.asked if not _differ(a, b)),
        default=0.0,
    )
    least = rule.min_label_question if is_label else rule.min_question
    return asked >= least and told + asked >= rule.min_sum


def _differ(left: _Asked, right: _Asked) -> bool:
    """Whether both questions have numbers, and not the same."""
    return bool(left.numbers and right.numbers and left.numbers != right.numbers)
