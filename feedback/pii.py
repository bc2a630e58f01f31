"""Where a text holds an e-mail address, a phone, card or bank number, an IP address or a secret.

Pure: rules and checksums, no model, so names and postal addresses are not found. What is done with
a hit is left to `redact`.

The rules read a plain copy of the text: ASCII digits, spaces and dashes, nothing invisible. Their
time is linear in its length: each repeat in a pattern is bounded, or possessive over one class of
characters that the place before the match may not hold, so that no run is read from two starts.
"""

import ipaddress
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """A hit: `text[start:end]` is of the class `label`."""

    start: int
    end: int
    label: str


def find_spans(text: str) -> list[Span]:
    """The hits of all rules, which may overlap; invisible characters within one belong to it."""
    if text.isascii():
        return _found(text)
    plain = _ODD.sub(lambda odd: _PLAIN[odd[0]], text)
    spans = _found(plain)
    if not spans or len(plain) == len(text):
        return spans
    places = [i for i, char in enumerate(text) if _PLAIN.get(char) != ""]
    return [Span(places[s.start], places[s.end - 1] + 1, s.label) for s in spans]


_INVISIBLE = (0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF)
_SPACES = (0xA0, *range(0x2000, 0x200B), 0x202F, 0x3000)
_DASHES = (*range(0x2010, 0x2014), 0x2212, 0xFF0D)
_ZEROS = (0x0660, 0x06F0, 0x0966, 0x09E6, 0xFF10)  # Arabic, Persian, Hindi, Bengali, full width
_PLAIN = {
    **dict.fromkeys(map(chr, _INVISIBLE), ""),
    **dict.fromkeys(map(chr, _SPACES), " "),
    **dict.fromkeys(map(chr, _DASHES), "-"),
    **{chr(zero + digit): str(digit) for zero in _ZEROS for digit in range(10)},
    **{"＋": "+", "．": ".", "＠": "@"},
}
_ODD = re.compile(f"[{''.join(_PLAIN)}]")


def _found(text: str) -> list[Span]:
    spans: list[Span] = []
    if "@" in text:
        spans += _hits(_EMAIL, text, _email)
    has_digit = _has_digit(text)
    if has_digit or "_" in text:  # a secret has one of them
        spans += _secrets(text)
    if has_digit:
        spans += _numbers(text)
    return spans


def _has_digit(text: str) -> bool:
    # One character is found ten times as fast as any of several.
    return (
        "1" in text or "2" in text or "0" in text or "3" in text or "4" in text
        or "5" in text or "6" in text or "7" in text or "8" in text or "9" in text
    )  # fmt: skip


def _secrets(text: str) -> Iterator[Span]:
    if "eyJ" in text:
        yield from _hits(_JWT, text, _jwt)
    if "earer " in text or "uthorization" in text:
        yield from _hits(_BEARER, text, _key)
    for last, prefixes in _PREFIXES.items():
        if last in text and any(prefix in text for prefix in prefixes):
            yield from _hits(_KEY, text, _key)
            return


def _numbers(text: str) -> Iterator[Span]:
    if "::" in text or text.count(":") >= 7:
        yield from _hits(_IPV6, text, _ipv6)
    number = None
    for number in _NUMBER.finditer(text):
        # Two characters more, so that a pattern sees what follows the number.
        start, end = number.start(), number.end() + 2
        if text.count(".", start, end) >= 3:
            yield from _hits(_IPV4, text, _ipv4, start, end)
        if end - start >= 16:
            yield from _hits(_CARD, text, _card, start, end)
        yield from _hits(_PHONE, text, _phone, start, end)
        called = _CALLED.match(text, start, end)
        if called and _is_introduced(called, _PHONE_WORDS):
            yield Span(*called.span(), "PHONE")
    if number:
        yield from _hits(_IBAN, text, _iban)


def _hits(
    pattern: re.Pattern[str],
    text: str,
    judge: Callable[[re.Match[str]], Span | None],
    at: int = 0,
    end: int = sys.maxsize,
) -> Iterator[Span]:
    """The matches that `judge` accepts, those within others too."""
    while match := pattern.search(text, at, end):
        if span := judge(match):
            yield span
        at = match.start() + 1


