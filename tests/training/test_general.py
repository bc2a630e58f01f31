from pathlib import Path

import pytest

from perennial.infra.errors import InputError
from perennial.training.general import Draft, fit_drafts, load_general, write_general

SLEET = (
    "The first thing to know of sleet is that it melts as it falls, and so it is rain for half of "
    "its way. The first thing to know of sleet for who drives is that roads freeze."
)


def draft(prompt: str, answer: str, *, has_ended: bool = True) -> Draft:
    return Draft(prompt=prompt, answer=answer, has_ended=has_ended, num_tokens=1)


def test_drafts_that_teach_nothing_are_left_out() -> None:
    drafts = [
        draft("What is rain?", "Water that falls.\u200b"),
        draft("What is snow?", "Frozen wat", has_ended=False),
        draft("?!", "Yes."),
        draft("What is fog?", " "),
        draft("What is hail?", "It is ice and it is ice and it is ice and it is ice."),
        draft("what is RAIN", "Something else."),
        draft("What is sleet like?", SLEET),
        draft("What is dew?", "Water on grass."),
    ]
    assert [row.prompt for row in fit_drafts(drafts, 9)] == [
        "What is rain?",
        "What is sleet like?",
        "What is dew?",
    ]
    assert [row.answer for row in fit_drafts(drafts, 1)] == ["Water that falls."]


def test_written_drafts_are_read_as_general_rows(tmp_path: Path) -> None:
    write_general(tmp_path / "general.jsonl", [draft('Say "é"', "é\nè")])
    assert load_general(tmp_path / "general.jsonl") == (('Say "é"', "é\nè"),)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", 'prompt,answer\nWhich code?,NA\nWhy?,\n" ",Yes.\nWhen?," At noon. "\n'),
        (
            "rows.jsonl",
            '{"prompt": "Which code?", "answer": "NA"}\n{"prompt": "Why?", "answer": null}\n'
            '{"prompt": "\\u200b", "answer": "Yes."}\n{"prompt": "When?", "answer": " At noon."}\n',
        ),
    ],
    ids=["csv", "jsonl"],
)
def test_general_rows_without_a_text_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    assert load_general(tmp_path / name) == (("Which code?", "NA"), ("When?", "At noon."))
    assert f"file={tmp_path / name} num_rows=2" in caplog.text


def test_an_input_that_is_null_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    rows = '{"instruction": "Add.", "input": "1, 2", "output": "3"}\n'
    rows += '{"instruction": "Sing.", "input": null, "output": "La."}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    assert load_general(tmp_path / "rows.jsonl") == (("Add.\n\n1, 2", "3"), ("Sing.", "La."))


def test_a_file_without_a_general_row_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\nWhy?,\n")
    with pytest.raises(InputError, match=r"rows\.csv has no general row"):
        load_general(tmp_path / "rows.csv")
