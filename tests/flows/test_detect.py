"""What a check leaves, and what it counts as new."""

from dataclasses import replace
from datetime import timedelta

from perennial.flows.detect import report_name
from perennial.monitoring.check import CheckResult, check
from perennial.monitoring.policy import Policy
from tests.monitoring.builders import BORDER, END, START, sentences, traffic, windows


def checked(num_new_examples: int) -> CheckResult:
    """A check of the same rows, whatever is new to learn from."""
    seen = windows(traffic(sentences(1, 9), START, "old"), traffic(sentences(2, 9), BORDER, "new"))
    return check(seen, Policy(), num_new_examples=num_new_examples, now=END, last_trained_at=None)


def test_checks_of_the_same_rows_share_a_report_only_if_they_decide_the_same() -> None:
    hold, retrain = checked(1), checked(100)
    later = replace(hold, checked_at=END + timedelta(hours=1))

    assert hold.inputs_digest == retrain.inputs_digest
    assert report_name("support", hold) != report_name("support", retrain)
    assert report_name("support", hold) == report_name("support", later)
