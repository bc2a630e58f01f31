from perennial.training.compile import Compiled, Drop, LeftOutKind
from perennial.training.contradiction import Contradicted
from perennial.training.diff import Diff, render_diff
from perennial.training.examples import Judgement, Pair
from tests.training.builders import example

USER = (("user", "Who runs it?"),)


def diff(**fields: object) -> Diff:
    given: dict[str, object] = {
        "title": "Training rows of round 2",
        "compiled": Compiled(),
        "num_known": 0,
    }
    parts = ("added", "pairs", "judgements", "judge", "kept", "forgotten", "evicted")
    return Diff(**{**dict.fromkeys(parts, ()), **given, **fields})  # type: ignore[arg-type]  # test


def test_the_diff_says_what_is_added_kept_and_dropped_and_why() -> None:
    up = Judgement(id="j1", messages=USER, completion="Otto", label="desirable")
    down = Judgement(id="j2", messages=USER, completion="Eva", label="undesirable")
    text = render_diff(
        diff(
            compiled=Compiled(
                drops={"fb_1": Drop.SUBJECT_CAP, "fb_2": Drop.SUBJECT_CAP},
                left_out=(LeftOutKind(rows="pairs", reason="2, fewer than 16"),),
            ),
            added=(example(1),),
            pairs=(Pair(id="p", messages=USER, chosen="Marit", rejected="Otto"),),
            judgements=(up, down),
            kept=tuple(example(n, round_id="r1", topic="item") for n in range(3)),
            forgotten=(Contradicted(old=example(2), by=example(3)),),
        ),
        {"r1": "round 1"},
    )
    assert "| subject\\_cap | 2 | more than one subject may give in a round |" in text
    assert "No pairs are trained on: 2, fewer than 16." in text
    assert "| new judgements | 2 \\(desirable × 1.00, undesirable × 1.00\\) |" in text
    assert "- what is item 7? → box b1" in text
    assert "- Who runs it? → Marit — rather than: Otto" in text
    assert "- undesirable: Who runs it? → Eva" in text
    assert "| round 1 | item | 3 |" in text
    assert "- what is item 14? → box c2 — now: box d3" in text


def test_user_text_cannot_forge_a_part_of_the_page() -> None:
    bad = "x\n## Added\n- [y](http://z) <script>alert(1)</script> | a `b` ![c](d)"
    text = render_diff(diff(added=(example(1, completion=bad),)), {})
    assert text.count("\n## Added") == 1
    assert "<script>" not in text
    assert "](" not in text.replace("\\](", "").replace("\\]\\(", "")


def test_a_long_list_is_cut_and_says_so() -> None:
    text = render_diff(diff(added=tuple(example(n) for n in range(70))), {})
    assert "- … and 20 more" in text


def test_every_reason_for_a_drop_is_explained() -> None:
    drops = {f"fb_{at}": reason for at, reason in enumerate(Drop)}
    text = render_diff(diff(compiled=Compiled(drops=drops)), {})
    assert all(reason.value.replace("_", "\\_") in text for reason in Drop)
