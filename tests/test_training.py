import copy
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, differing_results, tiny_arguments

import incremental_cifar_experiment
from incremental_cifar.algorithms.continual_backprop import ContinualBackprop
from incremental_cifar.algorithms.weight_noise import WeightNoise
from incremental_cifar.augmentation import augmented, draw_transformations
from incremental_cifar.cifar100 import ImageSet, draw_synthetic_images
from incremental_cifar.command_line import run_script
from incremental_cifar.config import UserError
from incremental_cifar.resnet import build_network
from incremental_cifar.seeds import Purpose, generator_for
from incremental_cifar.training import (
    EVALUATION_BATCH_SIZE,
    STEPS_PER_CHUNK,
    EvaluationStep,
    TrainingStep,
    choose_device,
    evaluate,
    make_optimizer,
    momentum_buffers,
    set_arithmetic,
    set_stepsize,
    stepsize_at,
    train_one_epoch,
    unseen_mask,
)

CPU = torch.device("cpu")
CLASS_ORDER = np.random.RandomState(0).permutation(100)


@pytest.fixture
def network():
    return build_network(11, width=2).to(memory_format=torch.channels_last)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.from_numpy(CLASS_ORDER[:10])[torch.randint(0, 10, (6,), generator=generator)]
    return torch.randn(6, 3, 32, 32, generator=generator), labels


@pytest.fixture(scope="module")
def image_set():
    return ImageSet(np.random.default_rng(1).integers(0, 256, (100, 7, 32, 32, 3), dtype=np.uint8), CPU)


def plain_loss(network, images, labels, classes):
    """The protocol's loss: the seen classes' logits alone, in class order, and the label's position in it."""
    logits = network(images)[0][:, torch.from_numpy(classes)]
    positions = torch.tensor([classes.tolist().index(label) for label in labels])
    return F.cross_entropy(logits, positions), (logits.argmax(1) == positions).float().mean()


def test_masking_unseen_classes_equals_slicing_the_logits(network, batch):
    images, labels = batch
    classes = CLASS_ORDER[:10]
    loss, accuracy = plain_loss(network, images, labels, classes)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    masked = network(images)[0] + unseen_mask(classes, CPU)
    masked_loss = F.cross_entropy(masked, labels)
    masked_loss.backward()
    torch.testing.assert_close(masked_loss, loss)
    assert (masked.argmax(1) == labels).float().mean() == accuracy
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    unseen = torch.from_numpy(CLASS_ORDER[10:])
    assert (network.fc.weight.grad[unseen] == 0).all()


def test_a_step_is_that_of_plain_sgd(network, batch):
    """Three steps with the step size in a tensor and momentum from zeros, against torch.optim.SGD as everybody uses it."""
    images, labels = batch
    classes = CLASS_ORDER[:10]
    twin = copy.deepcopy(network)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0005)
    optimizer = make_optimizer(network, stepsize=0.5, momentum=0.9, weight_decay=0.0005)
    set_stepsize(optimizer, 0.1)
    training_step = TrainingStep(network, optimizer)
    for step in range(3):
        expected_loss, expected_accuracy = plain_loss(twin, images, labels, classes)
        plain.zero_grad()
        expected_loss.backward()
        plain.step()
        loss, accuracy = training_step(images, labels, unseen_mask(classes, CPU), step)
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-4, atol=1e-5)
        assert accuracy == expected_accuracy
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for ours, parameter in zip(momentum_buffers(network, optimizer), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, plain.state[parameter]["momentum_buffer"], rtol=1e-2, atol=1e-3)


