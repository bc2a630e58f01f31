import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from perennial.infra.artifacts import verify
from perennial.monitoring.check import CheckResult, check, scores
from perennial.monitoring.policy import Policy
from perennial.monitoring.windows import TrafficRow
from tests.monitoring.builders import (
    BORDER,
    END,
    OTHER_WORDS,
    START,
    row,
    sentences,
    traffic,
    windows,
)

ATTACK = "</script><script>alert(1)</script><!-- \ud800 card"


def run(reference: list[TrafficRow], current: list[TrafficRow]) -> CheckResult:
    return check(
        windows(reference, current), Policy(), num_new_examples=30, now=END, last_trained_at=None
    )


def drifting() -> CheckResult:
    new = traffic(sentences(2, 79, OTHER_WORDS), BORDER, "new", thumbs=-1, answer="I cannot help")
    return run(
        traffic(sentences(1, 80), START, "old", thumbs=1),
        [*new, row(at=BORDER, prompt=ATTACK, answer=ATTACK, has_correction=True)],
    )


def written(result: CheckResult, folder: Path) -> tuple[str, dict[str, object]]:
    from perennial.monitoring.report import write_report

    write_report(result, folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    return page, json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckResult, str, str]:
    folder = tmp_path_factory.mktemp("reports") / "one"
    result = drifting()
    page, document = written(result, folder)
    return folder, result, page, json.dumps(document)


Report = tuple[Path, CheckResult, str, str]


def test_the_folder_is_complete_and_sealed(report: Report) -> None:
    folder, result, _, _ = report
    assert set(verify(folder).files) == {"report.html", "report.json", "scores.json"}
    assert json.loads((folder / "scores.json").read_text()) == scores(result)


def test_the_page_shows_every_column(report: Report) -> None:
    _, _, page, document = report
    columns = (
        "num_prompt_words",
        "num_answer_chars",
        "prompt_digit_share",
        "prompt_new_word_share",
        "answer_repeat_share",
        "is_refusal",
        "thumbs",
        "has_correction",
        "model_version",
    )
    data = page[: page.index("</head>")]
    for column in columns:
        assert column in data
        assert f"column={column}" in document


def test_no_part_of_the_page_lacks_its_graph(report: Report) -> None:
    # One such part is enough for Evidently's script to draw nothing at all.
    _, _, page, _ = report
    assert '"graph": {' in page
    assert '"graph": null' not in page


def test_the_page_shows_our_test_decision_and_words(report: Report) -> None:
    _, result, page, document = report
    data = page[: page.index("</head>")]
    assert "p = 0.0010" in data
    assert "permutation test" in document
    assert result.decision.reasons[0].text[:40] in data
    assert "Words whose share of prompts changed most" in data
    assert "Prompts least like the reference" in data
    assert "router1" in data


def test_a_prompt_cannot_run_in_the_readers_browser(report: Report) -> None:
    _, _, page, _ = report
    assert "alert(1)" in page
    assert "<script>alert(1)" not in page
    assert "<!-- ?" not in page


def test_the_page_needs_no_network(report: Report) -> None:
    _, _, page, _ = report
    loads = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[^>]*>", page[:20_000])
    assert loads == []
    assert "<script src" not in page


def test_writing_again_keeps_the_first(report: Report) -> None:
    from perennial.monitoring.report import write_report

    folder, result, _, _ = report
    before = verify(folder)
    assert write_report(result, folder) == before


def test_without_a_reference_the_current_window_stands_alone(tmp_path: Path) -> None:
    page, document = written(run([], traffic(sentences(1, 60), BORDER, "n")), tmp_path / "r")
    assert "ValueDrift" not in json.dumps(document)
    assert "prompt_new_word_share" not in json.dumps(document)
    assert "no earlier traffic" in page


@pytest.mark.parametrize("num_current", [0, 1])
@pytest.mark.parametrize("num_reference", [0, 1])
def test_tiny_windows_are_drawn(tmp_path: Path, num_reference: int, num_current: int) -> None:
    result = run([row(1, at=START)][:num_reference], [row(2, at=BORDER)][:num_current])
    page, _ = written(result, tmp_path / "r")
    assert "Decision" in page
    json.loads((tmp_path / "r" / "report.json").read_text(), parse_constant=pytest.fail)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    from perennial.monitoring.report import write_report

    result = drifting()
    broken = replace(result, inputs_digest="\ud800")
    with pytest.raises(UnicodeEncodeError):
        write_report(broken, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_checking_loads_neither_evidently_nor_pandas() -> None:
    loaded = loaded_after("import perennial.monitoring.check_store")
    assert not loaded & {"evidently", "pandas", "sklearn", "torch"}


@pytest.mark.slow
def test_reporting_never_loads_the_telemetry() -> None:
    loaded = loaded_after("import perennial.monitoring.report")
    assert "evidently" in loaded
    assert not loaded & {"evidently.telemetry", "iterative_telemetry", "torch"}
