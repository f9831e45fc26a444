import hashlib
import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import REFERENCE

from incremental_cifar.resnet import ResNet18, build_network, hidden_layers, initialise
from incremental_cifar.seeds import draw_class_order, experiment_seed

INITIAL_STATES = json.loads((REFERENCE / "initial_state.json").read_text())


@pytest.mark.parametrize("reference", INITIAL_STATES, ids=lambda reference: f"index {reference['index']}")
def test_seed_class_order_and_initial_weights_equal_the_released_code(reference):
    seed = experiment_seed(reference["index"])
    assert seed == reference["random_seed"]
    assert draw_class_order(seed).tolist() == reference["class_order"]
    digest = hashlib.sha256()
    for name, tensor in build_network(seed).state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == reference["initial_state_sha256"]


def test_building_a_network_leaves_the_random_generators_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    expected = (torch.rand(1).item(), np.random.rand())
    torch.manual_seed(5)
    np.random.seed(5)
    draw_class_order(experiment_seed(3))
    build_network(1, width=2)
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_names_and_shapes_are_torchvisions():
    theirs = torchvision.models.resnet18(num_classes=100).state_dict()
    ours = ResNet18().state_dict()
    biases = {name for name in ours if name not in theirs}
    assert set(theirs) <= set(ours)
    assert len(biases) == 20 and all(name.endswith(".bias") for name in biases)  # one per convolution
    different = {name for name in theirs if theirs[name].shape != ours[name].shape}
    assert different == {"conv1.weight"} and ours["conv1.weight"].shape == (64, 3, 3, 3)
    assert sum(parameter.numel() for parameter in ResNet18().parameters()) == 11_224_932


def test_output_equals_torchvisions_network_with_the_same_weights():
    ours = build_network(7, width=64).eval()
    theirs = torchvision.models.resnet18(num_classes=100)
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1)
    theirs.maxpool = torch.nn.Identity()
    for module in list(theirs.modules()):
        if isinstance(module, torch.nn.Conv2d) and module.bias is None:
            module.bias = torch.nn.Parameter(torch.zeros(module.out_channels))
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images)[0], theirs.eval()(images))


def test_features_are_the_hidden_layers_outputs():
    network = build_network(0, width=2)
    images = torch.randn(3, 3, 32, 32)
    seen = {}
    for name in ("bn1", "layer1.0.bn1", "layer4.1.bn1"):
        network.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.clone()}))
    network.fc.register_forward_hook(lambda module, inputs, output: seen.update(pooled=inputs[0]))
    _, features = network(images)
    layers = hidden_layers(network)
    assert [feature.shape[1] for feature in features] == [layer.num_units for layer in layers] == [2] * 5 + [4] * 4 + [8] * 4 + [16] * 4
    assert [feature.shape[2:] for feature in features] == [(32, 32)] * 5 + [(16, 16)] * 4 + [(8, 8)] * 4 + [(4, 4)] * 3 + [()]
    assert torch.equal(features[0], seen["bn1"].relu())
    assert torch.equal(features[1], seen["layer1.0.bn1"].relu())
    assert torch.equal(features[15], seen["layer4.1.bn1"].relu())
    assert torch.equal(features[16], seen["pooled"])
    assert all((feature >= 0).all() for feature in features)


def test_hidden_layers_follow_the_main_path():
    network = ResNet18(width=2)
    names = {module: name for name, module in network.named_modules()}
    layers = [(names[layer.incoming], names[layer.batch_norm], names[layer.outgoing]) for layer in hidden_layers(network)]
    assert layers[:3] == [
        ("conv1", "bn1", "layer1.0.conv1"),
        ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"),
        ("layer1.0.conv2", "layer1.0.bn2", "layer1.1.conv1"),
    ]
    assert layers[-1] == ("layer4.1.conv2", "layer4.1.bn2", "fc")
    assert len(layers) == 17 and not any("downsample" in name for layer in layers for name in layer)


def test_initialise_draws_a_trained_network_anew():
    network = build_network(0, width=4)
    for tensor in network.state_dict().values():
        tensor.fill_(3)
    initialise(network, torch.Generator().manual_seed(1))
    state = network.state_dict()
    assert state["layer3.0.conv2.weight"].std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.05)  # gain of a ReLU, fan in
    assert state["fc.weight"].std().item() == pytest.approx((1 / 32) ** 0.5, rel=0.05)  # gain of a linear unit
    assert (state["bn1.weight"] == 1).all()
    assert (state["bn1.running_mean"] == 3).all() and (state["bn1.running_var"] == 3).all()  # as released
    assert all((state[name] == 0).all() for name in ("bn1.bias", "conv1.bias", "fc.bias", "layer2.0.downsample.0.bias"))
    again = build_network(3, width=4)
    initialise(again, torch.Generator().manual_seed(1))
    assert all(torch.equal(again.state_dict()[name], parameter) for name, parameter in network.named_parameters())