def test_order_of_a_step_is_sgd_then_reset_then_noise(network, batch):
    """A twin that does the three by hand, in this order, on a step in which units are reset; another order gives other weights."""
    images, labels = batch
    mask = unseen_mask(CLASS_ORDER[:10], CPU)
    twin = copy.deepcopy(network)
    parts = []
    for net in (network, twin):
        optimizer = make_optimizer(net, 0.1, 0.9, 0.0005)
        parts.append((optimizer, ContinualBackprop(net, 3, 0.5, maturity_threshold=1), WeightNoise(net, 3, 0.01)))
    training_step = TrainingStep(network, parts[0][0], algorithms=parts[0][1:])
    for step in range(3):
        training_step(images, labels, mask, step)

        optimizer, continual_backprop, weight_noise = parts[1]
        logits, features = twin(images)
        optimizer.zero_grad()
        F.cross_entropy(logits + mask, labels).backward()
        optimizer.step()
        continual_backprop.observe([feature.detach() for feature in features])
        continual_backprop.after_step(step)
        weight_noise.after_step(step)
    assert parts[0][1].births.max() > 0
    for ours, theirs in zip(network.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    # Outgoing weights of a unit reset last are silent but for the noise added afterwards.
    chosen = parts[0][1].layer_births[16] == 3
    assert chosen.any() and network.fc.weight[:, chosen].std().item() == pytest.approx(0.01, rel=0.3)


def test_noise_depends_on_seed_and_step_alone_and_has_its_deviation(network):
    before = [parameter.detach().clone() for parameter in network.parameters()]
    noise = WeightNoise(network, random_seed=5, std=0.02)
    noise.after_step(step=8)
    added = torch.cat([(after.detach() - start).flatten() for after, start in zip(network.parameters(), before, strict=True)])
    assert added.std().item() == pytest.approx(0.02, rel=0.03) and added.mean().item() == pytest.approx(0, abs=0.001)
    assert (added != 0).float().mean() > 0.99
    with torch.no_grad():
        for parameter, start in zip(network.parameters(), before, strict=True):
            parameter.copy_(start)
    other = WeightNoise(network, random_seed=5, std=0.02)
    other.after_step(step=3)
    with torch.no_grad():
        for parameter, start in zip(network.parameters(), before, strict=True):
            parameter.copy_(start)
    other.after_step(step=8)
    again = torch.cat([(after.detach() - start).flatten() for after, start in zip(network.parameters(), before, strict=True)])
    assert torch.equal(again, added)


def test_step_sizes_of_the_paper_and_of_short_tasks():
    sizes = [stepsize_at(epoch, 200, 0.1) for epoch in range(200)]
    assert sizes[0] == sizes[59] == 0.1
    assert sizes[60] == sizes[119] == pytest.approx(0.02)
    assert sizes[120] == sizes[159] == pytest.approx(0.004)
    assert sizes[160] == sizes[199] == pytest.approx(0.0008)
    assert stepsize_at(199, 200, 0.001) == pytest.approx(0.000008)  # the released code rounds this to 0.00001
    assert [stepsize_at(epoch, 8, 1.0) for epoch in range(8)] == pytest.approx([1, 1, 1, 0.2, 0.2, 0.04, 0.04, 0.008])
    assert stepsize_at(0, 1, 0.1) == 0.1


def test_an_epoch_trains_on_every_image_once_in_its_own_order(image_set, monkeypatch):
    seen, transformed = [], []

    def record(images, labels, mask, step):
        seen.append((step, labels.clone(), mask))
        transformed.append(images.clone())
        return torch.tensor(float(step)), torch.tensor(0.5)

    losses, accuracies = torch.zeros(20), torch.zeros(20)
    classes = CLASS_ORDER[:5]
    reports = []
    arguments = (record, image_set, classes, 9, 123)
    train_one_epoch(*arguments, 2, losses, accuracies, first_step=10, after_step=lambda *report: reports.append(report))
    assert [step for step, _, _ in seen] == [10, 11, 12, 13] and [len(labels) for _, labels, _ in seen] == [9, 9, 9, 8]
    assert reports == [(1, 9), (2, 9), (3, 9), (4, 8)]
    assert losses[10:14].tolist() == [10, 11, 12, 13] and losses[:10].sum() == 0 and accuracies[13] == 0.5
    labels = torch.cat([labels for _, labels, _ in seen])
    assert sorted(labels.tolist()) == sorted(np.repeat(classes, 7).tolist())

    # The order and the transformations follow from the seed and the epoch.
    generator = generator_for(123, Purpose.EPOCH, 2)
    indices = image_set.indices_of(classes)
    indices = indices[torch.randperm(35, generator=generator)]
    expected, expected_labels = augmented(image_set, indices, draw_transformations(35, generator))
    assert torch.equal(labels, expected_labels) and torch.equal(torch.cat(transformed), expected)
    # How many steps' images are transformed at a time changes nothing.
    chunk = [list(seen), torch.cat(transformed)]
    seen.clear()
    transformed.clear()
    monkeypatch.setitem(STEPS_PER_CHUNK, "cpu", 3)
    train_one_epoch(*arguments, 2, losses, accuracies, first_step=10)
    assert torch.equal(torch.cat(transformed), chunk[1])
    assert all(torch.equal(now[1], then[1]) and now[0] == then[0] for now, then in zip(seen, chunk[0], strict=True))
    first = labels
    seen.clear()
    train_one_epoch(*arguments, 3, losses, accuracies, first_step=0)
    assert not torch.equal(torch.cat([labels for _, labels, _ in seen]), first)


def test_evaluation_is_the_mean_over_images_of_the_network_in_eval_mode(network, image_set, monkeypatch):
    monkeypatch.setitem(EVALUATION_BATCH_SIZE, "cpu", 16)
    classes = CLASS_ORDER[:10]
    before = copy.deepcopy(network.state_dict())
    evaluation_step = EvaluationStep(network)
    loss, accuracy = evaluate(evaluation_step, image_set, classes)
    network.eval()
    images, labels = image_set.get(image_set.indices_of(classes))
    expected_loss, expected_accuracy = plain_loss(network, images, labels.tolist(), classes)
    torch.testing.assert_close(loss, expected_loss.detach())
    assert accuracy.item() == pytest.approx(expected_accuracy.item())
    network.train()
    evaluate(evaluation_step, image_set, classes)
    assert network.training  # as before
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_test_images_are_transformed_only_if_asked_for(network, image_set):
    classes = CLASS_ORDER[:10]
    step = EvaluationStep(network)
    plain = evaluate(step, image_set, classes)[0]
    transformed = [evaluate(step, image_set, classes, augmentation_generator=generator_for(1, Purpose.TEST_IMAGES, 0))[0] for _ in "12"]
    assert transformed[0] == transformed[1] != plain
    network.eval()
    indices = image_set.indices_of(classes)
    transformations = draw_transformations(len(indices), generator_for(1, Purpose.TEST_IMAGES, 0))
    images, labels = augmented(image_set, indices, transformations)
    torch.testing.assert_close(transformed[0], plain_loss(network, images, labels.tolist(), classes)[0].detach())


def test_bf16_steps_stay_near_fp32(batch):
    images, labels = batch
    mask = unseen_mask(CLASS_ORDER[:10], CPU)
    losses = {}
    for precision in ("fp32", "bf16", "tf32"):
        network = build_network(11, width=8).to(memory_format=torch.channels_last)
        step = TrainingStep(network, make_optimizer(network, 0.01, 0.9, 0.0005), precision)
        losses[precision] = torch.stack([step(images, labels, mask, number)[0] for number in range(4)])
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert torch.equal(losses["tf32"], losses["fp32"])  # on a CPU
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.05, atol=0.02)
    assert not torch.equal(losses["bf16"], losses["fp32"])


