import numpy as np
import pytest
import torch
from torch import nn

from incremental_cifar.algorithms.selective_weight_reinitialization import SelectiveWeightReinitialization
from incremental_cifar.resnet import build_network, initialise
from incremental_cifar.training import TrainingStep, make_optimizer, unseen_mask

WEIGHTS = [[1.0, -1.0, 1.0, 2.0], [-3.0, 1.0, 1.0, 1.0]]
GRADIENTS = [[1.0, 2.0, -4.0, 0.0], [3.0, 0.0, 5.0, 3.0]]  # utilities 1, 2, 4, 0 and 9, 0, 5, 3: their mean is 3


@pytest.fixture
def layer():
    layer = nn.Linear(4, 2)
    for parameter, values, gradient in zip(layer.parameters(), (WEIGHTS, [5.0, 6.0]), (GRADIENTS, [0.0, 1.0]), strict=True):
        parameter.data = torch.tensor(values)
        parameter.grad = torch.tensor(gradient)
    return layer


def act(network, *arguments, step=0, **options):
    method = SelectiveWeightReinitialization(network, 7, *arguments, **options)
    method.observe([])
    method.after_step(step)
    return method


def changed(layer):
    return (layer.weight != torch.tensor(WEIGHTS)).tolist()


def test_weights_up_to_the_threshold_are_drawn_anew_the_one_at_it_too(layer):
    method = act(layer, 1, 2 / 3)  # 2/3 of 3 is 2
    assert changed(layer) == [[True, True, False, True], [False, True, False, False]]
    assert layer.bias.tolist() == [0, 6]  # of utilities 0 and 6, the mean is 3
    assert method.metrics() == {"weights_reset_per_epoch": 5} and method.metrics() == {"weights_reset_per_epoch": 0}


def test_the_magnitude_alone_is_the_other_utility(layer):
    act(layer, 1, 0.8, utility="magnitude")  # of 1, 1, 1, 2, 3, 1, 1, 1 the mean is 11 / 8
    assert changed(layer) == [[True, True, True, False], [False, True, True, True]]


def test_the_new_weight_is_a_draw_or_the_mean(layer):
    act(layer, 1, 2 / 3, strategy="mean")
    assert layer.weight.tolist() == [[0, 0, 1, 0], [-3, 0, 1, 1]]
    layer.weight.data = torch.tensor(WEIGHTS)
    act(layer, 1, 2 / 3)
    drawn = layer.weight.detach()[torch.tensor(changed(layer))]
    assert len(drawn.unique()) == 4 and drawn.abs().max() < 5 * 0.5  # N(0, 1 / 4)


def test_only_every_so_manieth_step_acts(layer):
    for step, acts in ((0, False), (1, False), (2, True), (3, False), (5, True)):
        layer.weight.data = torch.tensor(WEIGHTS)
        act(layer, 3, 2 / 3, step=step)
        assert (layer.weight.tolist() != WEIGHTS) == acts


def test_a_proportion_takes_the_lowest_utilities_first_and_of_equals_the_first(layer):
    act(layer, 1, 0.125, pruning="proportional", strategy="mean")
    assert layer.weight.tolist() == [[1, -1, 1, 0], [-3, 1, 1, 1]]
    layer.weight.data = torch.tensor(WEIGHTS)
    act(layer, 1, 1.0, pruning="proportional", strategy="mean")
    assert not layer.weight.any() and not layer.bias.any()


def test_a_proportion_is_rounded_by_chance_in_its_proportion(layer):
    """Of 8 weights 3/16 are one and a half, and of two biases three eighths; the step decides which way."""
    counts = [[int(mask.sum()) for mask in proportional(layer).choose_weights(step)] for step in range(400)]
    weights, biases = zip(*counts, strict=True)
    assert set(weights) == {1, 2} and set(biases) == {0, 1}
    assert np.mean(weights) == pytest.approx(1.5, abs=0.1) and np.mean(biases) == pytest.approx(0.375, abs=0.1)
    assert counts[:20] == [[int(mask.sum()) for mask in proportional(layer).choose_weights(step)] for step in range(20)]


def proportional(layer):
    method = SelectiveWeightReinitialization(layer, 7, 1, 3 / 16, pruning="proportional")
    method.observe([])
    return method


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pruning", ["threshold", "proportional"])
def test_masks_go_by_position_whatever_the_memory_format(memory_format, pruning):
    layer = nn.Conv2d(2, 3, 2).to(memory_format=memory_format)
    utilities = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).abs()
    layer.weight.data.fill_(1)
    layer.weight.grad, layer.bias.grad = utilities.to(memory_format=memory_format), torch.ones(3)
    act(layer, 1, 0.5, pruning=pruning, strategy="mean")
    largest = utilities.median() if pruning == "proportional" else utilities.mean() / 2
    assert torch.equal(layer.weight == 0, utilities <= largest)


def test_new_values_are_those_of_the_initialisation():
    """Convolutions, shortcuts and output layer are drawn as at the start, biases are 0, batch norm 1 and 0; its statistics stay."""
    network = build_network(11, width=8).to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 9)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    act(network, 1, 0.1)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    twin = build_network(11, width=8)
    initialise(twin)
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        drawn, std = parameter.detach(), other.detach().std().item()
        if std > 0:
            spread = 5 / other.numel() ** 0.5
            assert drawn.mean().item() == pytest.approx(0, abs=spread * std), name
            assert drawn.std().item() == pytest.approx(std, rel=spread), name
        else:
            assert torch.equal(parameter, other), name


def test_rows_of_classes_not_yet_seen_are_drawn_anew_each_time_and_momentum_stays():
    network = build_network(11, width=2).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, 0.1, 0.9, 0.0005)
    method = SelectiveWeightReinitialization(network, 7, 2, 0.0005)
    step = TrainingStep(network, optimizer, "fp32", [method])
    seen, unseen = network.fc.weight.detach()[:10], network.fc.weight.detach()[10:]  # views
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    values = []
    for number in range(4):
        step(images, torch.arange(6), unseen_mask(range(10), torch.device("cpu")), number)
        values.append((seen.clone(), unseen.clone()))
    for before, after in ((0, 1), (2, 3)):
        assert (values[before][1] != values[after][1]).all() and ((values[after][0] - values[before][0]).abs() < 0.1).any()
    assert (values[1][1] != values[3][1]).all() and torch.isclose(values[1][1], values[2][1], atol=0.01).all()
    assert all(state["momentum_buffer"].any() for parameter, state in optimizer.state.items() if parameter.dim() > 1)
    assert method.metrics()["weights_reset_per_epoch"] >= 2 * 90 * 16


def test_a_run_counts_the_weights_reset_in_every_epoch(uninterrupted):
    """Every seventh step of 4, 8 and 12 in the tasks' epochs."""
    counts = np.load(uninterrupted("selective_weight_reinitialization") / "weights_reset_per_epoch/index-0.npy")
    ends = np.cumsum([0, *[4] * 4, *[8] * 4, *[12] * 4])
    assert (counts > 0).tolist() == (np.diff(ends // 7) > 0).tolist()
