import pickle

import pytest

from perennial.infra import errors

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.PerennialError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_error_survives_pickling_with_its_fields(kind: type[errors.PerennialError]) -> None:
    error = kind("rank must be positive, got -1", rank=-1)

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert (copy.message, copy.fields) == (error.message, {"rank": -1})


def test_every_error_has_its_own_code_and_is_drawn_in_the_tree() -> None:
    codes = [kind.code for kind in KINDS]

    assert len(set(codes)) == len(codes)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in KINDS)
