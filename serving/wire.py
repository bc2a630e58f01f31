"""The OpenAI chat format, as far as it is spoken here: bytes → values, values → JSON.

Fields that OpenAI defines and that do not change what is returned are accepted and ignored; any
other unknown field is an error, so that a misspelt option is noticed. No HTTP and no effects.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from perennial.infra.errors import InputError, PerennialError
from perennial.serving.engine import ChatMessage, ChatRequest, ChatRole, Finish

_Json = dict[str, Any]  # Any: JSON
_MAX_NAME_CHARS = 256  # of what a record calls a name
_ILLEGIBLE = re.compile(r"[\x00\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCall:
    """A parsed request body."""

    task: str
    request: ChatRequest
    delivery: Literal["whole", "stream"]
    has_usage_chunk: bool
    subject: str | None
    session: str | None
    trace_id: str | None
    tags: Mapping[str, str]


def parse_chat_body(raw: bytes) -> ChatCall:
    """The call in `raw`.

    Raises:
        InputError: not JSON, a wrong type or value, an unknown field; names the field.
    """
    try:
        body = _Body.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{param or 'body'}: {first['msg']}", param=param or None) from None
    return body.to_call()


def legible(text: str) -> str:
    """`text` with U+FFFD for what no record can hold: NUL and lone surrogates."""
    return _ILLEGIBLE.sub("\ufffd", text)


def completion_body(
    id: str, task: str, version: str, created: int, text: str, end: Finish
) -> _Json:
    """A whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": end.reason, "logprobs": None}
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": task,
        "system_fingerprint": version,
        "choices": [choice],
        "usage": usage_body(end),
    }


def chunk_body(id: str, task: str, version: str, created: int, choices: list[_Json]) -> _Json:
    """One event of a streamed answer."""
    return {
        "id": id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": task,
        "system_fingerprint": version,
        "choices": choices,
    }


def choice_body(delta: _Json, finish_reason: str | None) -> _Json:
    """The only choice of a chunk."""
    return {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


def usage_body(end: Finish) -> _Json:
    """Token counts."""
    return {
        "prompt_tokens": end.num_prompt_tokens,
        "completion_tokens": end.num_completion_tokens,
        "total_tokens": end.num_prompt_tokens + end.num_completion_tokens,
    }


def model_body(task: str, version: str | None) -> _Json:
    """A task as an entry of /v1/models; `version` is what answers it now."""
    return {
        "id": task,
        "object": "model",
        "created": 0,
        "owned_by": "perennial",
        "version": version,
    }


def error_body(error: PerennialError, kind: str) -> _Json:
    """An error in OpenAI's shape."""
    code = error.fields.get("reason") or error.code
    param = error.fields.get("param")
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def event(body: _Json) -> bytes:
    """A server-sent event."""
    return (
        b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


DONE = b"data: [DONE]\n\n"


def _without_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain NUL")
    return text


_Text = Annotated[str, AfterValidator(_without_nul)]
_Name = Annotated[_Text, Field(min_length=1, max_length=_MAX_NAME_CHARS)]
_TagName = Annotated[_Text, Field(min_length=1, max_length=64)]
_Ignored = Any  # accepted because OpenAI defines it; never read


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: _Text


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[_Part]
    name: _Name | None = None
    refusal: None = None
    tool_calls: Annotated[list[_Ignored], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: _Ignored = None

    def to_message(self) -> ChatMessage:
        role: ChatRole = "system" if self.role == "developer" else self.role
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(p.text for p in parts)
        return ChatMessage(role=role, content=text)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: _Name
    messages: Annotated[list[_Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: _Name | Annotated[list[_Name], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: _Name | None = None
    metadata: (
        Annotated[
            dict[_TagName, Annotated[_Text, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    # OpenAI's, ignored here:
    audio: _Ignored = None
    frequency_penalty: _Ignored = None
    function_call: _Ignored = None
    functions: _Ignored = None
    logit_bias: _Ignored = None
    logprobs: _Ignored = None
    modalities: _Ignored = None
    moderation: _Ignored = None
    parallel_tool_calls: _Ignored = None
    prediction: _Ignored = None
    presence_penalty: _Ignored = None
    prompt_cache_key: _Ignored = None
    prompt_cache_options: _Ignored = None
    prompt_cache_retention: _Ignored = None
    reasoning_effort: _Ignored = None
    response_format: _Ignored = None
    safety_identifier: _Ignored = None
    service_tier: _Ignored = None
    store: _Ignored = None
    tool_choice: _Ignored = None
    tools: _Ignored = None
    top_logprobs: _Ignored = None
    verbosity: _Ignored = None
    web_search_options: _Ignored = None

    def to_call(self) -> ChatCall:
        tags = dict(self.metadata or {})
        options = self.stream_options
        return ChatCall(
            task=self.model,
            request=ChatRequest(
                messages=tuple(m.to_message() for m in self.messages),
                max_tokens=self.max_completion_tokens or self.max_tokens,
                temperature=self.temperature or 0.0,
                top_p=self.top_p or 1.0,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                seed=self.seed,
            ),
            delivery="stream" if self.stream else "whole",
            has_usage_chunk=bool(options and options.include_usage),
            subject=self.user,
            session=_pop_name(tags, "session"),
            trace_id=_pop_name(tags, "trace_id"),
            tags=tags,
        )


def _pop_name(tags: dict[str, str], key: str) -> str | None:
    """The name under `key`, taken out of `tags`; an empty one is none."""
    name = tags.pop(key, "")
    if len(name) > _MAX_NAME_CHARS:
        raise InputError(
            f"metadata.{key} must have at most {_MAX_NAME_CHARS} characters, got {len(name)}",
            param=f"metadata.{key}",
        )
    return name or None
