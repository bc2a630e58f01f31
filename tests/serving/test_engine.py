import pytest

from perennial.infra.errors import InputError
from perennial.serving.engine import BASE, AdapterRef, ChatMessage, ChatRequest
from perennial.serving.routes import Route, RouteTable

HI = (ChatMessage(role="user", content="hi"),)


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": ()},
        {"messages": HI, "max_tokens": 0},
        {"messages": HI, "temperature": 2.1},
        {"messages": HI, "top_p": 0.0},
        {"messages": HI, "stop": ("",)},
    ],
)
def test_a_request_checks_its_values(wrong):
    with pytest.raises(InputError):
        ChatRequest(**wrong)


def test_a_table_is_replaced_not_changed():
    first = RouteTable().with_route(Route(task="support", adapter=BASE))
    second = first.with_route(Route(task="support", adapter=AdapterRef(name="support-v1-a")))
    assert first.find("support").role == "base"
    assert second.find("support").version == "support-v1-a"
    assert second.find("support").role == "champion"
    assert second.find("other") is None
