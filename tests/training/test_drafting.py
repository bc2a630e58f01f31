import pytest
import torch

from perennial.infra.errors import InputError
from perennial.training.drafting import sampled
from perennial.training.tokens import open_user_turn
from tests.training.builders import tiny_tokenizer


def test_a_model_is_asked_to_speak_where_the_user_begins() -> None:
    tokenizer = tiny_tokenizer()
    ids, end = open_user_turn(tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\n"
    assert end == tokenizer.eos_token_id


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "<|im_start|>"])
def test_a_template_without_turns_is_an_error(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="does not mark where a user's turn begins"):
        open_user_turn(tokenizer)


def test_ids_are_drawn_by_seed_as_often_as_they_are_likely() -> None:
    logits_BV = torch.full((4000, 100), -50.0)
    logits_BV[:, 7], logits_BV[:, 9] = 0.0, torch.log(torch.tensor(3.0))
    drawn, again, other = (
        sampled(torch.Generator().manual_seed(seed))(logits_BV) for seed in (0, 0, 1)
    )
    assert set(drawn.tolist()) == {7, 9}
    assert float((drawn == 9).float().mean()) == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