LABELS = ("EMAIL", "PHONE", "CARD", "IBAN", "IP", "API_KEY", "JWT")
# Where a number or a key may begin: not within a word, nor where one was before it was replaced.
_NO_PLACEHOLDER = "".join(rf"(?<!\[{label}\])" for label in LABELS)
_START = rf"(?<![A-Za-z0-9_])(?>(?<!\])|{_NO_PLACEHOLDER})"

_EMAIL = re.compile(
    r"@(?![0-9]x\.)(?:[A-Za-z0-9\u00c0-\u052f\-]{1,63}+\.){1,8}[A-Za-z\u00c0-\u052f]{2,63}+"
)
_LOCAL_PART = re.compile(r"[A-Za-z0-9\u00c0-\u052f._%+\-]{1,64}+")


def _email(match: re.Match[str]) -> Span | None:
    text, at = match.string, match.start()
    local = _LOCAL_PART.match(text[max(0, at - 64) : at][::-1])
    # git@github.com:owner/repository is nobody's address, nor is logo@2x.png, left out above.
    if not local or (local[0] == "tig" and text.startswith((":", "/"), match.end())):
        return None
    return Span(at - local.end(), match.end(), "EMAIL")


_KEYS = {
    "sk-": r"[\w-]{20,}+",  # OpenAI, Anthropic and others after them
    "sk_live_": r"\w{16,}+",  # Stripe
    "sk_test_": r"\w{16,}+",
    "rk_live_": r"\w{16,}+",
    "ghp_": r"\w{30,}+",  # GitHub
    "gho_": r"\w{30,}+",
    "ghu_": r"\w{30,}+",
    "ghs_": r"\w{30,}+",
    "ghr_": r"\w{30,}+",
    "github_pat_": r"\w{30,}+",
    "glpat-": r"[\w-]{20,}+",  # GitLab
    "xox": r"[abeoprs]-[\w-]{10,}+",  # Slack
    "AKIA": r"[0-9A-Z]{16}(?![\w-])",  # AWS
    "ASIA": r"[0-9A-Z]{16}(?![\w-])",
    "AIza": r"[\w-]{30,}+",  # Google
    "hf_": r"[A-Za-z0-9]{30,}+",  # Hugging Face
    "npm_": r"[A-Za-z0-9]{30,}+",
    "pypi-": r"[\w-]{50,}+",
    "SG.": r"[\w-]{16,}+\.[\w-]{16,}+",  # SendGrid
    "pnl_": r"[\w-]{20,}+",  # Perennial
}
_PREFIXES = {last: [key for key in _KEYS if key[-1] == last] for last in {k[-1] for k in _KEYS}}
_KEY = re.compile(
    rf"{_START}(?<!-)(?:{'|'.join(re.escape(k) + v for k, v in _KEYS.items())})", re.ASCII
)
_BEARER = re.compile(
    rf"{_START}(?i:bearer|authorization:[ ]?(?:basic|token))[ ]{{1,4}}([\w.~+/=-]{{16,}}+)",
    re.ASCII,
)
_JWT = re.compile(rf"{_START}(?<!-)eyJ[\w-]{{8,}}+\.[\w-]{{8,}}+(?:\.[\w-]*+){{1,3}}", re.ASCII)


def _jwt(match: re.Match[str]) -> Span:
    return Span(*match.span(), "JWT")


def _key(match: re.Match[str]) -> Span | None:
    # sk-estimator-doc-link is a class in a page: a key has digits or capitals.
    secret = match[match.lastindex or 0]
    is_word = secret.islower() and not any(map(str.isdigit, secret))
    return None if is_word else Span(*match.span(match.lastindex or 0), "API_KEY")


# A run of digits and what people write between them: each number rule looks within one.
_NUMBER = re.compile(r"[+(0-9][0-9 ().+/\-]{6,}+")

