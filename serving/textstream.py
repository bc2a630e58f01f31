"""Tokens → text that may be shown, one token at a time.

Holds back bytes that do not yet make a character and text that may turn into a stop text, so
that the pieces shown add up to the final answer. Knows nothing of models.
"""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what decoders show for a character whose bytes are not all there yet


class TextStream:
    """The text of one growing answer, ended by the first of `stop`."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._context = 0  # ids before this are not decoded again
        self._shown = 0  # ids before this are already in text
        self._held = ""
        self._is_stopped = False

    def has_stopped(self) -> bool:
        """Whether a stop text was reached; all later text is dropped."""
        return self._is_stopped

    def push(self, token_id: int) -> str:
        """The text that became certain by this token, often one word, sometimes nothing."""
        self._ids.append(token_id)
        return self._filter(self._new_text(is_last=False), is_last=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return self._filter(self._new_text(is_last=True), is_last=True)

    def _new_text(self, *, is_last: bool) -> str:
        # Decoding from one piece earlier keeps the spaces that decoders drop at a start.
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not is_last):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _filter(self, text: str, *, is_last: bool) -> str:
        if self._is_stopped:
            return ""
        self._held += text
        cut = min((i for s in self._stop if (i := self._held.find(s)) >= 0), default=-1)
        if cut >= 0:
            self._is_stopped = True
            return self._held[:cut]
        keep = 0 if is_last else _overlap(self._held, self._stop)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return ready


def _overlap(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a stop text."""
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0
