"""What a round's training set adds, keeps and drops, as Markdown for a person.

User text is shown, never obeyed: it stays on its line and cannot become a heading, a link or HTML.
What is in the sets was decided elsewhere.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from perennial.training.compile import Compiled, Drop, class_weights
from perennial.training.contradiction import Contradicted
from perennial.training.examples import Example, Judgement, Pair, question

_MAX_SHOWN = 50  # rows of a section; a person reads no more
_MAX_CHARS = 160
_MARKS = re.compile(r"([\\`*_{}\[\]()<>#!|~&])")

_WHY: Mapping[Drop, str] = {
    Drop.NO_CONSENT: "may not be trained on",
    Drop.UNSUPPORTED_KIND: "comments and labels are for people to read",
    Drop.UNCLEAR: "says nothing clear about the answer",
    Drop.UNCHANGED: "the edit is what the model said",
    Drop.EMPTY: "no question or no answer in words",
    Drop.TOO_LONG: "longer than a row may be",
    Drop.DUPLICATE: "says what a kept row says; it stays in its lineage",
    Drop.NEAR_DUPLICATE: "says almost what a newer row says",
    Drop.SUPERSEDED: "a newer answer says otherwise",
    Drop.OVERRULED: "a click against an answer that somebody wrote",
    Drop.SUBJECT_CAP: "more than one subject may give in a round",
    Drop.TOO_FEW: "too few of its kind to train on",
}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Diff:
    """A round's rows beside those of the past.

    added, pairs, judgements: trained on for the first time. judge: kept apart to judge by.
    num_known: compiled rows that ask what is judged by. kept: replayed. forgotten: contradicted.
    evicted: not replayed by the next round, because there is no room.
    """

    title: str
    compiled: Compiled
    added: tuple[Example, ...]
    pairs: tuple[Pair, ...]
    judgements: tuple[Judgement, ...]
    judge: tuple[Example, ...]
    num_known: int
    kept: tuple[Example, ...]
    forgotten: tuple[Contradicted, ...]
    evicted: tuple[Example, ...]


def render_diff(diff: Diff, round_names: Mapping[str, str]) -> str:
    """The Markdown; `round_names` says what to call the rounds of replayed rows."""
    kept = Counter(
        (round_names.get(row.round_id or "", row.round_id or ""), row.topic) for row in diff.kept
    )
    parts = [
        f"# {_inline(diff.title)}",
        _table(("rows", "number"), _sizes(diff)),
        "## Dropped feedback",
        _table(
            ("reason", "events", "meaning"),
            [(k.value, str(n), _WHY[k]) for k, n in diff.compiled.num_dropped.items()],
        ),
        *(f"No {out.rows} are trained on: {out.reason}." for out in diff.compiled.left_out),
        "## Forgotten because contradicted",
        _list(diff.forgotten, _changed),
        "## Added",
        _list(diff.added, _said),
        "## Preferred",
        _list(diff.pairs, _preferred),
        "## Judged",
        _list(diff.judgements, lambda row: f"{row.label}: {_said(row)}"),
        "## Kept for replay",
        _table(("round", "topic", "rows"), [(*key, str(n)) for key, n in sorted(kept.items())]),
        "## Evicted, no room",
        _list(diff.evicted, _said),
    ]
    return "\n\n".join(parts) + "\n"


def render_left_out(
    rows: Iterable[Example | Judgement | Pair], num_tokens: Mapping[str, int]
) -> str:
    """The end of the page, known once the round is trained: what was too long, by its id."""
    asked = {row.id: question(row.messages) for row in rows if row.id in num_tokens}
    shown = [f"{num_tokens[name]} tokens: {_inline(text)}" for name, text in asked.items()]
    return f"\n## Left out of training, too long\n\n{_list(shown, str)}\n"


def _sizes(diff: Diff) -> list[tuple[str, str]]:
    weights = "" if not diff.judgements else _weights(diff.judgements)
    return [
        ("new examples", str(len(diff.added))),
        ("new pairs", str(len(diff.pairs))),
        ("new judgements", f"{len(diff.judgements)}{weights}"),
        ("new, kept apart to judge by", str(len(diff.judge))),
        ("left out, they ask what is judged by", str(diff.num_known)),
        ("replayed", str(len(diff.kept))),
        ("forgotten because contradicted", str(len(diff.forgotten))),
        ("evicted, no room", str(len(diff.evicted))),
    ]


def _weights(judgements: Sequence[Judgement]) -> str:
    weights = class_weights(judgements)
    return f" (desirable × {weights.desirable:.2f}, undesirable × {weights.undesirable:.2f})"


def _said(row: Example | Judgement) -> str:
    return f"{_inline(question(row.messages))} → {_inline(row.completion)}"


def _changed(item: Contradicted) -> str:
    return f"{_said(item.old)} — now: {_inline(item.by.completion)}"


def _preferred(pair: Pair) -> str:
    chosen, rejected = _inline(pair.chosen), _inline(pair.rejected)
    return f"{_inline(question(pair.messages))} → {chosen} — rather than: {rejected}"


def _list(rows: Sequence[T], show: Callable[[T], str]) -> str:
    lines = [f"- {show(row)}" for row in rows[:_MAX_SHOWN]]
    if len(rows) > _MAX_SHOWN:
        lines.append(f"- … and {len(rows) - _MAX_SHOWN} more")
    return "\n".join(lines) or "None."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "None."
    lines = [head, ["---"] * len(head), *([_inline(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: str) -> str:
    r"""One line of at most 160 characters in which no Markdown or HTML is left.

    >>> _inline("# hi\n<b>*there*")
    '\\# hi \\<b\\>\\*there\\*'
    """
    line = " ".join(text.split())
    short = line if len(line) <= _MAX_CHARS else f"{line[:_MAX_CHARS]}…"
    return _MARKS.sub(r"\\\1", short)
