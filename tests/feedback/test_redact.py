import re
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from perennial.feedback.redact import redact

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
ALNUM = "aB3dE5gH7jK9mN1pQ4sT6vW8yZ0bC2fG5hJ"

FOUND = [
    # e-mail
    ("mail bob@example.com.", "mail [EMAIL]."),
    ("Bob.O-Neil+news_1@mail.example.co.uk, thanks", "[EMAIL], thanks"),
    ("<mailto:a@b.co>", "<mailto:[EMAIL]>"),
    ("josé.garcía@ejemplo.es", "[EMAIL]"),
    ("иван@почта.рф", "[EMAIL]"),
    ("info@bücher.example", "[EMAIL]"),
    ("我的邮箱是bob@example.com谢谢", "我的邮箱是[EMAIL]谢谢"),
    ("bob＠example.com", "[EMAIL]"),
    ('{"to":"bob@example.com","cc":"eve@example.org"}', '{"to":"[EMAIL]","cc":"[EMAIL]"}'),
    ("ftp://bob:pw@files.example.com/x", "ftp://bob:[EMAIL]/x"),
    ("write to git@example.com", "write to [EMAIL]"),
    ("bob@mail.id 555-123-4567", "[EMAIL] [PHONE]"),
    ("[2024-05-03]bob@example.com", "[2024-05-03][EMAIL]"),
    ("@bob@mastodon.social", "@[EMAIL]"),
    # phone
    ("+49 30 1234567", "[PHONE]"),
    ("+49 (0)30 123-4567 2 times", "[PHONE] 2 times"),
    ("+15551234567", "[PHONE]"),
    ("+1.555.123.4567!", "[PHONE]!"),
    ("0049 30 1234567", "[PHONE]"),
    ("(555) 123-4567", "[PHONE]"),
    ("555-123-4567x12", "[PHONE]x12"),
    ("1-800-555-0199,", "[PHONE],"),
    ("555.123.4567", "[PHONE]"),
    ("on 555 123 4567 today", "on [PHONE] today"),
    ("555‑123‑4567 (non-breaking hyphens)", "[PHONE] (non-breaking hyphens)"),
    ("06 12 34 56 78", "[PHONE]"),
    ("06.12.34.56.78", "[PHONE]"),
    ("020 7946 0958", "[PHONE]"),
    ("(020) 7946 0958", "[PHONE]"),
    ("Tel. 0171/1234567", "Tel. [PHONE]"),
    ("0412 345 678", "[PHONE]"),
    ("My phone number is 5551234567", "My phone number is [PHONE]"),
    ("call me at 98765 43210 please", "call me at [PHONE] please"),
    (
        '{"phone_number": 5551234567, "order_id": "0171-1234567"}',
        '{"phone_number": [PHONE], "order_id": "0171-1234567"}',
    ),
    ("Tel./Fax: 555-1234", "Tel./Fax: [PHONE]"),
    ('{"phone": "5551234567", "id": "5551234567"}', '{"phone": "[PHONE]", "id": "5551234567"}'),
    ("teléfono: 612 345 678", "teléfono: [PHONE]"),
    ("电话是+86 138 1234 5678吗", "电话是[PHONE]吗"),
    ("phone ٠١٢٣٤٥٦٧٨٩", "phone [PHONE]"),
    ("\u202a+972-50-123-4567\u202c", "\u202a[PHONE]\u202c"),
    # card
    ("4111 1111 1111 1111", "[CARD]"),
    ("card 4111111111111111, cvv 123", "card [CARD], cvv 123"),
    ("5555-5555-5555-4444", "[CARD]"),
    ("2223 0031 2200 3222", "[CARD]"),
    ("378282246310005", "[CARD]"),
    ("3782 822463 10005", "[CARD]"),
    ("3056 930902 5904", "[CARD]"),
    ("6011111111111117", "[CARD]"),
    ("3530111333300000", "[CARD]"),
    ("6205500000000000004", "[CARD]"),
    ("4111 1111 1111 1111 123", "[CARD] 123"),
    ("2 4111 1111 1111 1111", "2 [CARD]"),
    ("4000 1235 4111 1111 1111 1111", "4000 1235 [CARD]"),
    ("4000 1234 4111 1111 1111 1111", "[CARD]"),  # the first sixteen digits pass as well
    ("４１１１ １１１１ １１１１ １１１１", "[CARD]"),
    ("4111\u200b 1111 1111\u00a01111", "[CARD]"),
    # IBAN
    ("DE89 3704 0044 0532 0130 00 and", "[IBAN] and"),
    ("gb29nwbk60161331926819", "[IBAN]"),
    ("FR14 2004 1010 0505 0001 3M02 606", "[IBAN]"),
    ("IBAN:NO9386011117947.", "IBAN:[IBAN]."),
    ("MT84MALT011000012345MTLCAST001S", "[IBAN]"),
    ("BR97-0036-0305-0000-1000-9795-493P-1", "[IBAN]"),
    # IP
    ("from 203.0.113.7:8080", "from [IP]:8080"),
    ("10.0.0.1-10.0.0.5", "[IP]-[IP]"),
    ("192.168.0.0/24", "[IP]/24"),
    ("host=8.8.8.8;", "host=[IP];"),
    ("2001:db8::1: gone", "[IP]: gone"),
    ("[2001:0db8:85a3:0000:0000:8a2e:0370:7334]:443", "[[IP]]:443"),
    ("fe80::1ff:fe23:4567:890a%eth0", "[IP]%eth0"),
    # keys
    (f"key sk-{ALNUM}", "key [API_KEY]"),
    (f"OPENAI_API_KEY=sk-proj-{ALNUM}_x-{ALNUM}", "OPENAI_API_KEY=[API_KEY]"),
    (f"'sk-ant-api03-{ALNUM}'", "'[API_KEY]'"),
    (f"sk_live_{ALNUM}", "[API_KEY]"),
    (f"ghp_{ALNUM}x", "[API_KEY]"),
    (f"github_pat_{ALNUM}_{ALNUM}", "[API_KEY]"),
    (f"glpat-{ALNUM[:20]}", "[API_KEY]"),
    ("xoxb-" + "1234567890-1234567890-" + ALNUM[:24], "[API_KEY]"),
    ("AKIA" + "IOSFODNN7EXAMPLE", "[API_KEY]"),
    (f"AIza{ALNUM}", "[API_KEY]"),
    ("hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH", "[API_KEY]"),
    (f"pnl_0123456789abcdef_{ALNUM}-_{ALNUM[:8]}", "[API_KEY]"),
    (f"Authorization: Bearer {ALNUM}==", "Authorization: Bearer [API_KEY]"),
    ("authorization: Basic Ym9iOnMzY3IzdHBhc3M=", "authorization: Basic [API_KEY]"),
    (f"Bearer {JWT}", "Bearer [JWT]"),
    (f'{{"token":"{JWT}"}}', '{"token":"[JWT]"}'),
]

