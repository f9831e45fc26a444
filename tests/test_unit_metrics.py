import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from incremental_cifar.resnet import ResNet18, build_network
from incremental_cifar.unit_metrics import (
    IMAGES_PER_CHUNK,
    IMAGES_PER_GRADIENT,
    accuracy_per_class,
    active_share,
    dormant_unit_fraction,
    effective_rank,
    hidden_features,
    loss_gradients,
    singular_values,
    stable_rank,
    two_norm,
    weight_magnitude,
    zero_share,
)


def matrix_with(spectrum, rng, num_images=40):
    """A float32 matrix (num_images, m) with these m singular values."""
    m = len(spectrum)
    left, _ = np.linalg.qr(rng.standard_normal((num_images, m)))
    right, _ = np.linalg.qr(rng.standard_normal((m, m)))
    return torch.from_numpy((left * spectrum) @ right.T).float()


def trained_like_network(width=4):
    """A network whose batch norms have learned something."""
    network = build_network(0, width)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 2),
                (module.bias, -1, 1),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return network


@pytest.fixture
def images():
    return torch.randn(2 * IMAGES_PER_CHUNK + 7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# --- Ranks -----------------------------------------------------------------------------------------------------------------------


def test_singular_values_are_found(rng):
    spectrum = np.array([500.0, 20.0, 3.0, 1e-2, 1e-4])
    found = singular_values(matrix_with(spectrum, rng))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, spectrum, rtol=1e-6, atol=500 * 2e-8)  # the matrix itself is rounded to float32


def test_effective_rank_of_known_spectra(rng):
    assert effective_rank(np.full(7, 3.0)) == pytest.approx(7)
    assert effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1)
    # Shares 1/2, 1/4, 1/4: entropy 1.5 log 2.
    assert effective_rank(np.array([1.0, 2.0, 1.0])) == pytest.approx(2**1.5)
    assert effective_rank(singular_values(matrix_with([4.0, 2.0, 2.0], rng))) == pytest.approx(2**1.5, rel=1e-6)
    assert effective_rank(np.array([1e300, 5e-324])) == pytest.approx(1)


def test_stable_rank_of_known_spectra(rng):
    assert stable_rank(np.ones(200)) == 198  # 198 of 200 equal values are exactly 99 %
    assert stable_rank(np.ones(5)) == 5
    assert stable_rank(np.array([0.5, 98.6, 0.5, 0.4])) == 2
    assert stable_rank(np.array([98.9, 0.6, 0.3, 0.2])) == 2
    assert stable_rank(np.array([7.0, 0.0, 0.0])) == 1
    assert stable_rank(np.array([3.0, 2.0, 1.0]), share=0.5) == 1
    assert stable_rank(np.full(10, 0.1), share=1.0) == 10  # 0.1 summed ten times is less than 1 in binary
    assert stable_rank(singular_values(matrix_with([60.0, 30.0, 8.0, 1.5, 0.5], rng))) == 4


def test_features_that_are_all_zero_have_rank_one_as_released():
    spectrum = singular_values(torch.zeros(10, 4))
    assert effective_rank(spectrum) == 1 and stable_rank(spectrum) == 1


# --- Dormant units ---------------------------------------------------------------------------------------------------------------


def test_active_share_counts_images_and_positions():
    layer = torch.zeros(5, 3, 2, 2)
    layer[:, 1] = 0.1
    layer[4, 2, 0, 1] = 7.0
    expected = torch.tensor([0, 1, 1 / 20], dtype=torch.float64)
    assert torch.equal(active_share([layer]), expected)
    assert torch.equal(active_share(layer.split(2)), expected)  # chunks of unequal size
    assert torch.equal(active_share([torch.tensor([[0.0, -1.0], [2.0, 3.0]])]), torch.tensor([0.5, 1], dtype=torch.float64))


def test_a_unit_active_on_exactly_the_threshold_is_not_dormant():
    layer = torch.zeros(1000, 3)
    layer[:10, 0] = 1
    layer[:9, 1] = 1
    shares = [active_share(layer.split(50)), active_share([torch.ones(1000, 5, 1, 1)])]
    assert dormant_unit_fraction(shares, 0.01) == 2 / 8
    assert dormant_unit_fraction(shares, 0.0) == 0
    assert dormant_unit_fraction(shares, 1.0) == 3 / 8


