"""sampling.py: each request draws from its own distribution, with its own generator."""

import pytest
import torch
from pydantic import ValidationError

from streaming_bots.generation.sampling import ReplyOptions, Sampler, SamplingLogitsProcessor

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0])


def frequencies(sampler: Sampler, draws: int = 20_000) -> torch.Tensor:
    tokens = torch.tensor([int(sampler(LOGITS).argmax()) for _ in range(draws)])
    return torch.bincount(tokens, minlength=len(LOGITS)) / draws


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [(1.0, 0, 1.0, 5), (0.5, 0, 1.0, 5), (1.0, 2, 1.0, 2), (1.0, 0, 0.8, 2), (2.0, 4, 0.99, 4)],
)
def test_tokens_are_drawn_with_their_probabilities(temperature, top_k, top_p, kept):
    sampler = Sampler(temperature, top_k, top_p, seed=1, device=CPU)
    expected = torch.softmax(LOGITS / temperature, dim=0)
    expected[kept:] = 0
    assert torch.allclose(frequencies(sampler), expected / expected.sum(), atol=0.015)


def test_a_temperature_near_zero_takes_the_most_likely_token():
    sampler = Sampler(1e-30, 0, 1.0, seed=1, device=CPU)
    assert all(int(sampler(LOGITS).argmax()) == 0 for _ in range(100))


def test_a_seed_draws_the_same_whatever_else_is_drawn():
    one, other = (Sampler(1.0, 0, 1.0, seed=5, device=CPU) for _ in range(2))
    different = Sampler(1.0, 0, 1.0, seed=6, device=CPU)
    scores = []
    for _ in range(10):
        scores.append(one(LOGITS))
        torch.rand(3)
        different(LOGITS)
    assert all(torch.equal(score, other(LOGITS)) for score in scores)
    assert not torch.equal(scores[0], different(LOGITS))


def test_without_a_seed_two_requests_draw_differently():
    one, other = (Sampler(1.0, 0, 1.0, seed=None, device=CPU) for _ in range(2))
    assert not torch.equal(one(LOGITS), other(LOGITS))


def test_rows_without_a_sampler_stay_as_they_are():
    scores = torch.stack([LOGITS, LOGITS, LOGITS])
    sampled = SamplingLogitsProcessor([None, Sampler(1.0, 0, 1.0, 1, CPU), None])(
        None, scores.clone()
    )
    assert torch.equal(sampled[[0, 2]], scores[[0, 2]])
    assert not torch.equal(sampled[1], scores[1])


def options(**fields: object) -> ReplyOptions:
    return ReplyOptions.model_validate({"max_new_tokens": 8, **fields}, context={"limit": 8})


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0}, {"temperature": 0, "seed": 1}, {"temperature": 2, "top_k": 1}],
)
def test_a_reply_is_greedy_unless_sampling_is_asked_for(fields):
    assert options(**fields).sampler(CPU) is None


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.1}, {"top_p": 0.5}, {"top_k": 3}, {"seed": 0}, {"top_k": 0}]
)
def test_each_option_of_sampling_asks_for_it(fields):
    assert options(**fields).sampler(CPU) is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"temperature": "warm"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": ["a"] * 5},
        {"stop": "x" * 101},
        {"stop": 7},
        {"temprature": 1},
    ],
)
def test_an_option_out_of_range_is_refused_by_name(fields):
    with pytest.raises(ValidationError) as refused:
        options(**fields)
    assert refused.value.errors()[0]["loc"][0] in fields


def test_a_temperature_that_is_zero_in_float32_takes_the_most_likely_token():
    options = {"max_new_tokens": 1, "temperature": 1e-50}
    assert ReplyOptions.model_validate(options, context={"limit": 1}).sampler(CPU) is None
