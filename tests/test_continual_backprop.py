import json

import pytest
import torch
from conftest import REFERENCE

from incremental_cifar.algorithms.continual_backprop import ContinualBackprop, ResetSchedule
from incremental_cifar.resnet import build_network, hidden_layers
from incremental_cifar.seeds import experiment_seed

TRACES = json.loads((REFERENCE / "continual_backprop_trace.json").read_text())


@pytest.mark.parametrize("reference", TRACES, ids=lambda reference: f"index {reference['index']}")
def test_choice_of_units_equals_the_released_code(reference):
    """Fixed weights and features, as described in the reference's README, give the released code's resets, unit for unit."""
    index = reference["index"]
    network = build_network(experiment_seed(index))
    layers = hidden_layers(network)
    main_path = [layer.incoming for layer in layers] + [network.fc]
    initial = [layer.weight.detach().clone() for layer in main_path]
    scale_generator = torch.Generator().manual_seed(1000 + index)
    scales = [10 ** (torch.rand(layer.num_units, generator=scale_generator) * 6 - 3) for layer in layers]
    continual_backprop = ContinualBackprop(
        network,
        random_seed=0,
        replacement_rate=reference["replacement_rate"],
        maturity_threshold=reference["maturity_threshold"],
        utility_function=reference["utility_function"],
    )
    resets = []
    for step in range(reference["steps"]):
        factor_generator = torch.Generator().manual_seed(50_000 + step)
        features = []
        with torch.no_grad():
            for layer, weight in zip(main_path, initial, strict=True):
                factors = torch.rand(weight.shape[1], generator=factor_generator) + 0.5
                layer.weight.copy_(weight * factors.view(1, -1, *[1] * (weight.dim() - 2)))
        for layer_index, scale in enumerate(scales):
            shape = (2, len(scale)) if layer_index == 16 else (2, len(scale), 2, 2)
            feature = torch.rand(shape, generator=torch.Generator().manual_seed(100 * step + layer_index)) + 0.5
            features.append(feature * scale.view(1, -1, *[1] * (len(shape) - 2)))
        continual_backprop.observe(features)
        for layer_index, units in continual_backprop.choose_units().items():
            resets.append({"step": step, "layer": layer_index, "units": sorted(units.tolist())})
            continual_backprop.reset_units(layer_index, units, torch.Generator())
    assert len(resets) > 400
    assert resets == [{**reset, "units": sorted(reset["units"])} for reset in reference["replacements"]]
    assert continual_backprop.ages().tolist() == [age for layer in reference["ages_after"] for age in layer]
    expected = torch.tensor([value for layer in reference["accumulated_feature_magnitude_after"] for value in layer])
    torch.testing.assert_close(continual_backprop.magnitudes, expected)


def test_schedule_by_hand():
    """3 units, half a unit per step, mature after 2 steps: eligible from step 3 on, one due in every second step."""
    schedule = ResetSchedule(num_units=3, replacement_rate=0.5 / 3, maturity_threshold=2)
    assert [schedule.num_due(step) for step in range(1, 9)] == [0, 0, 0, 1, 0, 1, 0, 1]
    # Step 4 takes one unit (young until step 6), step 6 another, step 8 a third: always two eligible from step 7 on.
    assert schedule.num_eligible == 1 and list(schedule.young) == [(6, 1), (8, 1)]


def test_schedule_resets_no_more_than_are_eligible():
    schedule = ResetSchedule(num_units=4, replacement_rate=1.0, maturity_threshold=3)
    assert [schedule.num_due(step) for step in range(1, 13)] == [0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4]


@pytest.mark.parametrize("utility_function", ["weight", "contribution"])
def test_counts_on_the_host_agree_with_a_plain_twin_that_counts_ages(utility_function):
    """A twin that keeps ages, as the paper writes the algorithm, chooses the same units over 200 steps."""
    network = build_network(1, width=2)
    layers = hidden_layers(network)
    continual_backprop = ContinualBackprop(network, 0, 0.03, maturity_threshold=7, utility_function=utility_function)
    ages = [torch.zeros(layer.num_units) for layer in layers]
    magnitudes = [torch.zeros(layer.num_units) for layer in layers]
    accumulators = [0.0] * len(layers)
    generator = torch.Generator().manual_seed(0)
    num_resets = 0
    for _ in range(200):
        features = [torch.rand(3, layer.num_units, 2, 2, generator=generator) for layer in layers[:-1]]
        features.append(torch.rand(3, layers[-1].num_units, generator=generator))
        expected = {}
        for number, (layer, feature) in enumerate(zip(layers, features, strict=True)):
            ages[number] += 1
            magnitudes[number] += 0.01 * feature.abs().mean(dim=[0, *range(2, feature.dim())])
            eligible = [unit for unit in range(layer.num_units) if ages[number][unit] > 7]
            if not eligible:
                continue
            accumulators[number] += 0.03 * layer.num_units
            due = int(accumulators[number])
            accumulators[number] -= due
            weight = layer.outgoing.weight.detach().abs()
            utility = weight.mean(dim=[0, *range(2, weight.dim())])
            if utility_function == "contribution":
                utility = utility * magnitudes[number]
            chosen = sorted(eligible, key=lambda unit: utility[unit].item())[:due]
            if chosen:
                expected[number] = sorted(chosen)
                ages[number][chosen] = 0
        continual_backprop.observe(features)
        actual = continual_backprop.choose_units()
        assert {number: sorted(units.tolist()) for number, units in actual.items()} == expected
        for number, units in actual.items():
            continual_backprop.reset_units(number, units, generator)
            num_resets += len(units)
        assert continual_backprop.ages().tolist() == torch.cat(ages).tolist()
    assert num_resets > 300


