"""The numbers of a run as a table for people: what was measured, and the bar it should clear."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Numbers = Mapping[str, Any]  # Any: numbers, lists of numbers and None, as JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One row: shown when `key` was measured."""

    key: str
    label: str
    text: str
    bar: str = ""
    is_met: Callable[[Numbers], bool] | None = None


LINES = (
    Line(
        key="stolen_max",
        label="cores' time that other machines took",
        text="up to {stolen_max:.0%} of a scenario",
    ),
    Line(
        key="fsync_per_s",
        label="fsync of this disk",
        text="{fsync_per_s:,.0f}/s, p50 {fsync_p50_ms:.1f} ms, p99 {fsync_p99_ms:.0f} ms",
    ),
    Line(
        key="single_per_s",
        label="single POST, 1 KB, 64 clients, SQLite",
        text="{single_per_s:,.0f}/s, p50 {single_p50_ms:.0f} ms, p99 {single_p99_ms:.0f} ms",
        bar="≥ 2,000/s, p99 ≤ 100 ms",
        is_met=lambda r: r["single_per_s"] >= 2000 and r["single_p99_ms"] <= 100,
    ),
    Line(
        key="load_cpu_us",
        label="CPU a request",
        text="server {single_server_cpu_us:,.0f} µs, load generator {load_cpu_us:.0f} µs",
    ),
    Line(
        key="control_per_s",
        label="control: plain FastAPI and SQLAlchemy",
        text="{control_per_s:,.0f}/s, p99 {control_p99_ms:.0f} ms",
    ),
    Line(
        key="vs_per_request_commit",
        label="fast path against the control",
        text="{vs_per_request_commit:.1f}x",
        bar="≥ 4x",
        is_met=lambda r: r["vs_per_request_commit"] >= 4,
    ),
    Line(
        key="groups_of_one_per_s",
        label="our server with groups of one row",
        text="{groups_of_one_per_s:,.0f}/s, fast path {vs_groups_of_one:.1f}x",
    ),
    Line(
        key="interaction_per_s",
        label="single interactions, 1 KB, SQLite",
        text="{interaction_per_s:,.0f}/s, p99 {interaction_p99_ms:.0f} ms",
    ),
    Line(
        key="postgres_per_s",
        label="single POST, PostgreSQL",
        text="{postgres_per_s:,.0f}/s, p99 {postgres_p99_ms:.0f} ms",
        bar="≥ 2,000/s",
        is_met=lambda r: r["postgres_per_s"] >= 2000,
    ),
    Line(
        key="batch_events_per_s",
        label="batches of 100, 1 KB an event",
        text="{batch_events_per_s:,.0f} events/s, p99 {batch_p99_ms:.0f} ms",
        bar="≥ 10,000 events/s",
        is_met=lambda r: r["batch_events_per_s"] >= 10_000,
    ),
    Line(
        key="batch_votes_per_s",
        label="batches of 100 votes",
        text="{batch_votes_per_s:,.0f} events/s",
    ),
    Line(
        key="idle_ack_ms",
        label="idle ack, p50",
        text="{idle_ack_ms:.1f} ms beside an fsync of {idle_fsync_p50_ms:.1f} ms",
        bar="≤ fsync + 2 ms",
        is_met=lambda r: r["idle_ack_ms"] <= r["idle_fsync_p50_ms"] + 2,
    ),
    Line(
        key="overload_goodput_share",
        label="overload: goodput",
        text="{overload_goodput_share:.0%} of {overload_peak_per_s:,.0f}/s, "
        "offered {overload_offered_share:.1f}x",
        bar="≥ 90%",
        is_met=lambda r: r["overload_goodput_share"] >= 0.9,
    ),
    Line(
        key="overload_rss_mib",
        label="overload: memory",
        text="{overload_rss_mib:+.0f} MiB",
        bar="≤ +64 MiB",
        is_met=lambda r: r["overload_rss_mib"] <= 64,
    ),
    Line(
        key="overload_refusals_with_retry_after",
        label="overload: refusals with Retry-After",
        text="{overload_refusals_with_retry_after:.1%}, p99 {overload_refused_p99_ms:.0f} ms",
        bar="100%",
        is_met=lambda r: bool(r["overload_refusals_with_retry_after"] == 1),
    ),
    Line(
        key="overload_recovery_s",
        label="overload: p99 is back after",
        text="{overload_recovery_s} s",
        bar="≤ 5 s",
        is_met=lambda r: r["overload_recovery_s"] <= 5,
    ),
    Line(
        key="training_p99_ratio",
        label="beside training and Evidently, 64 clients",
        text="p99 {training_p99_ms:.0f} ms = {training_p99_ratio:.1f}x, {training_per_s:,.0f}/s",
        bar="p99 ≤ 2x",
        is_met=lambda r: r["training_p99_ratio"] <= 2,
    ),
    Line(
        key="training_half_load_p99_ratio",
        label="the same at half the peak rate",
        text="p99 {training_half_load_p99_ms:.0f} ms = {training_half_load_p99_ratio:.1f}x",
    ),
    Line(
        key="mlflow_per_s",
        label="MLflow log_feedback, 64 clients",
        text="{mlflow_per_s:,.0f}/s, p99 {mlflow_p99_ms:.0f} ms, {mlflow_missing} acked, lost",
    ),
    Line(
        key="phoenix_per_s",
        label="Phoenix span annotations, 64 clients",
        text="{phoenix_per_s:,.0f}/s, p99 {phoenix_p99_ms:.0f} ms, {phoenix_missing} acked, lost",
    ),
)


def table(results: Numbers) -> str:
    """The measured lines, each with its bar and whether it was cleared."""
    return "\n".join(_drawn(line, results) for line in LINES if results.get(line.key) is not None)


def _drawn(line: Line, results: Numbers) -> str:
    verdict = ""
    if line.is_met is not None:
        verdict = f"{line.bar}: {'met' if line.is_met(results) else 'MISSED'}"
    return f"{line.label:42}{line.text.format(**results):58}{verdict}".rstrip()
