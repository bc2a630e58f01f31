"""Conversation → prompt pieces, so that no message can forge a turn.

The model's own template is rendered with placeholders where the messages go. Only what the
template itself wrote may be read as control tokens; message text is always plain. Ordinary text
next to each other stays in one piece, so harmless messages are tokenised exactly as by the
usual way. Turning pieces into ids is left to the engine.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from perennial.infra.errors import InputError
from perennial.serving.engine import ChatMessage

Render = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of plain text, or exactly one control token of the template."""

    text: str
    is_control: bool


def split_prompt(
    messages: Sequence[ChatMessage], render: Render, controls: Sequence[str], nonce: str
) -> tuple[Piece, ...]:
    """The pieces of the rendered conversation, in order.

    `nonce` must be unguessable: it marks the places of the messages in the template.

    Raises:
        InputError: the template leaves a message out or shows it twice.
    """
    marks = {f"{nonce}x{i}x": m.content for i, m in enumerate(messages)}
    turns = [{"role": m.role, "content": k} for m, k in zip(messages, marks, strict=True)]
    rendered = render(turns)
    for mark in marks:
        if rendered.count(mark) != 1:
            raise InputError("the model's chat template cannot show this order of roles")
    return _merge(_parts(rendered, marks, controls))


def _parts(rendered: str, marks: Mapping[str, str], controls: Sequence[str]) -> list[Piece]:
    special = frozenset(controls)
    # Longest first: a control that begins with another must not be cut in two.
    names = sorted([*marks, *special], key=len, reverse=True)
    parts = re.split("(" + "|".join(re.escape(n) for n in names) + ")", rendered)
    return [Piece(text=marks.get(p, p), is_control=p in special) for p in parts if p]


def _merge(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    merged: list[Piece] = []
    for piece in pieces:
        if merged and not piece.is_control and not merged[-1].is_control:
            piece = Piece(text=merged.pop().text + piece.text, is_control=False)
        merged.append(piece)
    return tuple(p for p in merged if p.text)
