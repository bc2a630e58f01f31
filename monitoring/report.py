"""Draws a check for a person, with Evidently: one page that opens without a network.

The only home of Evidently and pandas, whose import takes seconds: import this module where a report
is written, never where a command starts. Evidently's own column tests appear for description; its
text-drift classifier is left out (it sees a 10% new topic in 3% of runs and raises on a small
vocabulary), the permutation test of `drift` is shown instead and decides.

Reports send nothing: Evidently's telemetry is in its UI server and collector, which this module
never loads.
"""

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.core.metric_types import SingleValue, SingleValueCalculation, SingleValueMetric
from evidently.legacy.renderers.html_widgets import CounterData, counter, table_data
from evidently.metrics import RowCount, ValueDrift
from evidently.presets import ValueStats

from perennial.infra.artifacts import Manifest, publish
from perennial.monitoring.check import CheckResult, decision_name, scores
from perennial.monitoring.descriptors import describe, document_counts, new_word_share, tokens
from perennial.monitoring.feedback_rates import FeedbackRates, Rate
from perennial.monitoring.policy import Retrain
from perennial.monitoring.windows import TrafficRow, Window

HTML, JSON, SCORES = "report.html", "report.json", "scores.json"

_TEXT = ("prompt", "answer")
_CATEGORIES = ("is_refusal", "thumbs", "has_correction", "model_version")
_YES_NO = {True: "yes", False: "no"}
_NUM_SAMPLES = 10
_MAX_SAMPLE_CHARS = 240
_THUMBS = {1: "up", -1: "down", None: "none"}

_Cells = list[list[str]]


def write_report(result: CheckResult, folder: Path) -> Manifest:
    """`folder` holding report.html, report.json and scores.json, or none of them.

    A complete folder is kept as it is. Texts of users are in it: it deserves the same care as the
    database.
    """
    return publish(folder, lambda partial: _write(result, partial))


def frame(
    window: Window, reference_prompts: Sequence[str] | None, *, is_reference: bool
) -> pd.DataFrame:
    """One row per interaction: prompt, answer, descriptors, thumbs, has_correction, model_version.

    Args:
        window: the rows.
        reference_prompts: what words count as known; None when there is no reference, and then
            there is no column `prompt_new_word_share`.
        is_reference: whether `window` is itself that reference.
    """
    known = None if reference_prompts is None else document_counts(reference_prompts)
    num_own = 1 if is_reference else 0
    rows = [
        {
            "prompt": _harmless(row.prompt),
            "answer": _harmless(row.answer),
            **asdict(found := describe(row.prompt, row.answer, reference=known, num_own=num_own)),
            "is_refusal": _YES_NO[found.is_refusal],
            "thumbs": _THUMBS[row.thumbs],
            "has_correction": _YES_NO[row.has_correction],
            "model_version": _harmless(row.model_version),
        }
        for row in window.rows
    ]
    table = pd.DataFrame(rows)
    return table.drop(columns="prompt_new_word_share", errors="ignore") if known is None else table


class TableMetric(SingleValueMetric):  # type: ignore[misc]  # Evidently ships no types
    """One number of ours with the table that explains it.

    Attributes:
        title: heading on the page.
        number: the value in report.json.
        shown: that number as the page shows it; empty for none.
        header: column names.
        cells: rows of the table.
    """

    class Config:  # noqa: D106  # pydantic's own, read by Evidently
        type_alias = "perennial:metric:TableMetric"

    title: str
    number: float
    shown: str = ""
    header: list[str]
    cells: list[list[str]]


class TableCalculation(SingleValueCalculation[TableMetric]):  # type: ignore[misc]  # as above
    """Nothing is computed here: the numbers were computed by the check."""

    def calculate(
        self, context: object, current_data: Dataset, reference_data: Dataset | None
    ) -> SingleValue:
        """The number, drawn as a counter above its table."""
        metric = self.metric
        result = self.result(metric.number)
        top = [CounterData(label="", value=metric.shown)] if metric.shown else []
        result.widget = [
            *([counter(title=metric.title, counters=top)] if top else []),
            table_data(
                title="" if top else metric.title, column_names=metric.header, data=metric.cells
            ),
        ]
        return result

    def display_name(self) -> str:
        """The heading."""
        return str(self.metric.title)


def _write(result: CheckResult, folder: Path) -> None:
    windows = result.split
    known = windows.reference.prompts if windows.reference else None
    current = frame(windows.current, known, is_reference=False)
    reference = frame(windows.reference, known, is_reference=True) if windows.reference else None
    with warnings.catch_warnings():
        # Column statistics of few or tied values: SciPy warns that a p-value is approximate, NumPy
        # that one value has no spread. These columns describe, they decide nothing.
        warnings.simplefilter("ignore", RuntimeWarning)
        snapshot = Report(_metrics(result, current)).run(
            _dataset(current),
            None if reference is None or current.empty else _dataset(reference),
            name=f"check {windows.current.until.isoformat()}",
        )
    snapshot.save_html(str(folder / HTML))
    # The deviation of one row is NaN, which is no JSON: readers other than Python would refuse it.
    _write_json(folder / JSON, json.loads(snapshot.json(), parse_constant=lambda _: None))
    _write_json(folder / SCORES, scores(result))


