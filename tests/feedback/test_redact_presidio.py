"""The real Presidio; skipped where the extra is not installed."""

import importlib.util
import random

import pytest

from perennial.feedback.redact import Redactor, presidio_redactor
from perennial.infra.errors import ConfigError

is_installed = importlib.util.find_spec("presidio_analyzer") is not None
with_presidio = pytest.mark.skipif(not is_installed, reason="needs perennial-llm[presidio]")


@pytest.mark.skipif(is_installed, reason="presidio-analyzer is installed")
def test_without_presidio_the_error_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'perennial-llm\[presidio\]'"):
        presidio_redactor()


@pytest.fixture(scope="module")
def presidio() -> Redactor:
    return presidio_redactor()


@with_presidio
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("my SSN is 219-09-9999.", "my SSN is [US_SSN]."),
        ("NI number AB 12 34 56 C", "NI number [UK_NINO]"),
        ("DNI 12345678Z", "DNI [ES_NIF]"),
        ("codice fiscale RSSMRA85T10A562S", "codice fiscale [IT_FISCAL_CODE]"),
        ("hetu 131052-308T", "hetu [FI_PERSONAL_IDENTITY_CODE]"),
        ("NRIC S1234567D", "NRIC [SG_NRIC_FIN]"),
        ("pay 1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2", "pay [CRYPTO]"),
        ("bob@example.com, +49 30 1234567", "[EMAIL], [PHONE]"),
        ("John Smith of 5 Main Street", "John Smith of 5 Main Street"),
    ],
)
def test_presidio_adds_national_numbers_to_the_built_in_classes(
    presidio: Redactor, text: str, expected: str
) -> None:
    redacted = presidio(text)

    assert redacted.text == expected
    assert sum(redacted.counts.values()) == expected.count("[")
    assert presidio(redacted.text).text == expected


@with_presidio
def test_presidio_leaves_order_numbers(presidio: Redactor) -> None:
    rng = random.Random(0)
    numbers = [str(rng.randrange(10 ** (n - 1), 10**n)) for n in range(7, 15) for _ in range(50)]

    assert [n for n in numbers if presidio(f"order {n}").counts] == []
