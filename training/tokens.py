"""A conversation as token ids, and which of them are trained on.

Contents are encoded with special tokens disabled, so a user who types "<|im_end|>" sends letters
and cannot forge a turn. Only the template's own text may become special tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perennial.infra.errors import InputError, TooLargeError
from perennial.training.examples import Example, Judgement, Turn

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """ids_T = prompt then completion; positions num_prompt-1 … T-2 predict the completion.

    question: the positions of the last message's content.
    """

    id: str
    ids_T: Ids
    num_prompt: int
    question: range = range(0)

    @property
    def num_tokens(self) -> int:
        """Prompt and completion together."""
        return len(self.ids_T)

    @property
    def prompt(self) -> list[int]:
        """The ids that the completion follows."""
        ids: list[int] = self.ids_T[: self.num_prompt].tolist()
        return ids

    @property
    def label_mask_T(self) -> NDArray[np.bool_]:
        """True where the token belongs to the completion, so is a label."""
        return np.arange(len(self.ids_T)) >= self.num_prompt


def encode_prompt(tokenizer: Any, messages: Sequence[Turn]) -> list[int]:  # Any: transformers
    """Ids of the rendered chat up to where the assistant starts to speak."""
    return _encode_chat(tokenizer, messages)[0]


def _encode_chat(
    tokenizer: Any,  # Any: transformers
    messages: Sequence[Turn],
) -> tuple[list[int], range]:
    """Ids of the prompt, and where in them the last message's content lies."""
    marks = [_mark(index) for index in range(len(messages))]
    chat = [
        {"role": role, "content": mark} for (role, _), mark in zip(messages, marks, strict=True)
    ]
    rendered: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = []
    question = range(0)
    for mark, (_, content) in zip(marks, messages, strict=True):
        before, found, rendered = rendered.partition(mark)
        if not found:
            raise InputError("the chat template drops a message; check the order of the roles")
        ids += _encode_template(tokenizer, before)
        part = encode_text(tokenizer, content)
        question = range(len(ids), len(ids) + len(part))
        ids += part
    return ids + _encode_template(tokenizer, rendered), question


def open_user_turn(tokenizer: Any) -> tuple[list[int], int]:  # Any: transformers
    """Ids of a chat up to where the user starts to speak, and the id that ends what they say."""
    chat = [{"role": "user", "content": _mark(0)}]
    rendered: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, found, after = rendered.partition(_mark(0))
    if not before or not found or not after:
        raise InputError("the chat template does not mark where a user's turn begins and ends")
    return _encode_template(tokenizer, before), _encode_template(tokenizer, after)[0]


def encode_text(tokenizer: Any, text: str) -> list[int]:  # Any: transformers
    """Ids of plain text; what looks like a special token becomes letters."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_example(
    tokenizer: Any,  # Any: transformers
    example: Example | Judgement,
    max_len: int,
) -> TokenRow:
    """The row as the model sees it in service, ending with the end-of-turn token.

    Raises:
        TooLargeError: the row is longer than `max_len` tokens.
    """
    return encode_answer(tokenizer, example.id, example.messages, example.completion, max_len)


def encode_answer(
    tokenizer: Any,  # Any: transformers
    row_id: str,
    messages: Sequence[Turn],
    answer: str,
    max_len: int,
) -> TokenRow:
    """Any answer to a conversation; as in `encode_example`."""
    prompt, question = _encode_chat(tokenizer, messages)
    completion = [*encode_text(tokenizer, answer), int(tokenizer.eos_token_id)]
    if len(prompt) + len(completion) > max_len:
        raise TooLargeError(
            f"row {row_id} has {len(prompt) + len(completion)} tokens, more than "
            f"max_len {max_len}; raise max_len or shorten it",
            id=row_id,
            num_tokens=len(prompt) + len(completion),
        )
    ids = np.array(prompt + completion, dtype=np.int64)
    return TokenRow(id=row_id, ids_T=ids, num_prompt=len(prompt), question=question)


def _encode_template(tokenizer: Any, text: str) -> list[int]:  # Any: transformers
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False) if text else []
    return ids


def _mark(index: int) -> str:
    # Private-use characters: a template's own text has none, so no mark is found before its place.
    return f"\ue000{index}\ue001"