LEFT = [
    "Nothing here.",
    "order 4829103847",
    "order number 555-123-4567",
    "Invoice #0171/1234567",
    "Amazon order 114-3941689-8772232",
    "ticket 0123 456789",
    "ISBN 978-3-16-148410-0",
    "on 2024-05-03 10:20:30",
    "2024-05-03T10:20:30.123456Z",
    "03.05.2024 - 04.06.2024",
    "05/06/2024 1430",
    "call on 2024-05-03 10 pm",
    "call 03/05/2024",
    "1990-2000",
    "12:30:45",
    "10.5.2024",
    "version 1.2.3.4",
    "v1.2.3.4",
    "numpy==1.2.3.4",
    "package-1.2.3.4.tar.gz",
    "see section 3.1.2.4",
    "1.2.3",
    "1.2.3.4.5",
    "OID 1.3.6.1.4.1.311",
    "256.1.1.1",
    "01.02.03.04",
    "listen on 127.0.0.1, 0.0.0.0 or ::1",
    "netmask 255.255.255.0",
    "3.14159265358979",
    "0.4111111111111111",
    "4240.176128342599",
    "0.30000000000000004",
    "6.02214076e23",
    "1,234,567.89",
    "1 234 567 890",
    "10 000 000 rows",
    "00 01 02 03 04 05 06 07",
    "drawn: 01 05 12 23 34 45",
    "7 672 195 3480 98 347 5567",
    "555 123 4567 8",
    "1700000000",
    "1700000000123",
    "1700000000123456",
    "4111 1111 1111 1112",
    "1234567890123456",
    "9876543210987654",
    "GB29 NWBK 6016 1331 9268 18",
    "GB29 NWBK 6016 1331",
    "XX29 NWBK 6016 1331 9268 19",
    "550e8400-e29b-41d4-a716-446655440000",
    "d41d8cd98f00b204e9800998ecf8427e",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "commit 4f133bd",
    "0xDEADBEEF12345678",
    "00:1a:2b:3c:4d:5e",
    "a4111111111111111",
    "x[1::2], y[::10], a::b, std::vector, 10::20",
    "icon@2x.png",
    "lodash@4.17.21",
    "user@localhost",
    "@override def f(): ...",
    "git@github.com:owner/repository.git",
    "C = A@B.T",
    "task-based, risk-free, desk-side, sk-learn",
    "sk-estimator-doc-link-toggleable",
    "hf_hub_download, github_pat_name",
    "Bearer authentication",
    "the bearer of-this-letter-is-a-friend",
    "eyJ is how it begins",
    "[EMAIL] [PHONE] 12345678",
    "phone model 12345678",
    "51.5073509, -0.1277583",
    "+5% and +12345",
    "(2024) 1234",
    "https://example.com/orders/555-123-4567",
    "int_01HZX3V8Q2M4N6P8R0T2V4X6Z8",
    "👩‍💻 ❤️ १२३ नमस्ते",
]


