import pytest
import torch

from incremental_cifar.algorithms.soft_reset import SoftReset
from incremental_cifar.resnet import build_network
from incremental_cifar.training import TrainingStep, make_optimizer, momentum_buffers, unseen_mask


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("share", [0.75, 1.0])
def test_parameters_go_back_so_far_and_statistics_stay(share, momentum):
    """To the initial network of the run, not to another draw; SGD's momentum begins anew."""
    network = build_network(11, width=2).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, 0.1, momentum, 0.0005)
    method = SoftReset(network, optimizer, share)
    step = TrainingStep(network, optimizer, "fp32", [method])
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for task in range(2):
        step(images, torch.arange(6), unseen_mask(range(10), torch.device("cpu")), task)
        trained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        buffers = momentum_buffers(network, optimizer)
        assert any(buffer.any() for buffer in buffers) == (momentum > 0)
        method.end_task(task)
        initial = dict(build_network(11, width=2).named_parameters())
        for name, tensor in network.state_dict().items():
            if name in initial:
                torch.testing.assert_close(tensor, share * initial[name].detach() + (1 - share) * trained[name])
                assert share < 1 or torch.equal(tensor, initial[name])
            else:
                assert torch.equal(tensor, trained[name])
        assert network.bn1.running_mean.any() and not any(buffer.any() for buffer in buffers)


def test_a_run_changes_between_tasks_alone(uninterrupted):
    """A tiny run's first task is the base system's; its second is not."""
    for epoch, is_same in ((4, True), (8, False)):
        name = f"model_parameters/index-0_epoch-{epoch}.pt"
        models = [(uninterrupted(algorithm) / name).read_bytes() for algorithm in ("base_deep_learning_system", "soft_reset")]
        assert (models[0] == models[1]) == is_same