def test_units_forced_silent_are_counted_exactly(images):
    network = build_network(3, width=8)
    num_units = 8 * 5 + 16 * 4 + 32 * 4 + 64 * 4

    def dormant():
        shares = [active_share(layer) for layer in hidden_features(network, images, "batch")]
        return [int((share < 0.01).sum()) for share in shares], dormant_unit_fraction(shares, 0.01)

    before, _ = dormant()
    assert sum(before) == 0
    silenced = {
        "bn1": [0, 5],  # layer 0
        "layer2.0.bn1": [3],  # layer 5
        "layer4.0.bn2": [10, 11, 12],  # layer 14, together with the shortcut into it
        "layer4.0.downsample.1": [10, 11, 12],
        "layer4.1.bn2": [10, 11],  # layer 16, with what reaches it past the block
    }
    with torch.no_grad():
        for name, units in silenced.items():
            norm = network.get_submodule(name)
            norm.weight[units] = 0
            norm.bias[units] = -1
    counts, fraction = dormant()
    assert [counts[layer] for layer in (0, 5, 14, 16)] == [2, 1, 3, 2] and sum(counts) == 8
    assert fraction == pytest.approx(8 / num_units, abs=1e-15)


# --- Features --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_features_in_chunks_are_those_of_the_network_on_the_whole_batch(batch_norm, images):
    network = trained_like_network()
    chunked = [torch.cat(layer) for layer in hidden_features(network, images, batch_norm)]
    with torch.no_grad():
        network.double().train(batch_norm == "batch")
        _, whole = network(images.double())
    assert len(chunked) == len(whole) == 17
    for mine, expected in zip(chunked, whole, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-5 * expected.max().item())


def test_features_leave_network_and_mode_as_they_are(images):
    network = trained_like_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    results = []
    for training in (True, False):
        network.train(training)
        for batch_norm in ("batch", "running"):
            results.append([torch.cat(layer) for layer in hidden_features(network, images, batch_norm)][-1])
            assert network.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3]) and not torch.allclose(results[0], results[1])


# --- Gradients -------------------------------------------------------------------------------------------------------------------