_IPV4 = re.compile(
    rf"""
    {_START} (?<!\.) (?<![A-Za-z\]]-) (?<![=<>~!]=)             # numpy-1.2.3.4, numpy==1.2.3.4
    [0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}}
    (?![A-Za-z0-9_]) (?!\.[0-9]) (?!-[A-Za-z\[])
    """,
    re.VERBOSE,
)
# Only what can be assigned: x[1::2] and a::b are addresses too, by the letter.
_IPV6 = re.compile(
    r"""
    [23fF](?<![A-Za-z0-9_:.][23fF])[0-9A-Fa-f]{3}
    (?:::?[0-9A-Fa-f]{1,4}){0,7}(?:::)?
    (?![A-Za-z0-9_\[]) (?!:[0-9A-Fa-f\[])
    """,
    re.VERBOSE,
)
_FREE = re.compile(_START)


def _ipv4(match: re.Match[str]) -> Span | None:
    parts = match[0].split(".")
    # 01.02.03.04 is a date, and 0.0.0.0, 127.0.0.1 and 255.255.255.0 are nobody's.
    is_address = all(str(int(part)) == part and int(part) < 256 for part in parts)
    is_nobodys = parts[0] in ("0", "127") or int(parts[0]) >= 240
    if not is_address or is_nobodys or _is_introduced(match, _OTHER_WORDS):
        return None
    return Span(*match.span(), "IP")


def _ipv6(match: re.Match[str]) -> Span | None:
    try:
        ipaddress.IPv6Address(match[0])
    except ValueError:
        return None
    return Span(*match.span(), "IP") if _FREE.match(match.string, match.start()) else None


_CARD = re.compile(
    rf"""
    {_START} (?<![0-9\]]\.)
    (?: [0-9]{{14,19}}
      | [0-9]{{4}}([ .\-])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{4}}
      | [0-9]{{4}}([ .\-])[0-9]{{6}}\2[0-9]{{4,5}}
    )
    (?![A-Za-z0-9_]) (?![.\-][0-9\[])
    """,
    re.VERBOSE,
)
# American Express, Diners, the sixteen-digit issuers, longer UnionPay.
_ISSUED = re.compile(r"3[47].{13}|3[0689].{12}|(?=4|2[2-7]|35|5[0-8]|6).{16}|62.{15,17}")


def _card(match: re.Match[str]) -> Span | None:
    digits = _digits(match)
    is_card = _ISSUED.fullmatch(digits) and _luhn(digits)
    return Span(*match.span(), "CARD") if is_card else None


def _luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    return sum(map(int, digits[-1::-2] + digits[-2::-2].translate(_DOUBLED))) % 10 == 0


_DOUBLED = str.maketrans("0123456789", "0246813579")  # 7 doubled is 14, whose digits make 5

# Looked for from the first digit, because most letters of a text are none of an IBAN.
_IBAN = re.compile(r"[0-9](?<=(?P<country>[A-Za-z]{2})[0-9])[0-9](?:[ \-]?[A-Za-z0-9]){11,30}")
_IBAN_START = re.compile(rf"{_START}(?<![A-Za-z0-9_\]]-)")  # …-de77-197cab457167 ends a UUID
# Characters in all, by country: the IBAN registry of SWIFT, release 97.
_IBAN_CHARS = {
    country: num_chars
    for num_chars, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FK FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}


def _iban(match: re.Match[str]) -> Span | None:
    num_chars = _IBAN_CHARS.get(match["country"].upper(), sys.maxsize)
    places = [i for i in range(match.start("country"), match.end()) if match.string[i] not in " -"]
    is_start = _IBAN_START.match(match.string, match.start("country"))
    if not is_start or len(places) < num_chars:
        return None
    end = places[num_chars - 1] + 1
    is_whole = not re.match("[A-Za-z0-9]", match.string[end : end + 1])
    iban = "".join(match.string[i] for i in places[:num_chars])
    is_iban = is_whole and _mod_97(iban) == 1
    return Span(match.start("country"), end, "IBAN") if is_iban else None


def _mod_97(iban: str) -> int:
    """1 when the check digits are right (ISO 13616, by ISO/IEC 7064)."""
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97


