import copy

import pytest
import torch
from torch import nn

from incremental_cifar.algorithms import make_algorithms
from incremental_cifar.algorithms.l2_init import L2Init
from incremental_cifar.config import load_config
from incremental_cifar.resnet import build_network
from incremental_cifar.training import TrainingStep, make_optimizer, unseen_mask


def test_gradients_point_from_the_initial_values():
    layer = nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    method = L2Init(layer.parameters(), 0.5)
    layer.weight.data.copy_(torch.tensor([[5.0, 2.0]]))
    layer.weight.grad, layer.bias.grad = torch.tensor([[10.0, 10.0]]), torch.tensor([10.0])
    method.change_gradients()
    assert layer.weight.grad.tolist() == [[12, 10]] and layer.bias.grad.tolist() == [10]


@pytest.mark.parametrize("decay_batch_norm", [True, False])
def test_with_initial_values_of_0_it_is_weight_decay(decay_batch_norm):
    """Over steps with momentum, batch norm's parameters taken in or left out."""
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    networks = []
    for weight_decay, l2_init in ((0.05, 0.0), (0.0, 0.05)):
        overrides = [f"weight_decay={weight_decay}", f"l2_init={l2_init}", f"decay_batch_norm={str(decay_batch_norm).lower()}"]
        config = load_config("cfg/base_deep_learning_system.json", overrides)
        network = build_network(11, width=2).to(memory_format=torch.channels_last)
        start = copy.deepcopy(network.state_dict())
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        optimizer = make_optimizer(network, 0.01, config.momentum, config.weight_decay, config.decay_batch_norm)
        step = TrainingStep(network, optimizer, "fp32", make_algorithms(config, network, optimizer, 3))
        network.load_state_dict(start)
        for number in range(5):
            step(images, torch.arange(6), unseen_mask(range(10), torch.device("cpu")), number)
        networks.append(network)
        assert (network.bn1.weight - 1).abs().max() > 1e-4
    for (name, one), other in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_batch_norm_is_left_out_when_weight_decay_leaves_it_out():
    network = build_network(11, width=2)
    for decay_batch_norm, num_parameters in ((True, 82), (False, 42)):
        config = load_config("cfg/l2_init.json", [f"decay_batch_norm={str(decay_batch_norm).lower()}"])
        optimizer = make_optimizer(network, 0.1, 0.9, 0.0, decay_batch_norm)
        (method,) = make_algorithms(config, network, optimizer, 3)
        assert len(method.parameters) == num_parameters
        assert any(parameter is network.bn1.weight for parameter in method.parameters) == decay_batch_norm


def test_parameters_are_pulled_to_where_they_began(uninterrupted):
    """Of a tiny run: nearer to the initial network than without."""
    distances = {}
    for algorithm in ("base_deep_learning_system", "l2_init"):
        first, last = (
            torch.load(uninterrupted(algorithm) / f"model_parameters/index-0_epoch-{epoch}.pt", weights_only=True) for epoch in (0, 12)
        )
        distances[algorithm] = (last["conv1.weight"] - first["conv1.weight"]).norm()
    assert distances["l2_init"] < distances["base_deep_learning_system"]
