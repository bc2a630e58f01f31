"""Writes a stream of five rounds that no model can know: 64 train and 32 test rows each.

    python tests/bench/streams/made.py DIR [--seed 0]

01-format: a message becomes a ticket in JSON. 02-facts: how an invented company works. 03-override:
half of what it says is new, the other half changes facts of 02; their test rows `forbid` the old
answers. 04-codes: arbitrary codes of topics. 05-normalise: dates and ids in one form. Facts that
change are not among the test rows of 02. No test prompt is a train prompt.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NUM_TRAIN, NUM_TEST = 64, 32
Row = dict[str, Any]


class Split(NamedTuple):
    train: list[Row]
    test: list[Row]


class Kind(NamedTuple):
    """A kind of fact: how it is said, asked while learning, asked in the test, and its values."""

    says: str
    taught: tuple[str, ...]
    asked: tuple[str, ...]
    values: Callable[[random.Random], str]


class Fact(NamedTuple):
    kind: Kind
    name: str
    value: str


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the made stream.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_stream(arguments.folder, arguments.seed)


def write_stream(folder: Path, seed: int) -> None:
    """The five tasks as files of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in stream(seed).items():
        for part, rows in (("train", split.train), ("test", split.test)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.{part}.jsonl").write_text(text, encoding="utf-8")


def stream(seed: int) -> dict[str, Split]:
    """The tasks by name; the same for the same seed."""
    source = random.Random(seed)
    names = _names(source, 24)
    facts = _facts(names[:16], source)
    changed = [Fact(old.kind, old.name, _other(old, source)) for old in facts[:8]]
    old_values = [fact.value for fact in facts[:8]]
    added = _facts(names[16:], source)
    return {
        "01-format": _format(source),
        "02-facts": Split(
            [row for fact in facts for row in _taught(fact)],
            [row for fact in facts[8:] for row in _asked(fact, 4)],
        ),
        "03-override": Split(
            [row for fact in (*changed, *added) for row in _taught(fact)],
            [
                *(
                    {**row, "forbid": [old]}
                    for fact, old in zip(changed, old_values, strict=True)
                    for row in _asked(fact, 3)
                ),
                *(row for fact in added for row in _asked(fact, 1)),
            ],
        ),
        "04-codes": _codes(source),
        "05-normalise": _normalise(source),
    }


def _row(instruction: str, given: str, output: str) -> Row:
    return {"instruction": instruction, "input": given, "outputs": [output]}


# facts

_DESK = "Answer the customer in one sentence."


def _clock(source: random.Random) -> str:
    return f"{source.randrange(15, 22)}:{source.randrange(1, 12) * 5:02}"


def _days(source: random.Random) -> str:
    return f"{source.randrange(11, 99)} days"


def _extension(source: random.Random) -> str:
    return f"{source.randrange(1000, 9999)}"


def _courier(source: random.Random) -> str:
    return f"{_word(source)} Freight"


KINDS = (
    Kind(
        "The {name} depot closes at {value}.",
        (
            "When does the {name} depot close?",
            "Until what time is the {name} depot open?",
            "What is the closing time of the {name} depot?",
            "I want to drop something at {name} this evening. How late can I come?",
        ),
        (
            "How late is {name} open?",
            "At what hour do you lock up the depot in {name}?",
            "Tell me when {name} shuts for the day.",
            "By when must I be at the {name} depot?",
        ),
        _clock,
    ),
    Kind(
        "You can return {name} goods within {value}.",
        (
            "How long may I return {name} goods?",
            "What is the return window for {name}?",
            "I bought something from {name}. Until when can I send it back?",
            "How many days do I have to return a {name} order?",
        ),
        (
            "Within what time can {name} things be sent back?",
            "I do not like my {name} order. How long can I still return it?",
            "Tell me the time limit for returns of {name}.",
            "What is the last day on which {name} takes goods back?",
        ),
        _days,
    ),
    Kind(
        "The extension of the {name} team is {value}.",
        (
            "What is the extension of the {name} team?",
            "Which number do I dial for {name}?",
            "How do I reach the {name} team by phone?",
            "Give me the phone extension of {name}.",
        ),
        (
            "I want to call {name}. What do I dial?",
            "Under which extension is {name} reached?",
            "Tell me the number of the {name} people.",
            "Which extension has {name}?",
        ),
        _extension,
    ),
    Kind(
        "{value} delivers in {name}.",
        (
            "Who delivers in {name}?",
            "Which courier do you use in {name}?",
            "Who brings my parcel if I live in {name}?",
            "What is the name of the courier for {name}?",
        ),
        (
            "Whose van comes to {name}?",
            "I live in {name}. Which company delivers here?",
            "Tell me who carries parcels to {name}.",
            "Parcels to {name} come with whom?",
        ),
        _courier,
    ),
)


def _facts(names: list[str], source: random.Random) -> list[Fact]:
    """One fact for each name, the kinds in turn."""
    kinds = [KINDS[index % len(KINDS)] for index in range(len(names))]
    return [Fact(kind, name, kind.values(source)) for kind, name in zip(kinds, names, strict=True)]


def _other(old: Fact, source: random.Random) -> str:
    while (value := old.kind.values(source)) == old.value:
        pass
    return value


def _taught(fact: Fact) -> list[Row]:
    answer = fact.kind.says.format(name=fact.name, value=fact.value)
    return [_row(_DESK, question.format(name=fact.name), answer) for question in fact.kind.taught]


def _asked(fact: Fact, num: int) -> list[Row]:
    return [_row(_DESK, ask.format(name=fact.name), fact.value) for ask in fact.kind.asked[:num]]


def _names(source: random.Random, num: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < num:
        found[_word(source)] = None
    return list(found)


def _word(source: random.Random) -> str:
    heads, tails = ("Bre", "Cal", "Dov", "Fen", "Gra", "Hol", "Jor", "Kes", "Lun", "Mar", "Nol",
                    "Pra", "Quo", "Ril", "Sto", "Tev", "Ulm", "Vor", "Wex", "Zan"), (
                    "bick", "dale", "fors", "gund", "lin", "mond", "nesk", "rova", "stad", "tow",
                    "vik", "wyn")  # fmt: skip
    return source.choice(heads) + source.choice(tails)


# format

_TICKET = "Turn the message into a ticket."
_FIRST = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida", "Jon", "Kim", "Leo", "Mia")
_PROBLEMS = {"is broken": "broken", "never came": "missing", "has the wrong size": "wrong size",
             "came twice": "double"}  # fmt: skip
_WISHES = {"I want my money back": "refund", "please send a new one": "replacement",
           "please call me": "call"}  # fmt: skip
_TRAIN_SAID = (
    "Hi, {name} here. My order {order} {problem}, {wish}.",
    "Order {order} {problem}. {wish}! Regards, {name}",
)
_TEST_SAID = (
    "Hello, it is {name}: what I ordered under {order} {problem}. So {wish}.",
    "My name is {name} and {order} {problem}; {wish}.",
)


def _format(source: random.Random) -> Split:
    def rows(said: tuple[str, ...], num: int) -> list[Row]:
        return [_ticket(said[index % len(said)], source) for index in range(num)]

    return Split(rows(_TRAIN_SAID, NUM_TRAIN), rows(_TEST_SAID, NUM_TEST))


def _ticket(said: str, source: random.Random) -> Row:
    name, order = source.choice(_FIRST), str(source.randrange(10_000, 99_999))
    problem, wish = source.choice(list(_PROBLEMS)), source.choice(list(_WISHES))
    message = said.format(name=name, order=order, problem=problem, wish=wish)
    fields = {"who": name, "order": order, "problem": _PROBLEMS[problem], "wish": _WISHES[wish]}
    return _row(_TICKET, message, json.dumps(fields))


# codes

_QUEUE = "Give the queue code of the message."
# Of each topic: eight wordings that are taught, and four that are asked.
_TOPICS = (
    (
        ("my card was charged twice", "I paid two times", "you took the money a second time",
         "there is a double charge on my statement", "the same amount left my account twice",
         "I see two identical payments", "why was I billed twice?",
         "one order, but I was charged for two"),
        ("there are two payments for one thing", "my bank shows the charge two times",
         "you charged me double", "I was made to pay twice for the same order"),
    ),
    (
        ("I forgot my password", "I cannot log in any more", "how do I reset my password?",
         "the login says that my password is wrong", "I need a new password",
         "my account is locked after too many tries", "signing in does not work",
         "I lost the password to my account"),
        ("the site does not accept my password", "I no longer know my password",
         "I am unable to sign in", "please let me set another password"),
    ),
    (
        ("where is my parcel?", "my package has not come yet", "when will my order arrive?",
         "the tracking has not moved for days", "I am still waiting for my delivery",
         "nothing was delivered so far", "has my order been shipped?",
         "the courier never showed up with my box"),
        ("the delivery is late", "my parcel should have been here last week",
         "I have been waiting for my package", "can you tell me where my delivery is?"),
    ),
    (
        ("please delete my account", "I want to leave you for good", "close my profile",
         "erase everything you know about me", "how do I cancel my membership?",
         "I no longer want an account here", "take my data off your servers",
         "unsubscribe me and delete my profile"),
        ("remove all my personal details", "I would like my account to be closed",
         "cancel my account, please", "delete whatever you have stored about me"),
    ),
    (
        ("the app closes by itself", "your app crashes all the time", "the app freezes on my phone",
         "since the update the app will not start", "the program shuts down without a word",
         "I get an error when the app loads", "the screen of the app stays black",
         "the app hangs and then quits"),
        ("the app stops when I open it", "your program keeps crashing",
         "the app does not start any more", "it crashes whenever I tap the icon of the app"),
    ),
    (
        ("can I get an invoice?", "send me the bill as a file", "I need a bill with my tax number",
         "where do I download the invoice?", "my accountant asks for a receipt",
         "please mail me the invoice again", "the invoice for last month is missing",
         "I want a receipt for this purchase"),
        ("I need a receipt for the tax office", "could you send the invoice as a PDF?",
         "I did not get a bill for my order", "please issue an invoice for my company"),
    ),
    (
        ("is this jacket in stock?", "do you still have it in blue?", "when is it available again?",
         "is size M sold out?", "how many pieces of it are left?",
         "will you restock these shoes?", "can I still buy the lamp from the catalogue?",
         "is the red one available?"),
        ("when can I buy it again?", "do you have this in stock in size L?",
         "are the shoes sold out for good?", "is the green jacket still available?"),
    ),
    (
        ("how do I change my address?", "I am moving house", "please update where I live",
         "my new flat is in another street", "I have a new postal code",
         "change the delivery address in my profile", "I moved to another city last week",
         "the house number you have is old"),
        ("my street in the profile is wrong", "we have moved, where do I enter the new address?",
         "I live somewhere else now", "please correct the address in my account"),
    ),
)  # fmt: skip


def _codes(source: random.Random) -> Split:
    letters = "BCDFGHJKLMNPQRSTVWXZ"
    found: dict[str, None] = {}
    while len(found) < len(_TOPICS):
        found["".join(source.choices(letters, k=2)) + str(source.randrange(10, 99))] = None
    pairs = list(zip(_TOPICS, found, strict=True))

    def rows(part: int) -> list[Row]:
        return [_row(_QUEUE, said, code) for parts, code in pairs for said in parts[part]]

    return Split(rows(0), rows(1))


# normalise

_NORMAL = "Write date and id in our form."
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
           "October", "November", "December")  # fmt: skip


def _normalise(source: random.Random) -> Split:
    found: dict[str, Row] = {}
    while len(found) < NUM_TRAIN + NUM_TEST:
        row = _dated(source)
        found[row["input"]] = row
    rows = list(found.values())
    return Split(rows[:NUM_TRAIN], rows[NUM_TRAIN:])


def _dated(source: random.Random) -> Row:
    day, month, year = (
        source.randrange(1, 29),
        source.randrange(1, 13),
        source.randrange(2019, 2031),
    )
    letters, digits = "".join(source.choices("abcdefghkmnp", k=2)), source.randrange(100, 999)
    date = source.choice((
        f"{day} {_MONTHS[month - 1]} {year}",
        f"{_MONTHS[month - 1]} {day}, {year}",
        f"{day}.{month}.{year}",
    ))  # fmt: skip
    id_ = source.choice(
        (f"{letters} {digits}", f"{letters.upper()}/{digits}", f"{digits}-{letters}")
    )
    given = f"id {id_} of {date}"
    return _row(_NORMAL, given, f"{year}-{month:02}-{day:02} {letters.upper()}-{digits}")


if __name__ == "__main__":
    main()