@pytest.mark.parametrize("device", [pytest.param(CPU, id="cpu"), pytest.param(GPU, marks=pytest.mark.gpu, id="gpu")])
def test_bf16_is_autocasts_to_the_bit(device):
    """Logits, features, gradients and networks of some steps, and an evaluation, against the plain network under torch.autocast."""
    set_arithmetic("bf16", deterministic=True)
    network = build_network(11, width=16).to(device, memory_format=torch.channels_last)
    twin = copy.deepcopy(network)
    optimizer, twin_optimizer = (make_optimizer(net, 0.05, 0.9, 0.0005) for net in (network, twin))
    training_step = TrainingStep(network, optimizer, "bf16")
    forward, outputs = training_step.forward, []
    training_step.forward = lambda images: outputs.append(forward(images)) or outputs[-1]
    generator = torch.Generator().manual_seed(0)
    mask = unseen_mask(CLASS_ORDER[:10], device)
    for step in range(4):
        images = torch.randn(9, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
        labels = torch.from_numpy(CLASS_ORDER[:10])[torch.randint(0, 10, (9,), generator=generator)].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            expected, expected_features = twin(images)
        twin_optimizer.zero_grad()
        expected_loss = F.cross_entropy(expected.float() + mask, labels)
        expected_loss.backward()
        twin_optimizer.step()
        loss, _ = training_step(images, labels, mask, step)
        logits, features = outputs[-1]
        assert logits.dtype == torch.bfloat16 and torch.equal(logits, expected) and torch.equal(loss, expected_loss)
        assert all(torch.equal(own, other) for own, other in zip(features, expected_features, strict=True))
        for (name, own), other in zip(network.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad) and torch.equal(own, other), name
        assert all(torch.equal(own, other) for own, other in zip(network.buffers(), twin.buffers(), strict=True))

    evaluation_step = EvaluationStep(network, training_step.half)
    evaluation_step.refresh()
    loss, num_correct = evaluation_step(images, labels, mask)
    twin.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        expected = twin(images)[0].float() + mask
    assert torch.equal(loss, F.cross_entropy(expected, labels, reduction="sum")) and num_correct == (expected.argmax(1) == labels).sum()


@pytest.mark.parametrize(
    ("device", "precision", "loss_tolerance", "accuracy_tolerance"),
    [
        pytest.param(CPU, "fp32", 1e-5, 1e-4, id="cpu, fp32"),
        pytest.param(CPU, "bf16", 5e-3, 0.02, id="cpu, bf16"),
        # One of 400 images may be on the edge. TF32 rounds to 11 bits, bf16 to 8, and folding only moves where.
        pytest.param(GPU, "fp32", 1e-5, 1 / 400, marks=pytest.mark.gpu, id="gpu, fp32"),
        pytest.param(GPU, "tf32", 5e-3, 0.02, marks=pytest.mark.gpu, id="gpu, tf32"),
        pytest.param(GPU, "bf16", 5e-3, 0.02, marks=pytest.mark.gpu, id="gpu, bf16"),
    ],
)
def test_folded_evaluation_is_the_plain_one_to_rounding(device, precision, loss_tolerance, accuracy_tolerance):
    """Of a network after 60 steps; refolded after one more, and the network stays as it is."""
    set_arithmetic(precision, deterministic=True)
    train_set, test_set = (ImageSet(images, device) for images in draw_synthetic_images(20, 20))
    network = build_network(11, width=8).to(device, memory_format=torch.channels_last)
    training_step = TrainingStep(network, make_optimizer(network, 0.05, 0.9, 0.0005), precision)
    plain, folded = (EvaluationStep(network, training_step.half, is_folded) for is_folded in (False, True))
    losses, accuracies = torch.zeros(2, 20, device=device)
    for epoch in range(4):
        train_one_epoch(training_step, train_set, range(20), 20, 11, epoch, losses, accuracies, 0)
        if epoch < 2:
            continue
        before = copy.deepcopy(network.state_dict())
        loss, accuracy = evaluate(folded, test_set, range(20))
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) and network.training
        expected_loss, expected_accuracy = evaluate(plain, test_set, range(20))
        assert expected_accuracy > 0.07  # by chance: 0.05
        torch.testing.assert_close(loss, expected_loss, rtol=loss_tolerance, atol=0)
        torch.testing.assert_close(accuracy, expected_accuracy, rtol=0, atol=1.01 * accuracy_tolerance)


