import numpy as np
import pytest
import torch
from mlproj_manager.util import get_random_seeds

from incremental_cifar.config import UserError
from incremental_cifar.seeds import Purpose, derive_seed, experiment_seed, generator_for


def test_experiment_seed_is_mlproj_managers_and_leaves_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    seeds = [experiment_seed(index) for index in (0, 4, 99_999)]
    assert torch.equal(torch.rand(1), expected)
    assert seeds == [int(get_random_seeds()[index]) for index in (0, 4, 99_999)]


@pytest.mark.parametrize("index", [-1, 100_000])
def test_an_index_without_a_seed_is_refused(index):
    with pytest.raises(UserError, match="from 0 to 99999"):
        experiment_seed(index)


def test_derived_seeds_are_fixed_and_distinct():
    # Part of the results: a change here changes every run.
    assert derive_seed(37542, Purpose.EPOCH, 0) == 3768433916089365348
    assert derive_seed(37542, Purpose.NOISE, 1_049_999) == 101303672446852628
    seeds = {derive_seed(seed, purpose, count) for seed in (1, 2) for purpose in Purpose for count in range(50)}
    assert len(seeds) == 2 * len(Purpose) * 50 and max(seeds) < 2**63


def test_generators_depend_on_their_arguments_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    first = torch.rand(4, generator=generator_for(5, Purpose.EPOCH, 7))
    torch.rand(9)
    assert torch.equal(first, torch.rand(4, generator=generator_for(5, Purpose.EPOCH, 7)))
    assert not torch.equal(first, torch.rand(4, generator=generator_for(5, Purpose.EPOCH, 8)))
