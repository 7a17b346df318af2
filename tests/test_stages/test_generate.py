"""Generation: the cache of keys and values changes nothing, draws are those of the nucleus, rows do not meet."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tristill.stages.models.description import ModelConfig
from tristill.stages.models.generate import CausalModel, Sampling, TransformerRollout, draw, generate
from tristill.stages.models.language_model import State
from tristill.stages.models.transformer import LayerPast, Transformer
from tristill.stages.quantize.config import QuantizeConfig

VOCAB = 61
SHAPES = {
    "plain": {"width": 32, "layers": 2, "heads": 4, "mlp_width": 48},
    "grouped, untied, SubLN": {
        "width": 48, "layers": 3, "heads": 6, "kv_heads": 2, "mlp_width": 40, "tied_embeddings": False, "subln": True,
    },
}  # fmt: skip
QUANTIZERS = [None, QuantizeConfig(), QuantizeConfig(activations="none")]
ALL = Sampling(temperature=1.0, top_p=1.0, max_tokens=12)
GREEDY = Sampling(temperature=1e-3, top_p=1.0, max_tokens=12)


def make_model(name: str = "plain", quantize: QuantizeConfig | None = None) -> Transformer:
    model = Transformer(ModelConfig.model_validate(SHAPES[name]), VOCAB, quantize)
    model.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far enough from uniform that a wrong position shows
    return model.eval()


def causal(model: Transformer, stop_ids: tuple[int, ...] = (0,)) -> CausalModel:
    rollout = partial(TransformerRollout, model)
    return CausalModel(0, stop_ids, VOCAB, None, torch.device("cpu"), rollout)


def uniform(rows: int, seed: int = 1, numbers: int = 12) -> Tensor:
    return torch.rand(rows, numbers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rolled_out(model: Transformer, prompt: list[int], sampling: Sampling, uniform_M: Tensor) -> list[int]:
    """The slow way: everything anew for every id."""
    ids = list(prompt)
    for number in uniform_M[: sampling.max_tokens]:
        logits_1V = model.logits(torch.tensor([ids]))[:, -1]
        ids.append(int(draw(logits_1V, number[None], sampling)))
        if ids[-1] == 0:
            return ids[:-1]
    return ids


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("steps", [[1] * 16, [7, 1, 1, 5, 2], [16]], ids=["one by one", "in pieces", "at once"])
def test_logits_with_the_cache_are_those_without(name: str, quantize: QuantizeConfig | None, steps: list[int]) -> None:
    model = make_model(name, quantize)
    ids = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    past = [LayerPast(capacity=20) for _ in range(model.config.layers)]
    with torch.inference_mode():
        parts = [model.lm_head(model(part, past=past).final_BTD) for part in ids.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(ids), rtol=1e-4, atol=1e-4)


def test_hidden_states_with_the_cache_are_those_without() -> None:
    model = make_model()
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    past = [LayerPast(capacity=9) for _ in range(model.config.layers)]
    states = [State("residual", layer) for layer in (0, 1, 2)]
    with torch.inference_mode():
        model(ids[:, :5], past=past)
        later, whole = model(ids[:, 5:], states, past).hidden, model(ids, states).hidden
    for state in states:
        torch.testing.assert_close(later[state], whole[state][:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("sampling", [GREEDY, ALL, Sampling(0.7, 0.8, 12)], ids=["greedy", "all", "nucleus"])
def test_every_row_is_what_it_would_be_alone_without_a_cache(
    quantize: QuantizeConfig | None, sampling: Sampling
) -> None:
    model = make_model("grouped, untied, SubLN", quantize)
    prompts = [[0], [0, 5, 9], [0, 7], [0, *range(20, 30)], [0, 11, 12, 13]]
    numbers = uniform(len(prompts))
    found = generate(causal(model), prompts, sampling, numbers)
    with torch.inference_mode():
        assert found == [rolled_out(model, *row) for row in zip(prompts, [sampling] * 5, numbers, strict=True)]


def test_a_very_small_temperature_takes_the_most_likely_id() -> None:
    model = make_model()
    ids = [3, 4, 5]
    found = generate(causal(model, stop_ids=()), [ids], GREEDY, uniform(1))[0]
    for _ in range(12):
        ids = [*ids, int(model.logits(torch.tensor([ids]))[0, -1].argmax())]
    assert found == ids


def test_rows_end_before_a_stop_id_or_at_the_limit() -> None:
    stops = tuple(range(30))
    rows = generate(causal(make_model(), stops), [[40], [41, 2, 43]] * 20, ALL, uniform(40))
    lengths = [len(row) - (1 if row[0] == 40 else 3) for row in rows]
    assert 0 in lengths
    assert max(lengths) <= 12
    assert not any(set(row[1:]) & set(stops) for row in rows if row[0] == 40)
    assert all(row[:3] == [41, 2, 43] for row in rows if row[0] == 41), "a stop id in a prompt stops nothing"
    assert {len(row) for row in generate(causal(make_model(), ()), [[40]] * 9, ALL, uniform(9))} == {13}


def test_the_same_numbers_give_the_same_text_and_others_another() -> None:
    model = causal(make_model(), ())
    first = generate(model, [[0]] * 4, ALL, uniform(4, seed=1))
    assert generate(model, [[0]] * 4, ALL, uniform(4, seed=1)) == first
    assert generate(model, [[0]] * 4, ALL, uniform(4, seed=2)) != first


def nucleus(p_V: np.ndarray, top_p: float) -> set[int]:
    """Reference: ids from the most likely down, until their probabilities reach top_p; all of them at 1."""
    if top_p == 1:
        return set(range(len(p_V)))
    kept, mass = set[int](), 0.0
    for i in np.argsort(-p_V, kind="stable"):
        if mass >= top_p:
            break
        kept.add(int(i))
        mass += p_V[i]
    return kept


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.floats(0.2, 5.0))
def test_draws_have_the_shares_of_the_renormalised_nucleus(seed: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(23, generator=generator) * 3
    p_V = torch.softmax(logits_V / temperature, dim=0).double().numpy()
    kept = sorted(nucleus(p_V, top_p))
    num_draws = 4001
    grid = torch.arange(num_draws, dtype=torch.float64) / num_draws
    drawn = draw(logits_V.expand(num_draws, -1), grid, Sampling(temperature, top_p, 1)).numpy()
    assert set(drawn) <= set(kept), "never outside the nucleus"
    shares = np.bincount(drawn, minlength=23)[kept] / num_draws
    np.testing.assert_allclose(shares, p_V[kept] / p_V[kept].sum(), atol=2 / num_draws)


@pytest.mark.parametrize("scale", [0.0, 0.01, 5.0], ids=["flat", "nearly flat", "peaked"])
def test_a_nucleus_of_many_ids_is_found_in_a_large_vocabulary(scale: float) -> None:
    logits_V = torch.randn(9000, generator=torch.Generator().manual_seed(0)) * scale
    p_V = torch.softmax(logits_V, dim=0).double().numpy()
    numbers = uniform(200)[:, 0]
    drawn = draw(logits_V.expand(200, -1), numbers, Sampling(1.0, 0.9, 1)).numpy()
    sorted_p = np.sort(p_V)[::-1][: len(nucleus(p_V, 0.9))]
    rank = np.searchsorted(sorted_p.cumsum(), numbers.numpy() * sorted_p.sum(), side="right")
    np.testing.assert_array_equal(p_V[drawn], sorted_p[rank])


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_draws_stay_in_range_at_extreme_logits(top_p: float) -> None:
    logits = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, float("-inf")], [1e4, 1e4, -1e4]])
    ends = [torch.zeros(3, dtype=torch.float64), torch.full((3,), np.nextafter(1.0, 0.0), dtype=torch.float64)]
    for numbers in ends:
        drawn = draw(logits, numbers, Sampling(1e-3, top_p, 1))
        assert drawn[0] == 1
        assert all(drawn[1:] < 2)
