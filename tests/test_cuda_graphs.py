"""The recorded steps: on any machine with a stand-in for CUDA's recorder, and on a GPU, where there is one, with the real one.

The stand-in records PyTorch's operations, with the tensors they were called with, and replays them into the same memory. It is as
strict as a CUDA graph: a number that the host has changed since, or memory that has moved, gives wrong results here too, and asking the
device for a value fails.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, STRESS, TINY, TINY_ALGORITHM, everything_in, stored_results, tiny_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import incremental_cifar_experiment
from incremental_cifar import cifar100, training
from incremental_cifar.augmentation import augmented, draw_transformations
from incremental_cifar.cifar100 import ImageSet
from incremental_cifar.command_line import run_script
from incremental_cifar.config import load_config
from incremental_cifar.continual_backprop import ContinualBackprop
from incremental_cifar.cuda_graphs import WARM_UP_CALLS, Recorded
from incremental_cifar.resnet import ResNet18, build_network
from incremental_cifar.training import (
    EvaluationStep,
    TrainingStep,
    WeightNoise,
    compiled,
    evaluate,
    make_optimizer,
    set_arithmetic,
    set_stepsize,
    train_one_epoch,
    unseen_mask,
)

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class OperationRecorder(TorchDispatchMode):
    """Runs and notes every operation of PyTorch, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        outputs = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, outputs))
        return outputs

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, outputs in self.operations:
            again = operation(*args, **kwargs)
            for output, value in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    output.detach().copy_(value)  # fresh memory: put it where the later operations look for it


def record_operations(function, device):
    for _ in range(WARM_UP_CALLS):
        function()
    with OperationRecorder() as recorder:
        outputs = function()
    return recorder.replay, outputs


class Counter:
    """Counts the calls of a function."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def test_what_is_replayed_is_the_function_on_new_inputs_and_on_its_own_memory():
    total = torch.zeros(2)

    def add(values):
        total.add_(values)
        return total * 2, values.sum()

    counted = Counter(add)
    recorded = Recorded(counted, (torch.ones(2),), [total], record_operations)
    assert total.tolist() == [0, 0]  # as before
    calls = counted.calls
    assert [output.tolist() for output in recorded(torch.tensor([1.0, 2.0]))] == [[2, 4], 3]
    assert [output.tolist() for output in recorded(torch.tensor([5.0, 0.0]))] == [[12, 4], 5]
    total.fill_(1)
    assert [output.tolist() for output in recorded(torch.tensor([0.0, 1.0]))] == [[2, 4], 1]
    assert counted.calls == calls
    assert recorded(torch.tensor([3.0]))[1] == 3 and counted.calls == calls + 1  # another shape: the function itself


def test_memory_is_as_before_where_recording_fails(monkeypatch):
    total = torch.zeros(2)

    def wait(values):
        total.add_(values)
        return (values * total.sum().item(),)

    monkeypatch.setattr(Recorded, "first_failure", None)
    with pytest.raises(RuntimeError, match="not permitted"):
        Recorded(wait, (torch.ones(2),), [total], record_operations)
    assert total.tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="not permitted"):  # never again in this process
        Recorded(lambda values: (values,), (torch.ones(2),), [], record_operations)


def test_the_stand_in_is_as_strict_as_a_cuda_graph():
    """A number of the host's is recorded as it was: what a step must not do shows up as a wrong result."""
    state = {"factor": 2.0}
    recorded = Recorded(lambda values: (values * state["factor"],), (torch.ones(1),), [], record_operations)
    state["factor"] = 3.0
    assert recorded(torch.ones(1))[0].item() == 2.0


