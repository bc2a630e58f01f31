"""No text makes redaction slow: the shape of the patterns, and time against length."""

import re
import time
from collections.abc import Iterator
from re import _constants, _parser  # type: ignore[attr-defined]  # the only view of a pattern's tree
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.feedback import pii
from perennial.feedback.redact import redact

PATTERNS = {name: value for name, value in vars(pii).items() if isinstance(value, re.Pattern)}
MAX_STEPS = 600  # that nested repeats can make from one start

# What each rule begins with, goes on with and fails on.
TEXT = """
    a @ . - _ : + ( ) [ ] 1 1. 1- +1 (1 a@ a. a@a. a@a.b a@b.co 4111 4111111111111111 0 012 00 é
    555-123- 555-123-4567 1.1.1.1 1.1.1.1. 2001: 2001:: 2001:db8::1 f: :: sk- sk-a ghp_ SG. xoxb-
    AKIA eyJ eyJaaaaaaaa. bearer DE89 de89aaaaaaaaaaaaaaaaaaaaaaaaa DE89370400440532013000 tel:
    0171/1234567 06.12.34. +49 a@x.x.x.x.x.x.x.x. \u200b ٣ [EMAIL] git@ order 2024-05-03
"""
PIECES = [
    *TEXT.split(),
    "1 ",
    "012 34 ",
    "4111 ",
    "00 1 ",
    "+49 30 1234567 ",
    "bearer aaaa ",
    "tel 1 ",
]


def repeats(node: Any, outer: int = 1) -> Iterator[tuple[int, bool]]:
    """(steps from one start, whether another start may read the same run again) of each repeat."""
    if isinstance(node, tuple) and str(node[0]).endswith("REPEAT"):
        op, (_, most, body) = node
        is_bounded = most != _constants.MAXREPEAT
        is_run = str(op) == "POSSESSIVE_REPEAT" and len(body) == 1 and not list(repeats(body))
        steps = outer * most if is_bounded else outer
        yield steps, not (is_bounded or is_run)
        yield from repeats(body, steps)
    elif isinstance(node, list | tuple | _parser.SubPattern):
        for part in node:
            yield from repeats(part, outer)


@pytest.mark.parametrize("name", PATTERNS)
def test_repeats_are_bounded_or_possessive_over_one_class(name: str) -> None:
    pattern = PATTERNS[name]
    found = list(repeats(_parser.parse(pattern.pattern, pattern.flags)))

    assert [steps for steps, is_open in found if is_open or steps > MAX_STEPS] == []


def test_the_check_of_repeats_sees_a_bad_pattern() -> None:
    for bad in [r"(a+)+b", r"(?:\w+\.)*x", r"[a-z]+@", r"(?:a|b{1,40}){1,40}", r"(?=x.*)"]:
        assert any(is_open or steps > MAX_STEPS for steps, is_open in repeats(_parser.parse(bad)))


def cpu_s(text: str) -> float:
    start = time.process_time()
    redact(text)
    return time.process_time() - start


def check_linear(piece: str, num_chars: int) -> None:
    """Sixteen times the length takes sixteen times as long; 256 times were it quadratic.

    One try of five is enough: a busy machine makes a run slower, never faster.
    """
    long = (piece * (num_chars // len(piece) + 1))[:num_chars]
    short = long[: num_chars // 16]

    assert any(cpu_s(long) < 64 * cpu_s(short) + 0.1 for _ in range(5))


@pytest.mark.parametrize("piece", PIECES)
def test_a_megabyte_takes_time_linear_in_its_length(piece: str) -> None:
    check_linear(piece, 1_000_000)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, " "]), min_size=1, max_size=5).map("".join))
def test_repeated_mixtures_take_time_linear_in_their_length(piece: str) -> None:
    check_linear(piece, 128_000)
