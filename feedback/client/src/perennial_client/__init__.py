"""Sends interactions and feedback to Perennial, once each, also when it is down.

`Client` and `AsyncClient` answer when the server has stored; `BackgroundSender` keeps on disk and
delivers later; `wrap` records the chat completions of an OpenAI client.
"""

from perennial_client.errors import (
    AccessError,
    ApiError,
    BusyError,
    ClientError,
    ConflictError,
    ItemTooLargeError,
    Problem,
    RefusedError,
    SenderClosedError,
    SpoolFullError,
    UnreachableError,
)
from perennial_client.http import AsyncClient, Client
from perennial_client.items import (
    Item,
    Message,
    Signal,
    Target,
    comment,
    correction,
    demonstration,
    feedback,
    implicit,
    inline,
    interaction,
    label,
    preference,
    score,
    thumb,
    trace,
)
from perennial_client.retry import Retry
from perennial_client.sender import BackgroundSender, Counts
from perennial_client.spool import Spooling
from perennial_client.wire import Receipt
from perennial_client.wrapper import interaction_id, wrap

__all__ = [
    "AccessError",
    "ApiError",
    "AsyncClient",
    "BackgroundSender",
    "BusyError",
    "Client",
    "ClientError",
    "ConflictError",
    "Counts",
    "Item",
    "ItemTooLargeError",
    "Message",
    "Problem",
    "Receipt",
    "RefusedError",
    "Retry",
    "SenderClosedError",
    "Signal",
    "SpoolFullError",
    "Spooling",
    "Target",
    "UnreachableError",
    "comment",
    "correction",
    "demonstration",
    "feedback",
    "implicit",
    "inline",
    "interaction",
    "interaction_id",
    "label",
    "preference",
    "score",
    "thumb",
    "trace",
    "wrap",
]