def steps(algorithm, device, precision, num_steps=60, is_recorded=False, width=4, is_compiled=False):
    """Loss and accuracy of steps with changing images, classes and step size and of an evaluation; then what the network has become."""
    config = load_config(f"cfg/{algorithm}.json", ["replacement_rate=0.01", "maturity_threshold=10"] if "continual" in algorithm else [])
    set_arithmetic(precision, deterministic=True)
    network = build_network(11, width).to(device, memory_format=torch.channels_last)
    forward = compiled(network, deterministic=True) if is_compiled else None
    optimizer = make_optimizer(network, 0.1, config.momentum, config.weight_decay)
    continual_backprop = None
    if config.use_cbp:
        continual_backprop = ContinualBackprop(network, 3, config.replacement_rate, config.maturity_threshold, config.utility_function)
    weight_noise = WeightNoise(network, 3, 0.001) if config.noise_std else None
    training_step = TrainingStep(network, optimizer, precision, continual_backprop, weight_noise, forward)
    evaluation_step = EvaluationStep(network, precision, forward)
    if is_recorded:
        training_step.record(9)
        evaluation_step.record()
        replay = training_step.learn.replay = Counter(training_step.learn.replay)
    generator = torch.Generator().manual_seed(0)
    values = []
    for step in range(num_steps):
        mask = unseen_mask(np.arange(10 if step < 30 else 20), device)
        set_stepsize(optimizer, 0.05 if step < 40 else 0.01)
        images = torch.randn(9 if step % 8 else 5, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (len(images),), generator=generator).to(device)
        values.append(torch.stack(training_step(images, labels, mask, step)).cpu().clone())
    assert not is_recorded or replay.calls == sum(step % 8 != 0 for step in range(num_steps))
    batch = training.EVALUATION_BATCH_SIZE[device.type]
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    values.append(torch.stack(evaluation_step(images, torch.zeros(batch, dtype=torch.int64, device=device), mask)).cpu())
    state = copy.deepcopy(network.cpu().state_dict())
    if continual_backprop is not None:
        assert num_steps < 60 or continual_backprop.births.max() > 30  # units were reset between replays
        state["magnitudes"] = continual_backprop.magnitudes.cpu()
    return torch.stack(values), state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ["continual_backpropagation", "shrink_and_perturb"])
def test_replayed_steps_are_the_plain_ones_to_the_bit(algorithm, precision, monkeypatch):
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, "cpu", 20)
    plain, plain_state = steps(algorithm, CPU, precision)
    monkeypatch.setattr(Recorded.__init__, "__defaults__", (record_operations,))
    replayed, state = steps(algorithm, CPU, precision, is_recorded=True)
    assert torch.equal(replayed, plain) and torch.isfinite(plain).all()
    assert all(torch.equal(value, plain_state[name]) for name, value in state.items())


@pytest.fixture
def recorder(monkeypatch):
    """From here on, runs on this CPU record their steps."""

    def use(record):
        monkeypatch.setattr(Recorded.__init__, "__defaults__", (record,))
        monkeypatch.setattr(Recorded, "first_failure", None)
        monkeypatch.setattr(incremental_cifar_experiment.IncrementalCIFARExperiment, "has_graphs", property(lambda self: True))

    return use


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_whole_runs_from_recorded_steps_are_the_plain_runs(algorithm, tmp_path, recorder, monkeypatch, capsys):
    """Tasks, step sizes, resets and noise between replays, best network, last smaller batches, evaluation: everything but CUDA itself."""
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, "cpu", 4)  # full batches and smaller ones of 5, 10, ..., 30 images
    run_one(algorithm, tmp_path / "plain", batch_size=12)
    recorder(record_operations)
    experiment = run_one(algorithm, tmp_path / "recorded", batch_size=12)
    assert isinstance(experiment.training_step.learn, Recorded) and isinstance(experiment.evaluation_step.evaluate, Recorded)
    assert experiment.is_recorded and "warning" not in capsys.readouterr().err
    assert stored_results(tmp_path / "recorded" / algorithm) == stored_results(tmp_path / "plain" / algorithm)


def run_one(algorithm, results_dir, **settings):
    overrides = TINY | TINY_ALGORITHM.get(algorithm, {}) | settings
    values = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()]
    config = load_config(f"cfg/{algorithm}.json", [*values, f"results_dir={results_dir}"])
    experiment = incremental_cifar_experiment.IncrementalCIFARExperiment(config.to_dict(), str(results_dir / algorithm), 0, verbose=False)
    experiment.run()
    return experiment


