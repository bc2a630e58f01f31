from pathlib import Path

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
