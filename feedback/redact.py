"""What is personal or secret in a record, replaced by its class before anything is written.

`redact` is the built-in redactor, over the rules of `pii`; `presidio_redactor` knows national and
medical numbers too; `redact_interaction` and `redact_feedback` put a redactor to each free text of
a record. Ids, tasks, versions and the names of tags stay. Nothing here reads or writes.
"""

import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

from msgspec.structs import replace

from perennial.feedback.pii import Span, find_spans
from perennial.feedback.records import (
    MAX_NAME_CHARS,
    MAX_TAG_VALUE_CHARS,
    MAX_TEXT_CHARS,
    Comment,
    Correction,
    Demonstration,
    Feedback,
    Implicit,
    Interaction,
    Label,
    Message,
    Preference,
    Signal,
    Target,
)
from perennial.infra.errors import ConfigError

RecordT_co = TypeVar("RecordT_co", bound=Interaction | Feedback, covariant=True)


_NOTHING: Mapping[str, int] = MappingProxyType({})


class Redacted(NamedTuple):
    """A text without what was found in it, and how often each class was found."""

    text: str
    counts: Mapping[str, int] = _NOTHING


@dataclass(frozen=True, kw_only=True, slots=True)
class RedactedRecord(Generic[RecordT_co]):
    """A record without what was found in its texts, and how often each class was found."""

    record: RecordT_co
    counts: Mapping[str, int]


Redactor = Callable[[str], Redacted]


def redact(text: str) -> Redacted:
    """`text` with `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IBAN]`, `[IP]`, `[API_KEY]`, `[JWT]` for each.

    A second redaction changes nothing more.
    """
    spans = find_spans(text)
    return replace_spans(text, spans) if spans else Redacted(text=text)


def replace_spans(text: str, spans: Iterable[Span]) -> Redacted:
    """`text` with each span replaced; spans that overlap are one, named after the longest."""
    parts: list[str] = []
    counts: Counter[str] = Counter()
    at = 0
    for span in _joined(spans):
        parts += (text[at : span.start], f"[{span.label}]")
        counts[span.label] += 1
        at = span.end
    return Redacted(text="".join((*parts, text[at:])), counts=counts)


# Those of linear time whose shape is more than digits with a check digit, which every tenth order
# number has by chance. Presidio's own for e-mail asks the network.
_PRESIDIO = (
    "CryptoRecognizer",
    "DeSocialSecurityRecognizer",
    "EsNieRecognizer",
    "EsNifRecognizer",
    "FiPersonalIdentityCodeRecognizer",
    "ItFiscalCodeRecognizer",
    "MedicalLicenseRecognizer",
    "SgFinRecognizer",
    "UkNinoRecognizer",
    "UsItinRecognizer",
    "UsSsnRecognizer",
)
_PRESIDIO_SCORE = 0.5  # what a hit has by its shape alone; a right checksum makes it 1


def presidio_redactor() -> Redactor:
    """The built-in rules and Presidio's patterns for national and medical numbers, as `[US_SSN]`.

    It needs no language model and so finds no names.

    Raises:
        ConfigError: presidio-analyzer is not installed.
    """
    try:
        module = importlib.import_module("presidio_analyzer.predefined_recognizers")
    except ImportError as error:
        raise ConfigError(
            "the redaction engine presidio needs presidio-analyzer: "
            "pip install 'perennial-llm[presidio]'"
        ) from error
    recognizers = [getattr(module, name)() for name in _PRESIDIO]

    def apply(text: str) -> Redacted:
        spans = find_spans(text)
        for recognizer in recognizers:
            found = recognizer.analyze(text, recognizer.supported_entities)
            certain = (hit for hit in found if hit.score >= _PRESIDIO_SCORE)
            spans += [Span(hit.start, hit.end, hit.entity_type) for hit in certain]
        return replace_spans(text, spans) if spans else Redacted(text=text)

    return apply


def redact_interaction(item: Interaction, redactor: Redactor) -> RedactedRecord[Interaction]:
    """`item` with messages, completion and tag values redacted, and names of people replaced."""
    pen = _Pen(redactor, item.tenant)
    messages, completion = pen.messages(item.messages), pen.text(item.completion)
    subject, session, tags = pen.name(item.subject), pen.name(item.session), pen.tags(item.tags)
    if not pen.counts:
        return RedactedRecord(record=item, counts=pen.counts)
    record = replace(
        item,
        messages=messages,
        completion=completion,
        subject=subject,
        session=session,
        tags=tags,
    )
    return RedactedRecord(record=record, counts=pen.counts)


