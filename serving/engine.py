"""What the gateway needs of a model runtime, and the values that cross that border.

The runtimes live in `embedded` and `openai_upstream`; which version answers is `watcher`'s matter.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from perennial.infra.errors import InputError

ChatRole = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatMessage:
    """One turn of a conversation; the text is data and never read for control tokens."""

    role: ChatRole
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """What to answer and how. Temperature 0 is greedy; `max_tokens` None is the engine's default.

    A request for more tokens than the engine allows is cut there and finishes with `length`.
    """

    messages: tuple[ChatMessage, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.messages:
            raise InputError("messages must hold at least one message")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= 2:
            raise InputError(f"temperature must be within 0 and 2, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not all(self.stop):
            raise InputError("a stop text must not be empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRef:
    """A model version by its immutable name; embedded engines load it by folder and digest.

    `digest` is that of the folder's manifest. A name is never reused for other weights.
    """

    name: str
    path: Path | None = None
    digest: str | None = None


BASE = AdapterRef(name="base")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """Why an answer ended and what it took; the end-of-turn token is not counted."""

    reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """The next piece of an answer; the last one carries `finish`."""

    text: str
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    finish: Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineHealth:
    """A glance at a runtime: whether it can answer, what is loaded, how full it is."""

    is_ready: bool
    loaded: tuple[str, ...]
    num_running: int
    num_waiting: int
    max_waiting: int


class Engine(Protocol):
    """A model runtime. `ensure_loaded` and `unload` block; call them off the event loop."""

    def ensure_loaded(self, adapter: AdapterRef) -> None:
        """Return once `adapter` answers; repeated calls cost nothing.

        Raises:
            IntegrityError: the files are not those of the digest.
            ModelMissingError: there are no such files.
            ConflictError: the name is loaded with another digest.
            UnavailableError: the runtime cannot load now.
        """

    def unload(self, name: str) -> None:
        """Forget an adapter that no request uses; an unknown name is no error."""

    async def chat(self, request: ChatRequest, adapter: AdapterRef = BASE) -> Answer:
        """The whole answer; errors as `stream`."""

    def stream(
        self, request: ChatRequest, adapter: AdapterRef = BASE
    ) -> AsyncGenerator[Delta, None]:
        """The answer piece by piece; closing the generator cancels the request.

        Raises:
            InputError: the conversation does not fit the model's context or template.
            NotFoundError: the adapter is not loaded.
            UnavailableError: the queue is full or the runtime is down.
        """

    def health(self) -> EngineHealth:
        """How the runtime is, without waiting for it."""


async def collect(deltas: AsyncIterator[Delta]) -> Answer:
    """The whole answer of a stream that runs to its end."""
    pieces = []
    async for delta in deltas:
        pieces.append(delta.text)
        if delta.finish is not None:
            return Answer(text="".join(pieces), finish=delta.finish)
    raise AssertionError("a stream ended without a finish")
