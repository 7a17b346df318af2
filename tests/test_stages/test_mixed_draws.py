"""Draws from several teachers, side by side, are draws from their mixture."""

import torch

from tristill.cache import SampledProfile
from tristill.stages.dump.draws import draws
from tristill.stages.losses.forward_kl import ForwardKL
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import DrawnTarget
from tristill.stages.targets.mixed import mixed_draws


def test_mixed_draws_are_unbiased_and_their_divergence_is_the_mean_of_both() -> None:
    generator = torch.Generator().manual_seed(0)
    count, vocab, shares = 40_000, 20, (0.3, 0.7)
    p_2V = torch.softmax(2 * torch.randn(2, vocab, generator=generator), dim=-1)
    parts = []
    for p_V, num_draws in zip(p_2V, (3, 8), strict=True):
        profile = SampledProfile(draws=num_draws, draw="independent")
        uniforms = torch.rand(count, num_draws, generator=generator, dtype=torch.float64)
        drawn = draws(p_V.expand(count, -1).clone(), uniforms, profile)
        entropy_N = -(p_V * p_V.log()).sum().expand(count)
        parts.append(DrawnTarget(drawn["draw_ids"], drawn["draw_counts"] / num_draws, entropy_N, 1.0))
    mixed = mixed_draws(parts, shares)
    torch.testing.assert_close(mixed.shares_NK.sum(-1), torch.ones(count))
    estimates = torch.zeros(count, vocab).scatter_add_(-1, mixed.ids_NK, mixed.shares_NK)
    expected = shares[0] * p_2V[0] + shares[1] * p_2V[1]
    error = (estimates.mean(0) - expected).abs()
    assert (error < 5 * estimates.std(0) / count**0.5 + 1e-6).all()

    z_NV = torch.randn(count, vocab, generator=generator)
    values, gradients = [], []
    for target in (*parts, mixed):
        student = StudentChunk(z_NV.clone(), wants_gradient=True)
        values.append(ForwardKL(1.0).per_position(student, torch.empty(0), target))
        gradients.append(student.gradient())
    for found in (values, gradients):
        torch.testing.assert_close(found[2], shares[0] * found[0] + shares[1] * found[1], rtol=1e-4, atol=1e-5)