@pytest.mark.parametrize(("text", "expected"), FOUND)
def test_personal_data_is_replaced_by_its_class(text: str, expected: str) -> None:
    redacted = redact(text)

    assert redacted.text == expected
    assert redacted.counts == Counter(re.findall(r"\[([A-Z_]+)\]", expected))


@pytest.mark.parametrize("text", LEFT)
def test_other_numbers_and_names_stay(text: str) -> None:
    redacted = redact(text)

    assert (redacted.text, dict(redacted.counts)) == (text, {})


REGISTRY = """
    AD1200012030200359100100 AE070331234567890123456 AL47212110090000000235698741
    AT611904300234573201 BE68539007547034 BG80BNBG96611020345678 CH9300762011623852957
    CY17002001280000001200527600 CZ6508000000192000145399 DK5000400440116243
    EE382200221020145685 ES9121000418450200051332 FI2112345600000785 GE29NB0000000101904917
    GI75NWBK000000007099453 GR1601101250000000012300695 HR1210010051863000160
    HU42117730161111101800000000 IE29AIBK93115212345678 IL620108000000099999999
    IS140159260076545510730339 IT60X0542811101000000123456 KW81CBKU0000000000001234560101
    LU280019400644750000 NL91ABNA0417164300 PL61109010140000071219812874
    PT50000201231234567890154 SE4550000000058398257466 TR330006100519786457841326
"""


@pytest.mark.parametrize("iban", REGISTRY.split())
def test_examples_of_the_iban_registry_are_found(iban: str) -> None:
    assert redact(f"pay to {iban} today").text == "pay to [IBAN] today"


FRAGMENTS = [text for text, _ in FOUND] + LEFT
GLUE = [
    "",
    " ",
    "-",
    ".",
    "/",
    ":",
    "[",
    "]",
    "(",
    "+",
    "@",
    "=",
    "\n",
    "\u200b",
    "é",
    "1",
    "a",
    "_",
]
mixtures = st.lists(
    st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(GLUE), st.text(max_size=4)), max_size=12
).map("".join)