class LinearNetwork(nn.Module):
    """An output layer of zeros on images of two pixels: every class seen is as likely as every other."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 100)
        nn.init.zeros_(self.fc.weight), nn.init.zeros_(self.fc.bias)

    def forward(self, images):
        return self.fc(images.flatten(1)), []


@pytest.mark.parametrize("copies", [1, 64])  # of both images: in one batch, and in two; shares of 128 are exact
def test_gradients_by_hand(copies):
    images = torch.tensor([[1.0, 0.0], [3.0, 0.0]]).view(2, 1, 1, 2).repeat(copies, 1, 1, 1)
    labels = torch.tensor([7, 7]).repeat(copies)
    assert (len(images) > IMAGES_PER_GRADIENT) == (copies > 1)
    weight, bias = loss_gradients(LinearNetwork(), images, labels, [7, 3], "batch")
    # Probability less target: 1/2 of class 3, 1/2 - 1 of class 7; times the mean image, (2, 0). The rows are in the labels' order.
    assert weight.tolist() == [[1, 0], [-1, 0]] and bias.tolist() == [0.5, -0.5]
    assert two_norm([weight, bias]) == pytest.approx(math.sqrt(2.5), abs=1e-15) and zero_share([weight, bias]) == 2 / 6
    assert torch.equal(loss_gradients(LinearNetwork(), images, labels, [7], "batch")[0], torch.zeros(1, 2))  # nothing to learn


def test_two_norm_neither_overflows_nor_underflows():
    assert two_norm(iter([torch.tensor([3e30]), torch.tensor([[4e30]])])) == pytest.approx(5e30, rel=1e-6)
    assert two_norm([torch.tensor([3e-30, 4e-30])]) == pytest.approx(5e-30, rel=1e-6)


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_gradients_are_the_mean_of_those_of_training_steps(batch_norm, images):
    """In float64, with batches of 54 and 53 images; the network stays as it is."""
    network = trained_like_network().double().train(batch_norm == "running")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, labels, classes = images.double(), torch.tensor([5, 90] * 53 + [5]), [90, 5, 41]
    gradients = loss_gradients(network, images, labels, classes, batch_norm)
    assert network.training is (batch_norm == "running") and all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    network.train(batch_norm == "batch")
    parts = [slice(0, 54), slice(54, 107)] if batch_norm == "batch" else [slice(0, 107)]
    position = torch.where(labels == 5, 1, 0)  # in the list of classes
    losses = [F.cross_entropy(network(images[part])[0][:, classes], position[part]) * (part.stop - part.start) / 107 for part in parts]
    expected = list(torch.autograd.grad(sum(losses), list(network.parameters())))
    for number in (-2, -1):
        assert expected[number].count_nonzero() == expected[number][classes].numel()
        expected[number] = expected[number][sorted(classes)]
    for mine, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip(gradients, loss_gradients(network, images, labels, classes, batch_norm), strict=True))


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_a_dead_unit_has_so_many_zero_gradients(batch_norm, images):
    """Of 8 units into it and 16 behind it, 3x3 weights each, its bias, and weight and bias of its batch norm."""
    network = build_network(3, width=8).train()
    for norm in network.norms:
        norm.momentum = 1.0
    network(images)  # the running statistics are now those of these images

    def zeros():
        gradients = loss_gradients(network, images, torch.arange(107) % 3, [0, 1, 2], batch_norm)
        if batch_norm == "batch":  # gradients of biases in front of batch norm are 0 or not, as rounding has it
            gradients = [gradient for gradient in gradients if gradient.dim() > 1]
        return round(zero_share(gradients) * sum(gradient.numel() for gradient in gradients))

    assert zeros() == 0
    with torch.no_grad():
        network.layer2[0].bn1.weight[3] = 0
        network.layer2[0].bn1.bias[3] = -1
    assert zeros() == 8 * 9 + 16 * 9 + (3 if batch_norm == "running" else 0)


# --- Weights and accuracy --------------------------------------------------------------------------------------------------------


def test_weight_magnitude_by_hand():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network.load_state_dict(
        {
            "0.weight": torch.tensor([[1.0, -2.0], [3.0, 0.0]]),
            "0.bias": torch.tensor([-0.5, 0.5]),
            "1.weight": torch.tensor([1.0, -1.0]),
            "1.bias": torch.tensor([0.0, 1.0]),
            "1.running_mean": torch.tensor([100.0, 100.0]),  # buffers do not count
            "1.running_var": torch.tensor([100.0, 100.0]),
            "1.num_batches_tracked": torch.tensor(100),
        }
    )
    assert weight_magnitude(network) == 10 / 10
    network[0].weight.data.zero_()
    assert weight_magnitude(network) == 4 / 10


def test_weight_magnitude_of_a_residual_network():
    network = ResNet18(width=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(-0.25)
    assert weight_magnitude(network) == 0.25


def test_accuracy_per_class_in_class_order():
    labels = torch.tensor([7, 7, 7, 7, 2, 2, 50, 50])
    predicted = [7, 7, 7, 2, 2, 50, 7, 2]
    logits = torch.zeros(8, 100)
    logits[torch.arange(8), predicted] = 1
    accuracies = accuracy_per_class(logits, labels, [50, 7, 2])
    assert accuracies.dtype == np.float32 and accuracies.tolist() == [0, 0.75, 0.5]
    logits[:, 99] = 2  # a class not met yet: its output does not count
    assert accuracy_per_class(logits, labels, [2, 50, 7]).tolist() == [0.5, 0, 0.75]


def test_accuracy_per_class_of_all_classes(rng):
    class_order = rng.permutation(100)
    labels = torch.arange(100).repeat(4)
    logits = torch.nn.functional.one_hot(labels, 100).float()
    logits[labels == class_order[17]] = 0
    logits[labels == class_order[17], class_order[18]] = 1
    accuracies = accuracy_per_class(logits, labels, class_order)
    assert accuracies[17] == 0 and accuracies.sum() == 99


def test_accuracy_per_class_needs_an_image_of_each_class():
    with pytest.raises(ValueError, match="no image of class 4"):
        accuracy_per_class(torch.zeros(2, 100), torch.tensor([3, 3]), [3, 4])