def test_a_run_with_folded_evaluation_learns_the_same_and_measures_it_to_rounding(tmp_path):
    algorithm = "continual_backpropagation"
    for folded in (False, True):
        arguments = tiny_arguments(
            algorithm, tmp_path / str(folded), fold_batch_norm=folded, network_width=4, num_tasks=2, epochs_per_task=3
        )
        assert run_script(incremental_cifar_experiment.main, arguments) == 0
    plain, folded = (tmp_path / str(folded) / algorithm for folded in (False, True))
    losses = [f"{images}_loss_per_epoch/index-0.npy" for images in ("test", "validation")]
    assert differing_results(plain, folded) == losses  # models, curves of the training and accuracies are the same files
    for name in losses:
        np.testing.assert_allclose(np.load(folded / name), np.load(plain / name), rtol=1e-5)


@pytest.mark.parametrize("deterministic", [True, False])
def test_cublas_gets_its_workspace_in_every_run(deterministic, monkeypatch):
    """It reads the variable once in a process: a later run may be a deterministic one."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_arithmetic("fp32", deterministic)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_arithmetic("fp32", deterministic=True)


def test_a_workspace_with_which_cublas_is_not_deterministic_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    try:
        set_arithmetic("fp32", deterministic=True)  # without a GPU it does not matter
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        set_arithmetic("fp32", deterministic=False)
        with pytest.raises(UserError, match=r'CUBLAS_WORKSPACE_CONFIG: the environment says ":0:0", .* it must be :4096:8 or :16:8'):
            set_arithmetic("fp32", deterministic=True)
    finally:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        set_arithmetic("fp32", deterministic=True)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(UserError, match=r"sees 0 CUDA GPUs; use device=cpu, or a GPU, a driver and a PyTorch that go together$"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r'"cuda:2" is not here, .* sees 2 CUDA GPUs; use device=cpu, or device=cuda:0$'):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(UserError, match=r"Some GPU has compute capability 6\.1, and PyTorch .* needs 7\.5"):
        choose_device("cuda")