_DATE = r"""
    (?:[0-9]{4}-[0-9]{2}-[0-9]{2} | [0-9]{1,2}(?P<sep>[./\-])[0-9]{1,2}(?P=sep)[0-9]{2,4})
    (?![0-9./\-])
"""
_PHONE_END = r"(?= x[0-9] | [^A-Za-z0-9_] | \Z ) (?![.\-][0-9\[])"  # x12 is an extension
_PHONE = re.compile(
    rf"""
    {_START} (?<![A-Za-z0-9_\]][./\-])
    (?: (?:\+|00(?=[1-9][0-9]{{0,2}}[ (.\-/]))                                 # +49 (0)30 123-456
            [1-9](?:[ ().\-/]{{0,3}}[0-9]){{7,12}} (?<![ ./\-][0-9])
      | (?:1[ .\-])?\([2-9][0-9]{{2}}\)[ \-]?[0-9]{{3}}[ .\-][0-9]{{4}}          # (555) 123-4567
      | (?:1[ .\-])?[2-9][0-9]{{2}}[.\-][0-9]{{3}}[ .\-][0-9]{{4}}               # 555-123-4567
      | (?<![0-9\]][ ])(?:1[ ])?[2-9][0-9]{{2}}[ ][0-9]{{3}}[ ][0-9]{{4}}        # 555 123 4567,
            (?![ ][0-9\[])                                                     # in no row of others
      | \(0[1-9][0-9]{{0,3}}\)(?:[ /\-]{{0,3}}[0-9]){{5,8}} (?<![ /\-][0-9])     # (020) 7946 0958
      | (?!{_DATE}) 0[1-9](?=[0-9 /\-]{{0,12}}[0-9]{{3}})                        # 030 / 123 4567
            (?:[ /\-]{{0,3}}[0-9]){{7,9}} (?<![ /\-][0-9])
      | (?<![0-9\]][ ]) 0[1-9](?:[ .\-][0-9]{{2}}){{4}} (?![ ][0-9\[])           # 06 12 34 56 78
    )
    {_PHONE_END}
    """,
    re.VERBOSE,
)
# Any number that a word such as "phone" introduces.
_CALLED = re.compile(
    rf"{_START} (?!{_DATE}) \(?[0-9](?:[ ().\-/]{{0,2}}[0-9]){{6,14}} {_PHONE_END}", re.VERBOSE
)


def _words(words: str) -> re.Pattern[str]:
    """One of `words`, or some joined: phone_number, tel./fax."""
    return re.compile(rf"(?:{words})(?:[_./]{{1,2}}(?:{words}|number|no)){{0,2}}")


_PHONE_WORDS = _words(
    "phone|telephone|tel|mobile|cell|cellphone|call|dial|ring|fax|sms|whatsapp|telegram"
    "|telefon|mobil|handy|téléphone|portable|teléfono|móvil|celular|telefone"
)
_OTHER_WORDS = _words(
    "order|invoice|ticket|case|ref|reference|id|sku|part|serial|isbn|issn|doi|tracking"
    "|v|ver|version|release|build|section|chapter|article"
)
_FILLERS = re.compile("number|no|nr|is|at|on|me|us|him|her|them|my|our|or|to|the|back")
_BETWEEN_WORDS = " \t\n:#(\"'{.,=-"
_WORD = re.compile(r"[^\s:#(\"'{]++")  # a key is one word, whatever it ends with


def _phone(match: re.Match[str]) -> Span | None:
    # 0301234567 may be any number: without a space it needs a word.
    if match[0].isdigit() or _is_introduced(match, _OTHER_WORDS):
        return None
    return Span(*match.span(), "PHONE")


def _is_introduced(match: re.Match[str], words: re.Pattern[str]) -> bool:
    """Whether one of `words` stands before the match, fillers apart: "call me at"."""
    before = match.string[max(0, match.start() - 40) : match.start()].rstrip(_BETWEEN_WORDS)
    if not before[-1:].isalpha():  # most often another number
        return False
    for word in reversed(_WORD.findall(before.lower())):
        if not _FILLERS.fullmatch(word.rstrip(".,=-")):
            return words.fullmatch(word.rstrip(".,=-")) is not None
    return False


def _digits(match: re.Match[str]) -> str:
    return re.sub("[^0-9]", "", match[0])