def _write_json(path: Path, document: object) -> None:
    body = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(body + "\n", encoding="utf-8")


def _dataset(table: pd.DataFrame) -> Dataset:
    named = {*_TEXT, *_CATEGORIES}
    definition = DataDefinition(
        text_columns=list(_TEXT),
        categorical_columns=list(_CATEGORIES),
        numerical_columns=[column for column in table.columns if column not in named],
    )
    return Dataset.from_pandas(table, data_definition=definition)


def _metrics(result: CheckResult, current: pd.DataFrame) -> list[object]:
    ours = [_decision(result), _drift(result), _feedback(result), _shifts(result), _samples(result)]
    if current.empty:
        return [metric for metric in ours if metric]
    columns = [column for column in current.columns if column not in _TEXT]
    drifts = []
    if result.split.reference:
        drifts = [
            ValueDrift(column=column, method="jensenshannon", threshold=0.1)
            if column in _CATEGORIES
            else ValueDrift(column=column, method="ks", threshold=0.01)
            for column in columns
        ]
    # Not of a text column: Evidently gives it no graph, and its page then stays blank.
    stats = [ValueStats(column=column) for column in columns]
    return [*(metric for metric in ours if metric), RowCount(), *stats, *drifts]


def _decision(result: CheckResult) -> TableMetric:
    decision = result.decision
    cells = [[reason.code.value, reason.text] for reason in decision.reasons]
    if not isinstance(decision, Retrain):
        cells += [[r.code.value, f"held back: {r.text}"] for r in decision.suppressed]
    return TableMetric(
        title="Decision",
        number=float(isinstance(decision, Retrain)),
        shown=decision_name(decision),
        header=["reason", "in words"],
        cells=_clean(cells),
    )


def _drift(result: CheckResult) -> TableMetric | None:
    drift = result.evidence.drift
    if drift is None:
        return None
    return TableMetric(
        title="Prompt drift: p-value of the permutation test between mean TF-IDF vectors",
        number=drift.p_value,
        shown=f"p = {drift.p_value:.4f}",
        header=["distance", "by chance", "level", "reference", "current", "permutations"],
        cells=[
            [
                f"{drift.distance:.4f}",
                f"{drift.null_distance:.4f}",
                str(result.policy.drift_level),
                str(drift.num_reference),
                str(drift.num_current),
                str(drift.num_permutations),
            ]
        ],
    )


def _feedback(result: CheckResult) -> TableMetric:
    now, before = result.evidence.current, result.reference_feedback
    unhappy = now.unhappy.value
    return TableMetric(
        title="Feedback (95% Wilson intervals)",
        number=0.0 if unhappy is None else unhappy,
        header=["rate", "reference", "current"],
        cells=[
            [name.replace("_", " "), _rate(before, name), _rate(now, name)]
            for name in ("thumbs_down", "correction", "unhappy")
        ],
    )


def _rate(rates: FeedbackRates | None, name: str) -> str:
    if rates is None:
        return "–"
    rate: Rate = getattr(rates, name)
    if rate.value is None:
        return "no votes"
    return f"{rate.value:.1%} of {rate.num_rows} [{rate.low:.1%}, {rate.high:.1%}]"


def _shifts(result: CheckResult) -> TableMetric | None:
    if not result.shifts:
        return None
    return TableMetric(
        title="Words whose share of prompts changed most",
        number=float(len(result.shifts)),
        header=["word", "reference", "current"],
        cells=_clean(
            [s.word, f"{s.reference_share:.1%}", f"{s.current_share:.1%}"] for s in result.shifts
        ),
    )


def _samples(result: CheckResult) -> TableMetric | None:
    windows = result.split
    if not windows.current.rows:
        return None
    known = document_counts(windows.reference.prompts) if windows.reference else {}
    newest = sorted(
        windows.current.rows,
        key=lambda row: (
            -new_word_share(tokens(row.prompt), known, num_own=0),
            row.interaction_id,
        ),
    )[:_NUM_SAMPLES]
    return TableMetric(
        title="Prompts least like the reference" if windows.reference else "Prompts",
        number=float(len(newest)),
        header=["interaction", "prompt", "answer", "thumbs", "corrected"],
        cells=_clean(_sample(row) for row in newest),
    )


def _sample(row: TrafficRow) -> list[str]:
    texts = [_short(text) for text in (row.prompt, row.answer)]
    return [row.interaction_id, *texts, _THUMBS[row.thumbs], _YES_NO[row.has_correction]]


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SAMPLE_CHARS else text[: _MAX_SAMPLE_CHARS - 1] + "…"


def _clean(rows: Iterable[list[str]]) -> _Cells:
    return [[_harmless(cell) for cell in row] for row in rows]


def _harmless(text: str) -> str:
    """`text` that cannot leave the script element into which Evidently writes it unescaped.

    `</script><script>…` in a prompt would otherwise run in the reader's browser. Lone surrogates
    would fail the UTF-8 file.
    """
    return text.replace("<", "‹").encode("utf-8", "replace").decode("utf-8")