@pytest.mark.parametrize("where", ["forward", "recording"])
def test_where_recording_is_impossible_a_run_warns_once_and_gives_the_same(where, tmp_path, uninterrupted, recorder, monkeypatch, capsys):
    def refuse(function, device):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def fail_in_forward(function, device):
        with monkeypatch.context() as inside:
            inside.setattr(training, "autocast", lambda *arguments: (_ for _ in ()).throw(RuntimeError("operation not permitted")))
            function()

    recorder(refuse if where == "recording" else fail_in_forward)
    experiment = run_one("continual_backpropagation", tmp_path)
    errors = capsys.readouterr().err
    assert errors.count("warning") == 1 and "cannot be recorded as a CUDA graph (operation not permitted" in errors
    assert experiment.is_recorded is False and experiment.environment["cuda_graphs"] is False
    assert stored_results(tmp_path / "continual_backpropagation") == stored_results(uninterrupted("continual_backpropagation"))
    run_one("continual_backpropagation", tmp_path / "again", num_tasks=1)  # not tried again in this process, and not said again
    assert "warning" not in capsys.readouterr().err


def test_where_only_the_evaluation_cannot_be_recorded_the_training_still_is(tmp_path, uninterrupted, recorder, monkeypatch, capsys):
    evaluate_batch = EvaluationStep.evaluate_batch

    def without_gradients(self, images, labels, mask):
        if self.evaluate == self.evaluate_batch and Recorded.first_failure is None:
            raise RuntimeError("this part not")
        return evaluate_batch(self, images, labels, mask)

    recorder(record_operations)
    monkeypatch.setattr(EvaluationStep, "evaluate_batch", without_gradients)
    experiment = run_one("base_deep_learning_system", tmp_path)
    assert experiment.is_recorded and isinstance(experiment.training_step.learn, Recorded)
    assert "an evaluation step cannot be recorded as a CUDA graph (this part not)" in capsys.readouterr().err
    assert stored_results(tmp_path / "base_deep_learning_system") == stored_results(uninterrupted("base_deep_learning_system"))


def test_a_run_without_graphs_may_go_on_with_them_but_says_so(tmp_path, uninterrupted, recorder, capsys, script):
    stopped = script([*tiny_arguments("base_deep_learning_system", tmp_path), "cuda_graphs=false", "--verbose"])
    stopped.wait_for_output("Epoch 3/")
    stopped.send(15)
    assert stopped.wait() == 143
    recorder(record_operations)
    run_one("base_deep_learning_system", tmp_path)
    assert "resuming in another environment (cuda_graphs None -> True)" in capsys.readouterr().err
    assert stored_results(tmp_path / "base_deep_learning_system") == stored_results(uninterrupted("base_deep_learning_system"))


def test_on_a_gpu_that_is_only_imagined_every_tensor_is_where_it_belongs_and_nothing_waits(monkeypatch):
    """PyTorch's fake tensors have a device and no content: mixing devices raises, and so does asking for a value.

    The backward pass and the fused optimizer need a real GPU, and are left out.
    """
    device = torch.device("cuda", 0)
    monkeypatch.setattr(cifar100, "_channel_statistics", {})  # made here, they would be imagined for ever
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="CUDA is not available")  # of autocast
        with device:
            network = ResNet18(width=8)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        monkeypatch.setattr(optimizer, "step", lambda: None)
        continual_backprop = ContinualBackprop(network, 3, 0.05, maturity_threshold=2)
        image_set = ImageSet(np.zeros((100, 10, 32, 32, 3), np.uint8), device)
        losses, accuracies = torch.zeros(2, 100, device=device)
        for precision in ("tf32", "bf16"):
            step = TrainingStep(network, optimizer, precision, continual_backprop)
            train_one_epoch(step, image_set, np.arange(10), 9, 11, 0, losses, accuracies, 0)
            for generator in (None, torch.Generator()):
                outcome = evaluate(EvaluationStep(network, precision), image_set, np.arange(10), generator)
                assert [value.device for value in outcome] == [device, device]
        assert continual_backprop.step_count == 24 and continual_backprop.births.device == device
        with pytest.raises(RuntimeError):  # that the check can fail
            evaluate(EvaluationStep(network), ImageSet(np.zeros((100, 10, 32, 32, 3), np.uint8), CPU), np.arange(10))