@pytest.mark.parametrize("layer_index", [0, 4, 16])
def test_a_reset_changes_what_it_should_and_nothing_else(layer_index):
    network = build_network(2, width=4)
    for tensor in network.state_dict().values():
        tensor.add_(1)  # so that zeros and ones are news
    layer = hidden_layers(network)[layer_index]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    names = {module: name for name, module in network.named_modules()}
    units = torch.tensor([1, 3])
    continual_backprop = ContinualBackprop(network, 0, 0.5, maturity_threshold=1)
    continual_backprop.reset_units(layer_index, units, torch.Generator().manual_seed(0))

    incoming, norm, outgoing = (names[module] for module in layer)
    after = network.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {f"{incoming}.weight", f"{incoming}.bias", f"{outgoing}.weight"} | {
        f"{norm}.{buffer}" for buffer in ("weight", "bias", "running_mean", "running_var")
    }
    assert (layer.incoming.bias[units] == 0).all() and (layer.outgoing.weight[:, units] == 0).all()
    assert (layer.batch_norm.weight[units] == 1).all() and (layer.batch_norm.running_var[units] == 1).all()
    assert (layer.batch_norm.bias[units] == 0).all() and (layer.batch_norm.running_mean[units] == 0).all()
    others = [unit for unit in range(layer.num_units) if unit not in units]
    assert torch.equal(layer.incoming.weight[others], before[f"{incoming}.weight"][others])
    assert torch.equal(layer.outgoing.weight[:, others], before[f"{outgoing}.weight"][:, others])


def test_new_incoming_weights_have_the_released_deviation():
    network = build_network(2, width=64)
    continual_backprop = ContinualBackprop(network, 0, 0.5, maturity_threshold=1)
    generator = torch.Generator().manual_seed(0)
    for layer_index, inputs in ((0, 3), (1, 64), (16, 512)):
        layer = hidden_layers(network)[layer_index]
        continual_backprop.reset_units(layer_index, torch.arange(layer.num_units), generator)
        assert layer.incoming.weight.std().item() == pytest.approx((2 / (inputs * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("running_average", [False, True])
def test_magnitude_is_the_released_sum_or_the_papers_running_average(running_average):
    network = build_network(0, width=1)
    continual_backprop = ContinualBackprop(network, 0, 0.1, maturity_threshold=100, running_average_utility=running_average)
    features = [torch.full((2, size, 2, 2), 3.0) for size in continual_backprop.sizes[:-1]] + [torch.full((2, 8), 3.0)]
    for _ in range(10):
        continual_backprop.observe(features)
    expected = 3 * (1 - 0.99**10) if running_average else 3 * 0.01 * 10
    torch.testing.assert_close(continual_backprop.magnitudes, torch.full_like(continual_backprop.magnitudes, expected))
    continual_backprop.reset_units(16, torch.tensor([5]), torch.Generator())
    after = continual_backprop.layer_magnitudes[16]
    assert after[5].item() == pytest.approx(0 if running_average else expected)
    assert after[4].item() == pytest.approx(expected)


def test_a_loaded_state_goes_on_as_the_stored_one():
    def features(step):
        generator = torch.Generator().manual_seed(step)
        sizes = straight.sizes
        return [torch.rand(2, size, 2, 2, generator=generator) for size in sizes[:-1]] + [torch.rand(2, sizes[-1], generator=generator)]

    networks = [build_network(4, width=2) for _ in range(2)]
    straight, resumed = (ContinualBackprop(network, 9, 0.05, maturity_threshold=6) for network in networks)
    for step in range(50):
        straight.observe(features(step))
        straight.after_step(step)
    networks[1].load_state_dict(networks[0].state_dict())
    resumed.load_state_dict(straight.state_dict())
    for step in range(50, 100):
        straight.observe(features(step))
        straight.after_step(step)
        resumed.observe(features(step))
        resumed.after_step(step)
    assert torch.equal(straight.births, resumed.births) and torch.equal(straight.magnitudes, resumed.magnitudes)
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, networks[1].state_dict()[name]), name
    assert straight.births.max() > 90
