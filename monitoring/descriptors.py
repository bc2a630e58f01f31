"""Numbers that describe one prompt and its answer, computed from the text alone.

Nothing here downloads a corpus or a model. The tokens made here are the ones that `drift` counts.
Comparing windows is left to `drift` and `report`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Scripts written without spaces: one character is one token, or a sentence would be one word.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_REFUSAL = re.compile(
    r"\b(i(?:'m| am) (?:sorry|unable|not able)|i (?:can(?:'t|not)|do(?:n't| not)|won't) "
    r"(?:help|assist|answer|provide|know|have)|as an ai\b|i apologi[sz]e)",
    re.IGNORECASE,
)
_REPEAT_SPAN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Descriptors:
    """What one interaction looks like.

    Attributes:
        prompt_digit_share: digits among the characters of the prompt, 0 to 1.
        prompt_new_word_share: words of the prompt that the reference does not know, 0 to 1; None
            without a reference.
        answer_repeat_share: three-word spans of the answer that occurred in it before, 0 to 1; a
            model that has collapsed into a loop comes near 1.
        is_refusal: whether the answer declines or apologises in English.
    """

    num_prompt_chars: int
    num_prompt_words: int
    num_answer_chars: int
    num_answer_words: int
    prompt_digit_share: float
    prompt_new_word_share: float | None
    answer_repeat_share: float
    is_refusal: bool


def tokens(text: str) -> list[str]:
    """The words of `text`, folded in case and width; `"The ＣＡＲＤ"` → `["the", "card"]`."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def document_counts(texts: Iterable[str]) -> Counter[str]:
    """In how many of `texts` each word occurs."""
    return Counter(word for text in texts for word in set(tokens(text)))


def describe(
    prompt: str, answer: str, *, reference: Mapping[str, int] | None, num_own: int = 0
) -> Descriptors:
    """The descriptors of one interaction.

    Args:
        prompt: what the user asked.
        answer: what the model said.
        reference: document counts of the reference prompts, or None when there are none.
        num_own: 1 when this prompt is itself counted in `reference`, else 0. Without it every
            reference row would know all of its own words, and every new window would look new.
    """
    asked, said = tokens(prompt), tokens(answer)
    return Descriptors(
        num_prompt_chars=len(prompt),
        num_prompt_words=len(asked),
        num_answer_chars=len(answer),
        num_answer_words=len(said),
        prompt_digit_share=_share(sum(c.isdigit() for c in prompt), len(prompt)),
        prompt_new_word_share=(
            None if reference is None else new_word_share(asked, reference, num_own=num_own)
        ),
        answer_repeat_share=_repeat_share(said),
        is_refusal=is_refusal(answer),
    )


def new_word_share(words: Sequence[str], reference: Mapping[str, int], *, num_own: int) -> float:
    """The share of `words` that no other reference text holds, 0 to 1."""
    return _share(sum(reference.get(word, 0) <= num_own for word in words), len(words))


def is_refusal(answer: str) -> bool:
    """Whether the answer declines or apologises, by English markers in its first 200 characters."""
    return _REFUSAL.search(answer[:200].replace("’", "'")) is not None


def _repeat_share(words: Sequence[str]) -> float:
    spans = [tuple(words[i : i + _REPEAT_SPAN]) for i in range(len(words) - _REPEAT_SPAN + 1)]
    return _share(len(spans) - len(set(spans)), len(spans))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
