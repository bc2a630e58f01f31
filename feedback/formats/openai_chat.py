"""OpenAI's fine-tuning files: chat examples (supervised) and preferences (DPO)."""

from typing import Any

import msgspec

from perennial.feedback.formats.chat import Json, answer_of, messages_of
from perennial.feedback.formats.lines import About, Lines, Verdict, feedback_lines, interaction_line
from perennial.infra.errors import InputError


class _Chat(msgspec.Struct):
    messages: list[dict[str, Any]]  # Any: JSON, read by `chat`


class _Preference(msgspec.Struct):
    input: _Chat
    preferred_output: list[dict[str, Any]]
    non_preferred_output: list[dict[str, Any]]


def from_openai_chat(row: Json, about: About) -> Lines:
    """An answered request with a demonstration, or a preference.

    The last message is the answer; it demonstrates nothing where its `weight` is 0.
    """
    if "preferred_output" in row:
        return _preference(msgspec.convert(row, _Preference), about)
    *asked, last = messages_of(msgspec.convert(row, _Chat).messages)
    if last["role"] != "assistant":
        raise InputError(f"the last message is by {last['role']!r}, not by the assistant")
    id = f"imp_{about.digest}"
    lines = [interaction_line(id, about, messages=asked, completion=last["content"])]
    if row["messages"][-1].get("weight") != 0:
        verdict = Verdict(key=f"{id}:0", target={"interaction_id": id}, kind="annotator")
        lines += feedback_lines(verdict, {"kind": "demonstration", "text": last["content"]})
    return lines


def _preference(row: _Preference, about: About) -> Lines:
    signal = {
        "kind": "preference",
        "chosen": answer_of(row.preferred_output),
        "rejected": answer_of(row.non_preferred_output),
    }
    target = {"task": about.task, "messages": messages_of(row.input.messages)}
    return feedback_lines(
        Verdict(key=f"imp_{about.digest}", target=target, kind="annotator"), signal
    )
