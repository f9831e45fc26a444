"""The numeric library computes this network rightly, for whatever width, batch, precision and number of threads a config may ask.

A fault of the library may be a crash, a hang or a wrong gradient, on some instruction sets only. So every case is a process of its own,
this file as a script, in which oneDNN may use all instructions of this machine, or AVX2 and no later ones.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, STRESS, stress_counts
from torch import Tensor

from incremental_cifar.resnet import ResNet18, build_network
from incremental_cifar.training import EVALUATION_BATCH_SIZE
from incremental_cifar.unit_metrics import hidden_features

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 64)
THREADS = (1, 2, 4, 7)
INSTRUCTION_SETS = ("DEFAULT", "AVX2")
TRAINING_BATCHES = (1, 45, 90)  # a last batch of one image, an odd one, the paper's
# By how much a gradient may differ from float64's: share of itself, and of all gradients together, since some are 0 but for rounding
# (those of biases in front of batch norm).
TOLERANCE = {"fp32": (2e-3, 1e-5), "bf16": (0.3, 0.1)}

GRID = [(width, threads, instructions) for width in WIDTHS for threads in THREADS for instructions in INSTRUCTION_SETS]
SAMPLE = [(4, 2, "AVX2"), (4, 2, "DEFAULT"), (8, 4, "DEFAULT"), (8, 7, "DEFAULT"), (12, 2, "AVX2")]


@pytest.mark.parametrize(("width", "threads", "instructions"), GRID if STRESS else SAMPLE)
def test_forward_and_backward_equal_float64(width, threads, instructions):
    command = [sys.executable, __file__, str(width), str(threads)]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    settings = {"ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": paths}
    environment = os.environ | settings | {"OMP_WAIT_POLICY": "PASSIVE"}  # threads beyond the cores do not keep each other waiting
    checked = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert checked.returncode == 0, f"exit status {checked.returncode}: {checked.stdout}{checked.stderr}"
    what = "networks equal to float64: widths, threads, instructions"
    stress_counts[what] = str(int(stress_counts.get(what, 0)) + 1)


# --- One process -----------------------------------------------------------------------------------------------------------------


def check_training(width: int, batch: int, precision: str) -> None:
    """Compare a forward and a backward pass with float64, where each ReLU lets pass what it let pass here: kinks are no errors."""
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 100, (batch,), generator=generator)
    masks: list[Tensor] = []

    relu = torch.relu_

    def noting_relu(x: Tensor) -> Tensor:
        masks.append(x.detach() > 0)
        return relu(x)

    network = build_network(0, width).to(memory_format=torch.channels_last)
    torch.relu_ = noting_relu
    actual = loss_and_gradients(network, images.to(memory_format=torch.channels_last), labels, precision)
    torch.relu_ = lambda x: x * masks.pop(0)
    expected = loss_and_gradients(build_network(0, width).double(), images.double(), labels, "fp32")
    torch.relu_ = relu
    whole = torch.stack([right.norm() for right in expected.values()]).norm()
    for name, right in expected.items():
        error = (actual[name].double() - right).norm()
        where = f"width {width}, batch {batch}, {precision}: {name}"
        own, common = TOLERANCE[precision]
        assert error <= own * right.norm() + common * whole, f"{where} is off by {error / right.norm():.2g}"


def loss_and_gradients(network: ResNet18, images: Tensor, labels: Tensor, precision: str) -> dict[str, Tensor]:
    """The loss, in training mode, and the gradients of all parameters by their names."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits, _ = network(images)
    loss = F.cross_entropy(logits.to(network.fc.weight.dtype), labels)
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in network.named_parameters()}}


@torch.no_grad()
def check_inference(width: int) -> None:
    """Compare with float64 what evaluation and analysis do."""
    network, exact = build_network(0, width).to(memory_format=torch.channels_last), build_network(0, width).double()
    images = torch.randn(EVALUATION_BATCH_SIZE["cpu"] + 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for batch in (images[:-1], images[:1]):  # a full batch and a last one
        network.eval(), exact.eval()
        torch.testing.assert_close(network(batch)[0].double(), exact(batch.double())[0], rtol=1e-3, atol=1e-3)
    for layer, right in zip(hidden_features(network, images, "batch"), hidden_features(exact, images.double(), "batch"), strict=True):
        torch.testing.assert_close(torch.cat(layer), torch.cat(right).float(), rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    check_inference(int(sys.argv[1]))
    for precision in TOLERANCE:
        for batch in TRAINING_BATCHES:
            check_training(int(sys.argv[1]), batch, precision)
