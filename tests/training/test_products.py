"""Products with frozen weights are torch's, whichever library makes them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from perennial.training import products
from perennial.training.products import frozen_linear, speed_up, times
from tests.training.builders import tiny_model


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, on any processor."""
    if request.param and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "is_by_onednn", lambda: request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (0, 16)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_and_gradient_are_those_of_torch(shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 16), torch.randn(24) if has_bias else None
    found = []
    for linear in (frozen_linear, functional.linear):
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        y = linear(x, weight, bias)
        (y * torch.arange(24.0)).sum().backward()  # type: ignore[no-untyped-call]  # torch
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
def test_a_transposed_weight_and_a_slice_of_an_input_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(16, 24), torch.randn(5, 40)[:, 8:24]
    torch.testing.assert_close(times(x, weight.T), x @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
def test_narrow_weights_are_multiplied_in_their_dtype_and_keep_that_of_the_input() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 16).bfloat16(), torch.randn(5, 16)
    y = times(x, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, functional.linear(x.bfloat16(), weight).float())


@pytest.mark.usefixtures("library")
def test_a_model_answers_the_same_and_gives_its_input_the_same_gradient() -> None:
    plain, faster = tiny_model(), tiny_model()
    speed_up(faster)
    found = []
    for model in (plain, faster):
        embedded = model.get_input_embeddings()(torch.arange(3, 12)[None]).detach()
        embedded.requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), embedded.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_only_plain_linear_layers_change_and_their_weights_stay() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    speed_up(model)
    assert type(model[1]) is Own
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]) is not nn.Linear
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
