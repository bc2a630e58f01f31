"""Conversations in other people's JSON as our messages.

Pure. What a model cannot learn from as text (images, tool calls) is refused, never left out: a
conversation with a hole in it would teach the wrong thing.
"""

from typing import Any

from perennial.infra.errors import InputError

# Any: JSON that others made, here and below
Json = dict[str, Any]

_ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "function": "tool"}
_ANSWERERS = ("assistant", "ai", "model")
_TEXTS = ("text", "input_text", "output_text")
_THOUGHTS = ("reasoning", "thinking")


def messages_of(value: Any) -> list[Json]:
    """The conversation in a text, a message, a list of messages, or an object around one of them.

    An object with nothing but one text, such as `{"question": "…"}`, is what a user said.
    """
    match value:
        case str():
            return [{"role": "user", "content": value}]
        case {"role": _}:
            return [_message(value)]
        case {"messages": inner} | {"input": inner}:
            return messages_of(inner)
        case [_, *_]:
            return [_message(each) for each in value]
        case dict() if (only := _only_text(value)) is not None:
            return [{"role": "user", "content": only}]
    raise InputError("there is no conversation: messages, a message or a text is needed")


def answer_of(value: Any) -> str:
    """The text of an answer: a text, the assistant's message, or an object around one of them."""
    match value:
        case str():
            return value
        case {"choices": [{"message": message}, *_]}:
            return answer_of(message)
        case {"role": role} if role not in _ANSWERERS:
            raise InputError(f"the last message is by {role!r}, not by the assistant")
        case {"role": _} | {"content": _}:
            return _text_of_message(value)
        case {"messages": [*_, last]} | {"output": [*_, last]} | [*_, last]:
            return answer_of(last)
        case {"output": str(text)}:
            return text
        case dict() if (only := _only_text(value)) is not None:
            return only
    raise InputError("there is no answer: a text or the assistant's message is needed")


def text_of(content: object) -> str:
    """The text of a message's content: a text, or a list of parts that are all texts."""
    match content:
        case str():
            return content
        case [*parts]:
            return "\n".join(text for part in parts if (text := _text_of_part(part)) is not None)
    raise InputError("a message must be text: images and tool calls are not kept")


def _message(value: object) -> Json:
    if not isinstance(value, dict):
        raise InputError("a message must be an object with role and content")
    role = value.get("role", value.get("type"))
    if not isinstance(role, str):
        raise InputError("a message must name its role")
    return {"role": _ROLES.get(role, role), "content": _text_of_message(value)}


def _text_of_message(value: Json) -> str:
    if value.get("tool_calls") or value.get("function_call"):
        raise InputError("a message must be text: images and tool calls are not kept")
    return text_of(value["content"] if "content" in value else value.get("parts"))


def _text_of_part(part: object) -> str | None:
    match part:
        case str():
            return part
        case {"type": kind, "text": str(text)} | {"type": kind, "content": str(text)} if (
            kind in _TEXTS
        ):
            return text
        case {"type": kind} if kind in _THOUGHTS:
            return None
    raise InputError("a message must be text: images and tool calls are not kept")


def _only_text(value: Json) -> str | None:
    texts = list(value.values())
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else None
