"""Gradients from forward passes: equal to backprop one by one, unbiased along random signs."""

import pytest
import torch
from torch import nn
from yarn_tune.estimate import directions, estimate_gradient, passes


def reader(parameters, loss):
    return lambda: (loss(*parameters).item(), 0.0)


def test_few_numbers_are_taken_one_by_one():
    parameters = [nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.tensor([-0.2, 0.5]))]

    def loss(a, b):
        return (a.double() ** 2).sum() + torch.sin(b.double() * a.double()).sum() + 3 * b.double()[1]

    before = [p.detach().clone() for p in parameters]
    loss(*parameters).backward()
    expected = [p.grad.clone() for p in parameters]
    estimate_gradient(parameters, reader(parameters, loss), 4, 0, 0)
    for parameter, wanted, origin in zip(parameters, expected, before, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-4)
        assert torch.equal(parameter.data, origin), "left as they were, to the bit"


def test_random_signs_average_to_the_gradient():
    weights = torch.linspace(-1, 1, 12).double()
    parameter = nn.Parameter(torch.zeros(12))
    estimate_gradient([parameter], reader([parameter], lambda p: (weights * p.double()).sum()), 4000, 0, 0)
    torch.testing.assert_close(parameter.grad.double(), weights, rtol=0, atol=0.2)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 40])
def test_directions_are_a_function_of_seed_and_step(count):
    one = directions(count, 3, 7, 11)
    assert one == directions(count, 3, 7, 11)
    assert len(one) == (count if count <= 4 else 3)
    assert passes(count, 3) == 2 * len(one) + 1
    if count > 4:
        assert one != directions(count, 3, 7, 12)
        assert one != directions(count, 3, 8, 11)
        assert {abs(sign) for direction in one for sign in direction} == {1.0}