def redact_feedback(item: Feedback, redactor: Redactor) -> RedactedRecord[Feedback]:
    """`item` with signal, inline target and tag values redacted, and names of people replaced."""
    pen = _Pen(redactor, item.tenant)
    target, signal, tags = pen.target(item.target), pen.signal(item.signal), pen.tags(item.tags)
    source_id, subject = pen.name(item.source_id), pen.name(item.subject)
    if not pen.counts:
        return RedactedRecord(record=item, counts=pen.counts)
    record = replace(
        item, target=target, signal=signal, source_id=source_id, subject=subject, tags=tags
    )
    return RedactedRecord(record=record, counts=pen.counts)


Redact = Callable[[Interaction | Feedback], RedactedRecord[Interaction | Feedback]]


def redact_nothing(item: Interaction | Feedback) -> RedactedRecord[Interaction | Feedback]:
    """The record as it came."""
    return RedactedRecord(record=item, counts={})


def redact_for(off_for: Container[str], redactor: Redactor = redact) -> Redact:
    """Redacts the records of every tenant that is not in `off_for`."""

    def apply(item: Interaction | Feedback) -> RedactedRecord[Interaction | Feedback]:
        if item.tenant in off_for:
            return redact_nothing(item)
        if isinstance(item, Interaction):
            return redact_interaction(item, redactor)
        return redact_feedback(item, redactor)

    return apply


def pseudonym(tenant: str, name: str) -> str:
    """What stands for the subject, session or source `name` in which a rule hit.

    One person keeps one pseudonym within a tenant, so that caps, joins and erasure go on working;
    a class name would make one person of all. It is a plain hash: who knows the name can check it.
    """
    return "p_" + hashlib.sha256(f"{tenant}\0{name}".encode()).hexdigest()[:24]


class _Pen:
    """Applies a redactor to the parts of one record and adds up what it found."""

    def __init__(self, redactor: Redactor, tenant: str) -> None:
        self.counts: dict[str, int] = {}
        self._redactor = redactor
        self._tenant = tenant

    def text(self, value: str, max_chars: int = MAX_TEXT_CHARS) -> str:
        """`value` redacted; cut where placeholders make it longer than a record may hold."""
        redacted = self._redactor(value)
        if not redacted.counts:
            return value
        self._add(redacted.counts)
        return redacted.text[:max_chars]

    def name(self, value: str | None) -> str | None:
        if value is None or not (counts := self._redactor(value).counts):
            return value
        self._add(counts)
        return pseudonym(self._tenant, value)

    def _add(self, counts: Mapping[str, int]) -> None:
        for label, num in counts.items():
            self.counts[label] = self.counts.get(label, 0) + num

    def messages(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        texts = [self.text(message.content) for message in messages]
        return tuple(
            message if text == message.content else replace(message, content=text)
            for message, text in zip(messages, texts, strict=True)
        )

    def tags(self, tags: Mapping[str, str]) -> Mapping[str, str]:
        return {key: self.text(value, MAX_TAG_VALUE_CHARS) for key, value in tags.items()}

    def target(self, target: Target) -> Target:
        if not target.is_inline:
            return target
        completion = None if target.completion is None else self.text(target.completion)
        return replace(target, messages=self.messages(target.messages), completion=completion)

    def signal(self, signal: Signal) -> Signal:
        match signal:
            case Label(value=value):
                return Label(value=self.text(value, MAX_NAME_CHARS))
            case Correction(text=text) | Demonstration(text=text) | Comment(text=text):
                redacted = self.text(text)
                return signal if redacted is text else replace(signal, text=redacted)
            case Preference(chosen=chosen, rejected=rejected):
                return Preference(chosen=self.text(chosen), rejected=self.text(rejected))
            case Implicit(text=str() as text):
                return replace(signal, text=self.text(text))
            case _:
                return signal


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    joined: Span | None = None
    for span in sorted(spans, key=lambda s: s.start):
        if joined and span.start < joined.end:
            label = max(joined, span, key=lambda s: s.end - s.start).label
            joined = Span(joined.start, max(joined.end, span.end), label)
            continue
        if joined:
            yield joined
        joined = span
    if joined:
        yield joined
