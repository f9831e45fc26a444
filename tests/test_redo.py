import numpy as np
import pytest
import torch

from incremental_cifar.algorithms.redo import ReDo
from incremental_cifar.resnet import build_network, hidden_layers


def features_of(redo, levels):
    """Features whose units have the mean 1, or in some layers those of `levels`, spread unevenly over images and positions."""
    means = [torch.tensor(levels.get(number, [1.0] * size)) for number, size in enumerate(redo.resets.sizes)]
    factors = torch.tensor([[0.0, 0.5, 3.5], [0.0, 2.0, 0.0]]).view(2, 1, 1, 3)  # of mean 1
    *maps, pooled = means
    return [mean.view(1, -1, 1, 1) * factors for mean in maps] + [pooled * torch.tensor([[0.5], [1.5]])]


@pytest.mark.parametrize(
    ("threshold", "dormant"),
    [
        (0, {0: [0], 8: [1]}),
        (0.124, {0: [0], 8: [1]}),
        (0.125, {0: [0], 6: [0], 7: [0], 8: [1], 16: [3]}),  # equality counts
        (1, {0: [0], 6: [0], 7: [0], 8: [1], 16: [3, 4]}),
    ],
)
def test_dormant_units_by_hand(threshold, dormant):
    """Mean 8 and units of 1 and 15: scores 1/8 and 15/8, whatever the scale; all units of a silent layer are dormant."""
    redo = ReDo(build_network(0, width=1), 3, 1, threshold)
    last = [16.0, 16.0, 16.0, 2.0, 14.0, 16.0, 24.0, 24.0]  # mean 16
    levels = {0: [0.0], 6: [1.0, 15.0], 7: [1000.0, 15000.0], 8: [3.0, 0.0], 16: last}
    redo.observe(features_of(redo, levels))
    chosen = {number: mask.nonzero().flatten().tolist() for number, mask in enumerate(redo.dormant().split(redo.resets.sizes))}
    ones = [number for number, size in enumerate(redo.resets.sizes) if number not in levels]
    if threshold == 1:  # all units of a layer alike are at its mean
        assert all(chosen.pop(number) == list(range(redo.resets.sizes[number])) for number in ones)
        dormant = dormant | {16: [0, 1, 2, 3, 4, 5]}
    assert {number: units for number, units in chosen.items() if units} == dormant


def test_dormant_units_are_reset_every_so_many_steps_and_their_outgoing_weights_silenced():
    network = build_network(0, width=4)
    redo = ReDo(network, 3, reinit_frequency=5, reinit_threshold=0.05)
    incoming, _, outgoing = hidden_layers(network)[2]
    levels = {2: [1.0, 0.01, 1.0, 1.0]}
    counts = []
    for step in range(12):
        with torch.no_grad():
            outgoing.weight.add_(1)
        before = incoming.weight.clone()
        redo.observe(features_of(redo, levels))
        redo.after_step(step)
        counts.append(redo.metrics()["units_reset_per_epoch"])
        assert (not torch.equal(incoming.weight, before)) == bool((outgoing.weight[:, 1] == 0).all()) == (step in (4, 9))
        assert (outgoing.weight[:, [0, 2, 3]] != 0).any() and torch.equal(incoming.weight[[0, 2, 3]], before[[0, 2, 3]])
    assert counts == [step in (4, 9) for step in range(12)]
    assert redo.state_dict() == {}


def test_it_acts_in_a_tiny_run(uninterrupted):
    counts = np.load(uninterrupted("redo") / "units_reset_per_epoch/index-0.npy")
    assert counts.shape == (12,) and counts.sum() > 0
