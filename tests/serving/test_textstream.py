from hypothesis import given
from hypothesis import strategies as st

from perennial.serving.textstream import TextStream


def _bytes(ids):
    return bytes(ids).decode(errors="replace")


def _run(data: bytes, stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(_bytes, stop)
    shown = [stream.push(b) for b in data]
    return [*shown, stream.finish()]


@given(st.text(max_size=30))
def test_pieces_add_up_to_the_text_and_hold_no_broken_character(text):
    pieces = _run(text.encode())
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_still_add_up(data):
    assert "".join(_run(data)) == data.decode(errors="replace")


@given(st.text("abc", max_size=20), st.text("abc", min_size=1, max_size=3))
def test_text_ends_before_the_first_stop(text, stop):
    assert "".join(_run(text.encode(), (stop,))) == text.split(stop)[0]


def test_a_possible_stop_is_held_back_until_it_is_certain():
    assert _run(b"a\nUx", ("\nUser",)) == ["a", "", "", "\nUx", ""]
