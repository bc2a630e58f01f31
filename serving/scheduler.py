"""One thread that owns a model and answers many requests together.

Requests wait in one bounded queue, first come first served. Those of the same version are decoded
together and join between two tokens; a request of another version waits until the running ones
are done, which `max_tokens` bounds. Loading happens between two tokens as well. The arithmetic is
the decoder's (`embedded`); this module imports no model library.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from perennial.infra.errors import ConfigError, InputError, PerennialError, UnavailableError
from perennial.serving.engine import (
    BASE,
    AdapterRef,
    Answer,
    ChatMessage,
    ChatRequest,
    Delta,
    EngineHealth,
    Finish,
    FinishReason,
    collect,
)
from perennial.serving.textstream import TextStream

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much one engine takes on. Tokens are counted after the chat template."""

    max_batch: int = 8
    max_batch_tokens: int = 8192
    max_waiting: int = 64
    max_context_tokens: int = 2048
    max_answer_tokens: int = 512
    default_answer_tokens: int = 128

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowStart:
    """A request as the decoder sees it."""

    prompt_ids: tuple[int, ...]
    temperature: float
    top_p: float
    seed: int | None


class Decoder(Protocol):
    """One running batch of one adapter; all but `encode` and `text_of` on the owning thread."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters in memory."""

    def encode(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """The prompt of a conversation."""

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of answer tokens, control tokens left out."""

    def load(self, adapter: AdapterRef) -> None:
        """Load and try an adapter; a running batch goes on unharmed."""

    def unload(self, name: str) -> None:
        """Drop an adapter."""

    def admit(self, adapter: str, starts: Sequence[RowStart]) -> tuple[int, ...]:
        """Add rows at the end of the batch; their first tokens."""

    def step(self) -> tuple[int, ...]:
        """The next token of every row, in order."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    prompt_ids: tuple[int, ...]
    request: ChatRequest
    adapter: str
    max_tokens: int
    text: TextStream
    emit: Callable[[Delta | Exception], None]
    num_tokens: int = 0
    is_cancelled: bool = False

    @property
    def num_reserved(self) -> int:
        return len(self.prompt_ids) + self.max_tokens


class BatchingEngine:
    """The `Engine` over a `Decoder`. Starts its thread at once; `close` ends it."""

    def __init__(self, decoder: Decoder, limits: Limits) -> None:
        self._decoder = decoder
        self._limits = limits
        self._changed = threading.Condition()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="serving-engine", daemon=True)
        self._thread.start()

    def ensure_loaded(self, adapter: AdapterRef) -> None:
        """See `Engine`."""
        if adapter.name != BASE.name:
            self._command(lambda: self._decoder.load(adapter))

    def unload(self, name: str) -> None:
        """See `Engine`."""
        self._command(lambda: self._decoder.unload(name))

    async def chat(self, request: ChatRequest, adapter: AdapterRef = BASE) -> Answer:
        """See `Engine`."""
        async with aclosing(self.stream(request, adapter)) as deltas:
            return await collect(deltas)

    async def stream(
        self, request: ChatRequest, adapter: AdapterRef = BASE
    ) -> AsyncGenerator[Delta, None]:
        """See `Engine`."""
        prompt_ids = await asyncio.to_thread(self._decoder.encode, request.messages)
        inbox: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = _Job(
            prompt_ids=prompt_ids,
            request=request,
            adapter=adapter.name,
            max_tokens=self._answer_tokens(request, len(prompt_ids)),
            text=TextStream(self._decoder.text_of, request.stop),
            emit=lambda item: _deliver(loop, inbox, item),
        )
        self._enqueue(job)
        try:
            async for delta in _until_finished(inbox):
                yield delta
        finally:
            self._withdraw(job)

    def health(self) -> EngineHealth:
        """See `Engine`."""
        return EngineHealth(
            is_ready=self._thread.is_alive() and not self._is_closed,
            loaded=self._decoder.loaded,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            max_waiting=self._limits.max_waiting,
        )

    def close(self) -> None:
        """End the thread; whoever still waits gets `UnavailableError`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _answer_tokens(self, request: ChatRequest, num_prompt: int) -> int:
        room = self._limits.max_context_tokens - num_prompt
        if room < 1:
            raise InputError(
                f"the conversation has {num_prompt} tokens, at most "
                f"{self._limits.max_context_tokens - 1} fit; send fewer or shorter messages",
                reason="context_length_exceeded",
            )
        wanted = request.max_tokens or self._limits.default_answer_tokens
        return min(wanted, room, self._limits.max_answer_tokens)

    def _command(self, action: Callable[[], None]) -> None:
        done: Future[None] = Future()
        with self._changed:
            self._refuse_when_closed()
            self._commands.append((action, done))
            self._changed.notify()
        done.result()

    def _enqueue(self, job: _Job) -> None:
        with self._changed:
            self._refuse_when_closed()
            if len(self._waiting) >= self._limits.max_waiting:
                raise UnavailableError(
                    f"{len(self._waiting)} requests are waiting already; try again in a moment"
                )
            self._waiting.append(job)
            self._changed.notify()

    def _withdraw(self, job: _Job) -> None:
        with self._changed:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def _refuse_when_closed(self) -> None:
        if self._is_closed:
            raise UnavailableError("the engine is shutting down")

    # Below: the owning thread only.

    def _work(self) -> None:
        while self._wait_for_work():
            self._run_commands()
            try:
                self._admit()
                self._advance()
            except Exception as error:  # noqa: BLE001  # thread edge: the callers get the error
                _log.exception("a batch failed num_rows=%d", len(self._running))
                self._fail_running(error)
        self._fail_everything()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._is_closed or self._commands or self._waiting or self._running):
                self._changed.wait()
            return not self._is_closed

    def _run_commands(self) -> None:
        while self._commands:
            action, done = self._commands.popleft()
            try:
                action()
            except Exception as error:  # noqa: BLE001  # thread edge: raised again in the caller
                done.set_exception(error)
            else:
                done.set_result(None)

    def _admit(self) -> None:
        with self._changed:
            joining = take_joining(self._running, self._waiting, self._limits)
            first = len(self._running)
            self._running.extend(joining)
        if joining:
            starts = [_row_start(job) for job in joining]
            tokens = self._decoder.admit(joining[0].adapter, starts)
            self._push(range(first, len(self._running)), tokens)

    def _advance(self) -> None:
        if self._running:
            self._push(range(len(self._running)), self._decoder.step())

    def _push(self, rows: range, tokens: Sequence[int]) -> None:
        """Give each of `rows` its next token, then drop the rows that ended or were left."""
        ended = set()
        for row, token in zip(rows, tokens, strict=True):
            if self._push_one(self._running[row], token):
                ended.add(row)
        if ended:
            stay = [i for i in range(len(self._running)) if i not in ended]
            self._decoder.keep(stay)
            self._running = [self._running[i] for i in stay]

    def _push_one(self, job: _Job, token: int) -> bool:
        if job.is_cancelled:
            return True
        if token in self._decoder.end_ids:
            self._finish(job, job.text.finish(), "stop")
            return True
        job.num_tokens += 1
        text = job.text.push(token)
        if job.text.has_stopped():
            self._finish(job, text, "stop")
        elif job.num_tokens >= job.max_tokens:
            rest = job.text.finish()
            self._finish(job, text + rest, "stop" if job.text.has_stopped() else "length")
        else:
            if text:
                job.emit(Delta(text=text))
            return False
        return True

    def _finish(self, job: _Job, text: str, reason: FinishReason) -> None:
        finish = Finish(
            reason=reason,
            num_prompt_tokens=len(job.prompt_ids),
            num_completion_tokens=job.num_tokens,
        )
        job.emit(Delta(text=text, finish=finish))

    def _fail_running(self, cause: Exception) -> None:
        failure: Exception = UnavailableError("the model failed on this batch; try again")
        failure.__cause__ = cause
        failure = cause if isinstance(cause, PerennialError) else failure
        for job in self._running:
            job.emit(failure)
        self._running = []
        self._decoder.keep([])

    def _fail_everything(self) -> None:
        closing = UnavailableError("the engine is shutting down")
        with self._changed:
            for job in (*self._running, *self._waiting):
                job.emit(closing)
            self._running = []
            self._waiting.clear()
            while self._commands:
                self._commands.popleft()[1].set_exception(closing)


def take_joining(running: Sequence[_Job], waiting: deque[_Job], limits: Limits) -> list[_Job]:
    """Remove and return the head of `waiting` that fits beside `running`.

    Only the head may join: whoever came first is never overtaken. All rows are as wide as the
    widest, so `max_batch_tokens` bounds rows x widest; a lone request always fits.
    """
    joining: list[_Job] = []
    while waiting and len(running) + len(joining) < limits.max_batch:
        together = [*running, *joining, waiting[0]]
        widest = max(job.num_reserved for job in together)
        is_same = waiting[0].adapter == together[0].adapter
        if len(together) > 1 and (not is_same or widest * len(together) > limits.max_batch_tokens):
            break
        joining.append(waiting.popleft())
    return joining


def _row_start(job: _Job) -> RowStart:
    request = job.request
    return RowStart(
        prompt_ids=job.prompt_ids,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
    )


def _deliver(
    loop: asyncio.AbstractEventLoop,
    inbox: asyncio.Queue[Delta | Exception],
    item: Delta | Exception,
) -> None:
    if not loop.is_closed():
        try:
            loop.call_soon_threadsafe(inbox.put_nowait, item)
        except RuntimeError:  # the loop closed in between: nobody listens any more
            _log.info("an answer was dropped because its event loop closed")


async def _until_finished(inbox: asyncio.Queue[Delta | Exception]) -> AsyncIterator[Delta]:
    while True:
        item = await inbox.get()
        if isinstance(item, Exception):
            raise item
        yield item
        if item.finish is not None:
            return
