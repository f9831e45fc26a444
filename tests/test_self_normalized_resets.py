import copy

import numpy as np
import pytest
import torch

from incremental_cifar.algorithms.self_normalized_resets import SelfNormalizedResets
from incremental_cifar.resnet import build_network, hidden_layers

BATCH_SIZE = 100  # images, of the twin that counts in images


def features_of(snr, fired):
    """Features above 0 where a unit fires, each time at one position of one image alone; fired: (u,) bool."""
    *maps, pooled = fired.split(snr.resets.sizes)
    features = [torch.zeros(3, len(mask), 2, 2) for mask in maps] + [torch.zeros(3, len(pooled))]
    for feature, mask in zip(features, (*maps, pooled), strict=True):
        feature[(1, mask, 0, 1) if feature.dim() == 4 else (1, mask)] = 1e-6
    return features


class Twin:
    """One unit by the authors' rules, in images: ages that grow by the batch, a bin per age, quantiles over the bins from 1 on."""

    def __init__(self, percentile, threshold, max_threshold):
        self.percentile, self.threshold, self.max_threshold = percentile, threshold, max_threshold
        self.age, self.ages = 0, []

    def step(self, has_fired):
        """Returns whether the unit is reset."""
        if has_fired:
            self.ages.append(self.age)
            self.age = 0
        else:
            self.age += BATCH_SIZE
        is_due = self.age >= self.threshold
        if is_due:
            self.ages.append(self.age)
            self.age = 0
        return is_due

    def update(self):
        silences = sorted(age for age in self.ages if age >= 1)
        enough = [age for number, age in enumerate(silences, 1) if number / len(silences) >= self.percentile]
        quantile = enough[0] if enough else 1
        self.threshold = quantile if quantile < self.threshold else 2 * self.threshold
        self.threshold = min(max(self.threshold, BATCH_SIZE), self.max_threshold)
        self.ages = []


@pytest.mark.parametrize("percentile", [0.5, 0.9, 1.0])
def test_steps_are_the_authors_rules_in_images(percentile):
    """400 steps of 61 units that fire always, never, or with a probability between; thresholds from 1 step to the largest."""
    snr = SelfNormalizedResets(build_network(0, width=1), 3, percentile, first_threshold=4, max_threshold=12, update_frequency=25)
    twins = [Twin(percentile, 4 * BATCH_SIZE, 12 * BATCH_SIZE) for _ in snr.ages]
    probabilities = torch.linspace(0, 1.2, len(twins)).square()
    generator = torch.Generator().manual_seed(0)
    seen, num_reset = set(), 0
    for step in range(400):
        fired = torch.rand(len(twins), generator=generator) < probabilities
        snr.observe(features_of(snr, fired))
        snr.after_step(step)
        due = [twin.step(has_fired) for twin, has_fired in zip(twins, fired.tolist(), strict=True)]
        assert snr.due.tolist() == due
        num_reset += sum(due)
        if (step + 1) % 25 == 0:
            for twin in twins:
                twin.update()
        assert snr.ages.tolist() == [twin.age // BATCH_SIZE for twin in twins]
        assert snr.thresholds.tolist() == [twin.threshold // BATCH_SIZE for twin in twins]
        seen |= set(snr.thresholds.tolist())
    assert snr.metrics() == {"units_reset_per_epoch": num_reset} and {1, 4, 12} < seen


@pytest.mark.parametrize(
    ("silences", "percentile", "threshold", "expected"),
    [
        ({1: 98, 2: 1, 3: 1}, 0.98, 5, 1),
        ({1: 98, 2: 1, 3: 1}, 0.99, 5, 2),
        ({1: 98, 2: 1, 3: 1}, 1.0, 5, 3),
        ({0: 900, 1: 1, 3: 1}, 0.6, 5, 3),  # silences of no step do not count
        ({4: 3, 5: 7}, 0.99, 5, 10),  # cut short at 5
        ({4: 3, 9: 7}, 0.99, 9, 16),  # likewise, and 16 is the most
        ({0: 1000}, 0.99, 2, 1),  # never silent: the least
        ({0: 1000}, 0.99, 1, 1),  # and that is no silence of 1 step, which would double it
        ({1: 1}, 0.99, 1, 2),
        ({}, 0.99, 5, 1),
    ],
)
def test_thresholds_by_hand(silences, percentile, threshold, expected):
    snr = SelfNormalizedResets(build_network(0, width=1), 3, percentile, threshold, max_threshold=16)
    for length, count in silences.items():
        snr.histogram[:, length] = count
    snr.update_thresholds()
    assert snr.thresholds.tolist() == [expected] * len(snr.thresholds)
    assert snr.histogram.count_nonzero() == 0


def test_a_unit_that_is_never_silent_keeps_the_least_threshold_and_one_silent_batch_resets_it():
    network = build_network(0, width=1)
    snr = SelfNormalizedResets(network, 3, first_threshold=4, max_threshold=8, update_frequency=5)
    fired = torch.ones(len(snr.ages), dtype=torch.bool)
    thresholds = []
    for step in range(30):
        snr.observe(features_of(snr, fired))
        snr.after_step(step)
        thresholds.append(snr.thresholds[0].item())
    assert thresholds == [4] * 4 + [1] * 26 and snr.metrics() == {"units_reset_per_epoch": 0}
    fired[-1] = False
    snr.observe(features_of(snr, fired))
    snr.after_step(30)
    assert (network.fc.weight[:, -1] == 0).all() and (network.fc.weight[:, :-1] != 0).all()
    assert snr.metrics() == {"units_reset_per_epoch": 1}


def test_a_loaded_state_goes_on_as_the_stored_one():
    networks = [build_network(4, width=2) for _ in range(2)]
    straight, resumed = (SelfNormalizedResets(network, 9, 0.9, 3, 6, update_frequency=15) for network in networks)
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.linspace(0, 1, len(straight.ages))

    def step(number, *instances):
        fired = torch.rand(len(probabilities), generator=generator) < probabilities
        for snr in instances:
            snr.observe(features_of(snr, fired))
            snr.after_step(number)

    for number in range(40):
        step(number, straight)
    networks[1].load_state_dict(networks[0].state_dict())
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert resumed.ages.any() and resumed.histogram.any() and set(resumed.state_dict()) == {"ages", "thresholds", "histogram"}
    for number in range(40, 80):
        step(number, straight, resumed)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for one, other in zip(hidden_layers(networks[0]), hidden_layers(networks[1]), strict=True):
        assert torch.equal(one.incoming.weight, other.incoming.weight)


def test_it_acts_in_a_tiny_run(uninterrupted):
    counts = np.load(uninterrupted("self_normalized_resets") / "units_reset_per_epoch/index-0.npy")
    assert counts.shape == (12,) and counts.sum() > 10
