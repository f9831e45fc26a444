import math

import numpy as np
import pytest
import torch
from conftest import tiny_arguments
from torch import nn

import incremental_cifar_experiment
from incremental_cifar.algorithms.flat import FlatTensor
from incremental_cifar.algorithms.upgd import UPGD
from incremental_cifar.seeds import Purpose, derive_seed
from incremental_cifar.training import make_optimizer, set_stepsize


def test_a_step_by_hand():
    """With beta 0 the utilities are the last -gradient x weight: 8, -4 and 0; the largest is 8."""
    layer = nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[4.0, 2.0]]), torch.tensor([0.0])
    layer.weight.grad, layer.bias.grad = torch.tensor([[-2.0, 2.0]]), torch.tensor([6.0])
    method = UPGD(layer, make_optimizer(layer, 1.0, 0.0, 0.0), 3, beta=0.0, sigma=0.0)
    method.change_gradients()
    gates = [1 - 1 / (1 + math.exp(-scaled)) for scaled in (1, -0.5, 0)]
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[-2 * gates[0], 2 * gates[1]]]))
    assert layer.bias.grad.item() == 3


@pytest.mark.parametrize("decay_batch_norm", [True, False])
def test_it_is_the_published_update(decay_batch_norm):
    """Eight steps with changing step sizes, against the formula for one weight after the other, in float64."""
    beta, sigma, weight_decay = 0.9, 0.3, 0.05
    network = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, 0.5, 0.0, weight_decay, decay_batch_norm)
    method = UPGD(network, optimizer, 3, beta, sigma)
    parameters = list(network.parameters())
    weights = flat(parameters)
    utilities = np.zeros_like(weights)
    norm = list(network[1].parameters()) if not decay_batch_norm else []
    decays = flat([torch.full_like(one, 0 if any(one is other for other in norm) else weight_decay) for one in parameters])
    generator = torch.Generator().manual_seed(0)
    noise = FlatTensor(parameters)
    for step in range(8):
        stepsize = 0.1 if step < 5 else 0.02
        set_stepsize(optimizer, stepsize)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        gradients = flat([parameter.grad for parameter in parameters])
        method.change_gradients()
        optimizer.step()
        method.after_step(step)

        noise.values.normal_(generator=torch.Generator().manual_seed(derive_seed(3, Purpose.UPGD_NOISE, step)))
        utilities = beta * utilities + (1 - beta) * -gradients * weights
        largest, draws = utilities.max(), flat(noise.pieces)
        for i in range(len(weights)):
            importance = 1 / (1 + math.exp(-utilities[i] / (1 - beta ** (step + 1)) / largest))
            weights[i] = (1 - stepsize * decays[i]) * weights[i] - stepsize * (gradients[i] + sigma * draws[i]) * (1 - importance)
        np.testing.assert_allclose(flat(parameters), weights, rtol=1e-6, atol=1e-6)


def flat(tensors):
    """All entries, in the order of their indices, as float64."""
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


def test_where_no_weight_is_of_any_use_all_gates_are_half_open(tmp_path):
    """As in a first task of one class, whose loss and gradients are 0."""
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.zeros(3)
    network = torch.nn.ParameterList([parameter])
    upgd = UPGD(network, torch.optim.SGD([parameter], lr=torch.tensor(0.1)), 0, beta=0.9, sigma=0.0)
    upgd.change_gradients()
    assert upgd.gates.values.tolist() == [0.5] * 3 and parameter.grad.tolist() == [0] * 3
    assert incremental_cifar_experiment.main(tiny_arguments("upgd", tmp_path, classes_per_task=1)) == 0
