"""Any OpenAI-compatible server as an engine: the version's name is the model it is asked for.

The server must already offer the version under that name (vLLM with LoRA modules, another
gateway); getting it there is deployment's work. Answers are passed on as they come.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import httpx

from perennial.infra.errors import (
    InputError,
    ModelMissingError,
    NotFoundError,
    PerennialError,
    UnavailableError,
)
from perennial.serving.engine import (
    BASE,
    AdapterRef,
    Answer,
    ChatRequest,
    Delta,
    EngineHealth,
    Finish,
    FinishReason,
    collect,
)

# Others, 401 among them, are this installation's trouble and not the caller's.
_STATUSES: dict[int, type[PerennialError]] = {
    400: InputError,
    404: NotFoundError,
    422: InputError,
}


class OpenAIUpstream:
    """The `Engine` over `base_url` (ends in /v1). `base_model` is the server's name for the base.

    `limit` bounds the requests under way; more are refused at once.
    """

    def __init__(
        self,
        base_url: str,
        *,
        base_model: str,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        limit: int = 64,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(timeout_s, connect=5.0)
        url = base_url.rstrip("/")
        limits = httpx.Limits(max_connections=limit)
        self._client = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout, limits=limits
        )
        self._probe = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self._base_model = base_model
        self._limit = limit
        self._known: set[str] = set()
        self._num_running = 0

    def ensure_loaded(self, adapter: AdapterRef) -> None:
        """Return when the server offers the version; see `Engine`."""
        model = self._model_of(adapter)
        with _named_errors():
            response = self._probe.get("/models")
            _raise_for(response.status_code, response.content)
            offered = {entry["id"] for entry in response.json()["data"]}
        if model not in offered:
            raise ModelMissingError(f"{self._probe.base_url} does not offer {model!r}")
        self._known.add(adapter.name)

    def unload(self, name: str) -> None:
        """Forget the name; the server keeps what it keeps."""
        self._known.discard(name)

    async def chat(self, request: ChatRequest, adapter: AdapterRef = BASE) -> Answer:
        """See `Engine`."""
        async with aclosing(self.stream(request, adapter)) as deltas:
            return await collect(deltas)

    async def stream(
        self, request: ChatRequest, adapter: AdapterRef = BASE
    ) -> AsyncGenerator[Delta, None]:
        """See `Engine`."""
        if self._num_running >= self._limit:
            raise UnavailableError(f"{self._limit} requests are under way; try again in a moment")
        self._num_running += 1
        body = _request_body(request, self._model_of(adapter))
        try:
            with _named_errors():
                async with self._client.stream("POST", "/chat/completions", json=body) as response:
                    if response.status_code != 200:
                        _raise_for(response.status_code, await response.aread())
                    async for delta in _deltas(_lines(response.aiter_text())):
                        yield delta
        finally:
            self._num_running -= 1

    def health(self) -> EngineHealth:
        """See `Engine`; whether the server answers is seen by the requests."""
        return EngineHealth(
            is_ready=not self._client.is_closed,
            loaded=tuple(sorted(self._known)),
            num_running=self._num_running,
            num_waiting=0,
            max_waiting=self._limit,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        self._probe.close()
        await self._client.aclose()

    def _model_of(self, adapter: AdapterRef) -> str:
        return self._base_model if adapter.name == BASE.name else adapter.name


def _request_body(request: ChatRequest, model: str) -> dict[str, Any]:  # Any: JSON
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": m.role, "content": m.content} for m in request.messages],
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    optional = {"max_tokens": request.max_tokens, "seed": request.seed, "stop": request.stop}
    return body | {key: value for key, value in optional.items() if value not in (None, ())}


async def _lines(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """What line feeds end; httpx's own also cuts at U+2028, which JSON holds unescaped."""
    rest = ""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield line
    yield rest


async def _deltas(lines: AsyncIterator[str]) -> AsyncIterator[Delta]:
    reason: FinishReason | None = None
    usage: dict[str, int] = {}
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            raise UnavailableError(f"the upstream failed: {event['error'].get('message')}")
        usage = event.get("usage") or usage
        for choice in event.get("choices", [])[:1]:
            if text := choice["delta"].get("content"):
                yield Delta(text=text)
            if choice.get("finish_reason"):
                reason = "length" if choice["finish_reason"] == "length" else "stop"
    if reason is None:
        raise UnavailableError("the upstream ended its answer half-way")
    finish = Finish(
        reason=reason,
        num_prompt_tokens=usage.get("prompt_tokens", 0),
        num_completion_tokens=usage.get("completion_tokens", 0),
    )
    yield Delta(text="", finish=finish)


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise UnavailableError(f"the upstream does not answer: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UnavailableError(f"the upstream answers in another format: {error!r}") from error


def _raise_for(status: int, body: bytes) -> None:
    if status < 400:
        return
    text = body[:300].decode(errors="replace")
    kind = _STATUSES.get(status, UnavailableError)
    raise kind(f"the upstream answered {status}: {text}")
