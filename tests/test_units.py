"""Resets of units by mask; those by index are in test_continual_backprop.py."""

import copy

import pytest
import torch

from incremental_cifar.algorithms.units import UnitResets, reset_units
from incremental_cifar.resnet import build_network, hidden_layers
from incremental_cifar.seeds import Purpose


def network_of(width):
    network = build_network(2, width)
    for tensor in network.state_dict().values():
        tensor.add_(1)  # so that zeros and ones are news
    return network.to(memory_format=torch.channels_last)


def mask_of(resets, chosen):
    """(u,), from a dict of layers to lists of units."""
    masks = [torch.zeros(size, dtype=torch.bool) for size in resets.sizes]
    for layer_index, units in chosen.items():
        masks[layer_index][units] = True
    return torch.cat(masks)


def test_a_reset_by_mask_is_that_by_index_layer_after_layer():
    """Of the first and the last layer, of two in succession and of all units of one; of all other entries not a bit changes."""
    network = network_of(4)
    twin = copy.deepcopy(network)
    resets = UnitResets(network, 3, Purpose.UNIT_RECYCLE)
    chosen = {0: [1], 4: [0, 3], 5: [2, 7], 9: list(range(16)), 16: [5, 31]}
    resets.reset(mask_of(resets, chosen), step=7)
    with torch.no_grad():
        for layer_index, units in chosen.items():
            reset_units(hidden_layers(twin)[layer_index], torch.tensor(units), resets.fresh.pieces[layer_index][units])
    expected = twin.state_dict()
    assert [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    assert (network.fc.weight[:, [5, 31]] == 0).all() and (network.fc.weight[:, :5] != 0).all()  # the tensor itself, not a copy


def test_between_two_units_reset_at_once_the_fresh_weight_stays():
    network = network_of(4)
    resets = UnitResets(network, 3, Purpose.SNR_RESET)
    resets.reset(mask_of(resets, {2: [1], 3: [2]}), step=0)
    weight = hidden_layers(network)[2].outgoing.weight
    assert weight is hidden_layers(network)[3].incoming.weight
    assert (weight[2] == resets.fresh.pieces[3][2]).all() and (weight[2, 1] != 0).all()
    assert (weight[[0, 1, 3], 1] == 0).all()


def test_new_weights_have_the_initial_deviation_and_depend_on_seed_purpose_and_step():
    def drawn(seed, purpose, step):
        network = build_network(2, width=32)
        resets = UnitResets(network, seed, purpose)
        resets.reset(torch.ones(sum(resets.sizes), dtype=torch.bool), step)
        return [layer.incoming.weight.detach() for layer in hidden_layers(network)]

    weights = drawn(1, Purpose.SNR_RESET, 5)
    for layer_index, inputs in ((0, 3), (1, 32), (16, 256)):
        assert weights[layer_index].std().item() == pytest.approx((2 / (inputs * 9)) ** 0.5, rel=0.05)
    assert torch.equal(drawn(1, Purpose.SNR_RESET, 5)[3], weights[3])
    for other in ((2, Purpose.SNR_RESET, 5), (1, Purpose.UNIT_RECYCLE, 5), (1, Purpose.SNR_RESET, 6)):
        assert not torch.equal(drawn(*other)[3], weights[3])


def test_where_no_unit_is_chosen_nothing_changes_and_counts_start_anew_when_asked():
    network = network_of(2)
    before = copy.deepcopy(network.state_dict())
    resets = UnitResets(network, 3, Purpose.UNIT_RECYCLE)
    resets.reset(mask_of(resets, {}), step=0)
    assert resets.metrics() == {"units_reset_per_epoch": 0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    for step, chosen in enumerate(({1: [0]}, {1: [0], 16: [3, 4]})):
        resets.reset(mask_of(resets, chosen), step)
    assert [resets.metrics()["units_reset_per_epoch"] for _ in range(2)] == [4, 0]