@given(mixtures)
def test_redacting_twice_is_redacting_once(text: str) -> None:
    once = redact(text).text

    assert redact(once).text == once


@given(mixtures)
def test_text_grows_by_at_most_one_character_per_email(text: str) -> None:
    redacted = redact(text)

    assert len(redacted.text) <= len(text) + redacted.counts.get("EMAIL", 0)


@given(mixtures)
def test_only_placeholders_are_added_and_all_are_counted(text: str) -> None:
    redacted = redact(text)
    placeholder = re.compile(r"\[(?:EMAIL|PHONE|CARD|IBAN|IP|API_KEY|JWT)\]")
    gained = len(placeholder.findall(redacted.text)) - len(placeholder.findall(text))
    rest = iter(text)

    assert gained == sum(redacted.counts.values())
    assert all(char in rest for char in placeholder.sub("", redacted.text))


@given(st.text(st.characters(exclude_categories=("Nd", "Cs"), exclude_characters="@＠")))
def test_text_without_digit_or_at_sign_is_untouched(text: str) -> None:
    assert redact(text).text is text


def luhn_check_digit(payload: str) -> str:
    total = sum(
        sum(divmod(int(d) * (2 if i % 2 == 0 else 1), 10)) for i, d in enumerate(payload[::-1])
    )
    return str(-total % 10)


def iban_of(country: str, account: str) -> str:
    as_number = "".join(str(int(char, 36)) for char in f"{account}{country}00")
    return f"{country}{98 - int(as_number) % 97:02}{account}"


digits = st.text("0123456789", min_size=20, max_size=20)
cards = st.builds(
    lambda issuer, rest: (n := (issuer + rest)[:15]) + luhn_check_digit(n),
    st.sampled_from(["4", "51", "55", "2221", "2720", "6011", "65", "62", "3528"]),
    digits,
)
ibans = st.builds(
    lambda country, rest: iban_of(country[:2], rest[: int(country[2:]) - 4]),
    st.sampled_from(["DE22", "NO15", "AT20", "BE16", "CZ24", "ES24"]),
    digits,
)
emails = st.builds(
    "{}@{}.{}".format,
    st.from_regex(r"[a-z][a-z0-9._+-]{0,20}[a-z0-9]", fullmatch=True),
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}[a-z0-9]", fullmatch=True).filter(
        lambda name: not re.match("[0-9]x$", name)
    ),
    st.sampled_from(["com", "org", "co.uk", "museum", "de"]),
).filter(lambda address: not address.startswith("git@"))
phones = st.builds(
    "+{} {} {}".format,
    st.sampled_from(["1", "33", "49", "44", "353", "86"]),
    st.integers(20, 999),
    st.integers(100_000, 9_999_999),
)
addresses = st.one_of(
    st.ip_addresses(v=4, network="11.0.0.0/8"), st.ip_addresses(v=6, network="2001:db8::/32")
).map(str)


@given(
    st.one_of(cards, ibans, emails, phones, addresses), st.text(max_size=20), st.text(max_size=20)
)
def test_planted_data_is_gone_whatever_stands_around(planted: str, before: str, after: str) -> None:
    text = f"{before} from {planted} {after}"
    assume(planted not in f"{before} {after}")

    assert planted not in redact(text).text


@given(
    st.one_of(cards, ibans, emails, phones),
    st.sampled_from("\u200b\u200d\u2060\ufeff\xad\u202e"),
    st.data(),
)
def test_an_invisible_character_within_hides_nothing(
    planted: str, invisible: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(1, len(planted) - 1))
    text = f"x {planted[:at]}{invisible}{planted[at:]} y"

    assert redact(text).text in {f"x [{label}] y" for label in ("CARD", "IBAN", "EMAIL", "PHONE")}


@given(st.text("0123456789abcdef", min_size=32, max_size=64), st.uuids(), st.floats(0, 1e6))
def test_digests_uuids_and_decimals_stay(digest: str, uuid: object, number: float) -> None:
    text = f"{digest} {uuid} {number}"

    assert redact(text).text == text
