"""The model card and the text that a reviewer decides from, as Markdown.

Pure: what it shows is handed in. The same text is the card, the description of the version in
MLflow, and the summary that flows show.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from perennial.registry.gate import Comparison, Promote, Reason, SuiteKind, Verdict
from perennial.registry.versions import BASE, ModelVersion

_LEGEND: Mapping[SuiteKind, str] = {
    SuiteKind.TARGET: "gain wanted",
    SuiteKind.RETENTION: "must not fall",
    SuiteKind.FORBID: "must not rise",
    SuiteKind.NLL: "must not rise, nats/token",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a card tells; `recipe` and `examples` are shown as they come.

    `examples` counts training rows by kind. `champion` is what the candidate was compared with.
    `notes` are sentences on what the figures leave out.
    """

    version: ModelVersion
    champion: str | None
    reason: str
    verdict: Verdict
    recipe: Mapping[str, str | int | float] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    samples: Sequence[tuple[str, str, str]] = ()  # (question, answer before, answer after)


def render_card(card: Card) -> str:
    """The model card, complete."""
    version = card.version
    facts = {
        "Task": version.task,
        "Round": version.round_id,
        "Made because": card.reason,
        "Trained from": version.parent or BASE,
        "Base model digest": f"`{version.base_digest[:16]}…`",
        "Adapter digest": f"`{version.adapter_digest}`",
        "Dataset digest": f"`{version.dataset_digest[:16]}…`",
        "Registered": version.created_at.strftime("%Y-%m-%d %H:%M UTC"),
    }
    parts = [
        f"# {version.name}",
        render_evidence(card),
        "## Lineage",
        _table(("", ""), [(key, _cell(value)) for key, value in facts.items()]),
        *_counts("## Training rows", card.examples),
        *_counts("## Recipe", card.recipe),
        "## Limits",
        "Measured on the rows of the suites above and on nothing else. A LoRA adapter: it works "
        "with the base model of the digest above only.",
    ]
    return "\n\n".join(parts) + "\n"


def render_description(card: Card) -> str:
    """The description of the version in MLflow: the evidence, then how to answer."""
    name = card.version.name
    approve = (
        "## How to approve\n\n"
        "Set the tag `approval` of this version to `approved` (`rejected` keeps it out) and "
        f"`approved_by` to your name, or run `perennial approve {name}` with `--by NAME`. Before "
        "it goes live the adapter's digest is checked, and the champion must still be the one "
        "compared with."
    )
    return f"{render_evidence(card)}\n\n{approve}\n"


def render_evidence(card: Card) -> str:
    """The verdict, the table of before and after, the reasons, and some answers side by side."""
    passed = isinstance(card.verdict, Promote)
    against = card.champion or BASE
    head = "**The gate passed it.**" if passed else "**The gate rejected it.**"
    parts = [
        f"{head} Compared with `{against}` on the same rows.",
        render_comparisons(card.verdict.comparisons),
        *card.notes,
        "## Reasons",
        "\n".join(_bullet(reason) for reason in card.verdict.reasons),
    ]
    if card.samples:
        rows = [tuple(_cell(text) for text in sample) for sample in card.samples]
        parts += ["## Some answers", _table(("Question", "Before", "After"), rows)]
    return "\n\n".join(parts)


def render_comparisons(comparisons: Sequence[Comparison]) -> str:
    """A table, one row for each suite.

    Brackets hold 95% intervals for means, and for differences the bounds that the gate used.
    """
    if not comparisons:
        return "No suite could be compared."
    rows = [
        (
            f"{_cell(c.suite)} ({_LEGEND[c.kind]})",
            f"{c.num_rows} / {c.num_clusters}",
            _shown(c, c.before.estimate, c.before.low, c.before.high),
            _shown(c, c.after.estimate, c.after.low, c.after.high),
            _shown(c, c.difference.estimate, c.difference.low, c.difference.high, sign="+"),
            "met" if c.is_met else "**not met**",
        )
        for c in comparisons
    ]
    return _table(("Suite", "Rows / clusters", "Before", "After", "Difference", "Demand"), rows)


def _shown(item: Comparison, value: float, low: float, high: float, sign: str = "") -> str:
    style = f"{sign}.3f" if item.kind is SuiteKind.NLL else f"{sign}.1%"
    if low == high:
        return format(value, style)
    return f"{value:{style}} [{low:{style}}, {high:{style}}]"


def _bullet(reason: Reason) -> str:
    mark = "met" if reason.is_met else "**not met**"
    return f"- {mark}: {_cell(reason.sentence)} (`{reason.code}`)"


def _counts(title: str, values: Mapping[str, str | int | float]) -> list[str]:
    if not values:
        return []
    rows = [(_cell(key), _cell(str(value))) for key, value in values.items()]
    return [title, _table(("", ""), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that can neither leave its cell nor become a link or markup."""
    flat = " ".join(text.split())
    for sign in "\\|<>[]!*":
        flat = flat.replace(sign, f"&#{ord(sign)};")
    return flat