@pytest.mark.skipif(not STRESS, reason="compiles for two minutes; make stress runs it")
def test_compiled_steps_are_the_plain_ones_to_rounding():
    plain, plain_state = steps("continual_backpropagation", CPU, "fp32", num_steps=5)
    fused, state = steps("continual_backpropagation", CPU, "fp32", num_steps=5, is_compiled=True)
    torch.testing.assert_close(fused[:-1], plain[:-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fused[-1], plain[-1], rtol=0.02, atol=1)  # running statistics of five steps only: errors grow
    assert not torch.equal(fused, plain)  # something else was run
    for name, value in state.items():
        torch.testing.assert_close(value, plain_state[name], rtol=1e-2, atol=1e-3)


# --- On a GPU ------------------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_a_gpu_replayed_steps_are_the_plain_ones(algorithm, precision):
    """60 steps at small width: equal to the bit, or within what the memory format of plain fp32 changes."""
    device = torch.device("cuda", 0)
    plain, plain_state = steps(algorithm, device, precision)
    again, _ = steps(algorithm, device, precision)
    assert torch.equal(again, plain)  # deterministic
    replayed, state = steps(algorithm, device, precision, is_recorded=True)
    assert torch.equal(replayed, plain)
    assert all(torch.equal(value, plain_state[name]) for name, value in state.items())


@needs_gpu
@pytest.mark.parametrize("use_cbp", [False, True])
def test_on_a_gpu_steps_agree_with_the_cpu_and_wait_for_nothing(use_cbp):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, 32, 32, generator=generator), torch.randint(0, 10, (6,), generator=generator)
    set_arithmetic("fp32", deterministic=True)
    networks = {}
    for device in (CPU, torch.device("cuda", 0)):
        network = build_network(11, width=8).to(device, memory_format=torch.channels_last)
        continual_backprop = ContinualBackprop(network, 3, 0.05, maturity_threshold=2) if use_cbp else None
        step = TrainingStep(network, make_optimizer(network, 0.01, 0.9, 0.0005), continual_backprop=continual_backprop)
        if device.type == "cuda":
            step.record(6)
        batch = images.to(device), labels.to(device), unseen_mask(range(10), device)
        image_set = ImageSet(np.zeros((100, 10, 32, 32, 3), np.uint8), device)
        transformations = draw_transformations(6, generator).to(device)
        indices = torch.arange(6, device=device)
        augmented(image_set, indices, transformations)
        step(*batch, 0)
        torch.cuda.set_sync_debug_mode("error" if device.type == "cuda" else "default")
        try:
            for number in range(1, 6):
                augmented(image_set, indices, transformations)
                step(*batch, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        networks[device.type] = network
    for ours, theirs in zip(networks["cuda"].parameters(), networks["cpu"].parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("algorithm", ["continual_backpropagation", "shrink_and_perturb"])
def test_on_a_gpu_runs_side_by_side_are_those_alone(algorithm, tmp_path):
    def run(folder, indices, *more):
        arguments = [*tiny_arguments(algorithm, tmp_path / folder, device="cuda", precision="bf16"), *more, "--experiment-index", indices]
        assert run_script(incremental_cifar_experiment.main, arguments) == 0
        return stored_results(tmp_path / folder / algorithm)

    together = run("together", "0-2")
    alone = {}
    for index in "012":
        alone = run("alone", index)
    assert together == alone
    assert run("plain", "0-2", "cuda_graphs=false") == together
    assert everything_in(tmp_path / "together")
