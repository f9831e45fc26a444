"""The recorded steps: on any machine with a stand-in for CUDA's recorder, and on a GPU, where there is one, with the real one.

The stand-in records PyTorch's operations, with the tensors they were called with, and replays them into the same memory. It is as
strict as a CUDA graph: a number that the host has changed since, or memory that has moved, gives wrong results here too, and asking the
device for a value fails.
"""

import contextlib
import copy
import dataclasses
import gc
import json
import os
import signal
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, GPU, GPU_SETTINGS, STRESS, TINY, TINY_ALGORITHM, differing_results, stored_results, tiny_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import incremental_cifar_experiment
from incremental_cifar import cifar100, training
from incremental_cifar.algorithms import Algorithm, make_algorithms
from incremental_cifar.algorithms.continual_backprop import ContinualBackprop
from incremental_cifar.algorithms.weight_noise import WeightNoise
from incremental_cifar.cifar100 import ImageSet
from incremental_cifar.command_line import run_script
from incremental_cifar.config import UserError, load_config, settled
from incremental_cifar.cuda_graphs import WARM_UP_CALLS, CaptureError, Recorded, capturing
from incremental_cifar.network_copies import Bfloat16Copy
from incremental_cifar.resnet import ResNet18, build_network
from incremental_cifar.training import (
    EvaluationStep,
    TrainingStep,
    evaluate,
    make_optimizer,
    set_arithmetic,
    set_stepsize,
    tensors_in,
    train_one_epoch,
    unseen_mask,
)

CPU = torch.device("cpu")


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
    with capturing(), OperationRecorder() as recorder:
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
    assert recorded.fits(torch.ones(2)) and not recorded.fits(torch.ones(1))
    assert counted.calls == calls


def test_memory_is_as_before_where_recording_fails(monkeypatch):
    total = torch.zeros(2)

    def wait(values):
        total.add_(values)
        return (values * total.sum().item(),)

    monkeypatch.setattr(Recorded, "first_failure", None)
    with pytest.raises(CaptureError, match="not permitted"):
        Recorded(wait, (torch.ones(2),), [total], record_operations)
    assert total.tolist() == [0, 0]
    with pytest.raises(CaptureError, match="not permitted"):  # never again in this process
        Recorded(lambda values: (values,), (torch.ones(2),), [], record_operations)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ValueError("a bug")])
@pytest.mark.parametrize("where", [0, WARM_UP_CALLS], ids=["warm-up", "capture"])
def test_only_a_failed_capture_keeps_a_process_from_recording(error, where, monkeypatch):
    monkeypatch.setattr(Recorded, "first_failure", None)
    calls = []

    def fail(values):
        calls.append(values)
        if len(calls) > where:
            raise error
        return (values,)

    with pytest.raises(type(error)):
        Recorded(fail, (torch.ones(2),), [], record_operations)
    assert Recorded.first_failure is None
    Recorded(lambda values: (values + 1,), (torch.ones(2),), [], record_operations)


@pytest.mark.parametrize("was_enabled", [True, False])
def test_no_garbage_is_collected_while_recording(was_enabled):
    """A graph that dies then would end the capture. The collector is as before afterwards, also where recording fails."""
    states = []

    def note(values):
        states.append(gc.isenabled())
        if len(states) == 2 * (WARM_UP_CALLS + 1):
            raise RuntimeError("failed")
        return (values + 1,)

    try:
        (gc.enable if was_enabled else gc.disable)()
        for _ in range(2):
            with contextlib.suppress(RuntimeError), pytest.MonkeyPatch.context() as inside:
                inside.setattr(Recorded, "first_failure", None)
                Recorded(note, (torch.ones(2),), [], record_operations)
            assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
    assert states == 2 * [*[was_enabled] * WARM_UP_CALLS, False]


def test_recordings_die_with_their_owner_and_not_in_the_garbage_collector():
    network = build_network(11, 1).to(memory_format=torch.channels_last)
    training_step = TrainingStep(network, make_optimizer(network, 0.1, 0.9, 0.0005), "bf16")
    evaluation_step = EvaluationStep(network, training_step.half, is_folded=True)
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(Recorded.__init__, "__defaults__", (record_operations,))
        training_step.record(3)
        evaluation_step.record()
    recordings = [weakref.ref(step.recorded) for step in (training_step, evaluation_step)]
    gc.disable()
    try:
        del training_step, evaluation_step
        assert [recording() for recording in recordings] == [None, None]
    finally:
        gc.enable()


def test_the_stand_in_is_as_strict_as_a_cuda_graph():
    """A number of the host's is recorded as it was: what a step must not do shows up as a wrong result."""
    state = {"factor": 2.0}
    recorded = Recorded(lambda values: (values * state["factor"],), (torch.ones(1),), [], record_operations)
    state["factor"] = 3.0
    assert recorded(torch.ones(1))[0].item() == 2.0


def steps(algorithm, device, precision, num_steps=60, is_recorded=False, width=4, batch_size=9, is_compiled=False, is_folded=False):
    """Loss and accuracy of steps with changing images, classes and step size and of an evaluation; then what the network has become."""
    config = load_config(f"cfg/{algorithm}.json", [f"{key}={value}" for key, value in TINY_ALGORITHM.get(algorithm, {}).items()])
    set_arithmetic(precision, deterministic=True)
    network = build_network(11, width).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(network, 0.1, config.momentum, config.weight_decay, config.decay_batch_norm)
    training_step = TrainingStep(network, optimizer, precision, make_algorithms(config, network, optimizer, random_seed=3))
    evaluation_step = EvaluationStep(network, training_step.half, is_folded)
    if is_compiled:
        training_step.compile(batch_size, deterministic=True)
        evaluation_step.compile(deterministic=True)
    if is_recorded:
        training_step.record(batch_size)
        evaluation_step.record()
        replay = training_step.recorded.replay = Counter(training_step.recorded.replay)
    generator = torch.Generator().manual_seed(0)
    values = []
    for step in range(num_steps):
        mask = unseen_mask(np.arange(10 if step < 30 else 20), device)
        set_stepsize(optimizer, 0.05 if step < 40 else 0.01)
        images = torch.randn(batch_size if step % 8 else 5, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (len(images),), generator=generator).to(device)
        values.append(torch.stack(training_step(images, labels, mask, step)).cpu().clone())
    assert not is_recorded or replay.calls == sum(step % 8 != 0 for step in range(num_steps))
    batch = evaluation_step.batch_size
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    evaluation_step.refresh()
    values.append(torch.stack(evaluation_step(images, torch.zeros(batch, dtype=torch.int64, device=device), mask)).cpu())
    state = copy.deepcopy(network.cpu().state_dict())
    state |= enumerate(tensor.cpu() for tensor in tensors_in([other.state_dict() for other in training_step.algorithms]))
    return torch.stack(values), state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_replayed_steps_are_the_plain_ones_to_the_bit(algorithm, precision, monkeypatch):
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, "cpu", 20)
    is_folded = precision == "bf16"
    plain, plain_state = steps(algorithm, CPU, precision, is_folded=is_folded)
    monkeypatch.setattr(Recorded.__init__, "__defaults__", (record_operations,))
    replayed, state = steps(algorithm, CPU, precision, is_recorded=True, is_folded=is_folded)
    assert torch.equal(replayed, plain) and torch.isfinite(plain).all()
    assert all(torch.equal(value, plain_state[name]) for name, value in state.items())


class Forgetful(Algorithm):
    """Scales the gradients by a number that it moves in every step; whether it says so in its state is up to the test."""

    def __init__(self, network, is_forgetful):
        self.network, self.is_forgetful = network, is_forgetful
        self.scale = torch.ones(())

    def change_gradients(self):
        for parameter in self.network.parameters():
            parameter.grad.mul_(self.scale)

    def observe(self, features):
        self.scale.mul_(1 - features[0].mean().clamp(0, 0.1))

    def state_dict(self):
        return {} if self.is_forgetful else {"scale": self.scale}


@pytest.mark.parametrize("is_forgetful", [False, True])
def test_a_buffer_that_an_algorithm_forgets_in_its_state_shows_in_the_recorded_steps(is_forgetful, monkeypatch):
    def forgetful(config, network, optimizer, random_seed):
        return [Forgetful(network, is_forgetful)]

    monkeypatch.setattr(sys.modules[__name__], "make_algorithms", forgetful)
    plain, _ = steps("base_deep_learning_system", CPU, "fp32", num_steps=6)
    monkeypatch.setattr(Recorded.__init__, "__defaults__", (record_operations,))
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, "cpu", 20)
    replayed, _ = steps("base_deep_learning_system", CPU, "fp32", num_steps=6, is_recorded=True)
    assert torch.equal(replayed[:-1], plain[:-1]) != is_forgetful


@pytest.fixture
def recorder(monkeypatch):
    """From here on, runs on this CPU record their steps."""

    def use(record):
        monkeypatch.setattr(Recorded.__init__, "__defaults__", (record,))
        monkeypatch.setattr(Recorded, "first_failure", None)
        monkeypatch.setattr(incremental_cifar_experiment, "has_graphs", lambda device: True)

    return use


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_whole_runs_from_recorded_steps_are_the_plain_runs(algorithm, tmp_path, recorder, monkeypatch, capsys):
    """Tasks, step sizes, resets and noise between replays, best network, last smaller batches, evaluation: everything but CUDA itself."""
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, "cpu", 4)  # full batches and smaller ones of 5, 10, ..., 30 images
    run_one(algorithm, tmp_path / "plain", batch_size=12)
    recorder(record_operations)
    experiment = run_one(algorithm, tmp_path / "recorded", batch_size=12)
    assert isinstance(experiment.learner.training_step.recorded, Recorded) and isinstance(
        experiment.learner.evaluation_step.recorded, Recorded
    )
    assert experiment.learner.is_recorded and "warning" not in capsys.readouterr().err
    assert stored_results(tmp_path / "recorded" / algorithm) == stored_results(tmp_path / "plain" / algorithm)


def run_one(algorithm, results_dir, **settings):
    overrides = TINY | TINY_ALGORITHM.get(algorithm, {}) | settings
    values = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()]
    config = load_config(f"cfg/{algorithm}.json", [*values, f"results_dir={results_dir}"])
    experiment = incremental_cifar_experiment.IncrementalCIFARExperiment(config.to_dict(), str(results_dir / algorithm), 0, verbose=False)
    experiment.run()
    return experiment


@pytest.mark.parametrize("where", ["forward", "recording"])
def test_where_recording_is_impossible_a_run_says_so_and_gives_the_same(where, tmp_path, uninterrupted, recorder, monkeypatch, capsys):
    def refuse(function, device):
        function()
        with capturing():
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def fail_in_forward(function, device):
        with monkeypatch.context() as inside, capturing():
            inside.setattr(ResNet18, "forward", lambda *arguments: (_ for _ in ()).throw(RuntimeError("operation not permitted")))
            function()

    recorder(refuse if where == "recording" else fail_in_forward)
    experiment = run_one("continual_backpropagation", tmp_path)
    errors = capsys.readouterr().err
    assert errors.count("warning") == 1 and "cannot be recorded as a CUDA graph (operation not permitted" in errors
    assert not experiment.learner.is_recorded and experiment.environment["cuda_graphs"] is False
    assert stored_results(tmp_path / "continual_backpropagation") == stored_results(uninterrupted("continual_backpropagation"))
    run_one("continual_backpropagation", tmp_path / "again", num_tasks=1)  # not tried again in this process, but said again
    assert capsys.readouterr().err.count("cannot be recorded as a CUDA graph (operation not permitted") == 1


def test_where_only_the_evaluation_cannot_be_recorded_the_training_still_is(tmp_path, uninterrupted, recorder, monkeypatch, capsys):
    evaluate_batch = EvaluationStep.evaluate_batch

    def not_recorded(self, images, labels, mask):
        if not gc.isenabled():
            raise RuntimeError("this part not")
        return evaluate_batch(self, images, labels, mask)

    recorder(record_operations)
    monkeypatch.setattr(EvaluationStep, "evaluate_batch", not_recorded)
    experiment = run_one("base_deep_learning_system", tmp_path)
    assert experiment.learner.is_recorded and isinstance(experiment.learner.training_step.recorded, Recorded)
    assert "an evaluation step cannot be recorded as a CUDA graph (this part not)" in capsys.readouterr().err
    assert stored_results(tmp_path / "base_deep_learning_system") == stored_results(uninterrupted("base_deep_learning_system"))


def test_where_compiling_fails_a_run_that_left_it_open_goes_on_without(tmp_path, uninterrupted, recorder, monkeypatch, capsys):
    def fail(images):
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler here\nand more")

    def as_with_triton(config, stored, is_gpu):
        return dataclasses.replace(settled(config, stored, is_gpu), compile_network=True)

    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: fail)
    monkeypatch.setattr(incremental_cifar_experiment, "settled", as_with_triton)
    recorder(record_operations)
    experiment = run_one("base_deep_learning_system", tmp_path, compile_network="auto")
    assert (
        capsys.readouterr().err.count("warning: torch.compile failed (no compiler here); this run goes on with compile_network=false") == 1
    )
    assert experiment.learner.is_recorded and experiment.files.load_config().compile_network is False
    assert stored_results(tmp_path / "base_deep_learning_system") == stored_results(uninterrupted("base_deep_learning_system"))
    with pytest.raises(UserError, match=r"torch\.compile failed \(no compiler here\); use compile_network=false"):
        run_one("base_deep_learning_system", tmp_path / "asked for", compile_network=True)


def test_a_run_without_graphs_may_go_on_with_them_but_says_so(tmp_path, uninterrupted, recorder, capsys, script):
    stopped = script([*tiny_arguments("base_deep_learning_system", tmp_path), "cuda_graphs=false", "--verbose"])
    stopped.wait_for_output("Epoch 3/")
    stopped.send(15)
    assert stopped.wait() == 143
    recorder(record_operations)
    run_one("base_deep_learning_system", tmp_path)
    assert "resuming in another environment (cuda_graphs None -> True)" in capsys.readouterr().err
    assert stored_results(tmp_path / "base_deep_learning_system") == stored_results(uninterrupted("base_deep_learning_system"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_a_gpu_that_is_only_imagined_every_tensor_is_where_it_belongs_and_nothing_waits(algorithm, monkeypatch):
    """PyTorch's fake tensors have a device and no content: mixing devices raises, and so does asking for a value.

    The backward pass, the fused optimizer and a GPU's generators need a real one, and something else is there in their place.
    """
    device = torch.device("cuda", 0)
    config = load_config(f"cfg/{algorithm}.json", [f"{key}={value}" for key, value in TINY_ALGORITHM.get(algorithm, {}).items()])
    monkeypatch.setattr(cifar100, "_channel_statistics", {})  # made here, they would be imagined for ever
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *device: generator())
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            network = ResNet18(width=8)

        def backward(loss):
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr(Bfloat16Copy, "pass_gradients_on", lambda half: None)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)  # as `make_optimizer` has it; the constructor would ask for it
        monkeypatch.setattr(optimizer, "step", lambda: None)
        algorithms = make_algorithms(config, network, optimizer, random_seed=3)
        image_set = ImageSet(np.zeros((100, 10, 32, 32, 3), np.uint8), device)
        losses, accuracies = torch.zeros(2, 100, device=device)
        for precision in ("tf32", "bf16"):
            step = TrainingStep(network, optimizer, precision, algorithms)
            train_one_epoch(step, image_set, np.arange(10), 9, 11, 0, losses, accuracies, 0)
            for augmentation, is_folded in ((None, False), (generator(), True)):
                outcome = evaluate(EvaluationStep(network, step.half, is_folded), image_set, np.arange(10), augmentation)
                assert [value.device for value in outcome] == [device, device]
        assert {tensor.device for tensor in tensors_in(step.state_dict())} == {device}
        with pytest.raises(RuntimeError):  # that the check can fail
            evaluate(EvaluationStep(network), ImageSet(np.zeros((100, 10, 32, 32, 3), np.uint8), CPU), np.arange(10))


def test_only_batches_of_the_recorded_size_are_compiled(tmp_path, monkeypatch):
    """A size that is compiled when a run first meets it would make the bits depend on where it was interrupted."""
    sizes = set()

    def compile_in_name(network, **options):
        def forward(images):
            sizes.add(len(images))
            return network(images)

        return forward

    monkeypatch.setattr(torch, "compile", compile_in_name)
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, "cpu", 8)  # of 10 and 20 images
    algorithm, settings = "continual_backpropagation", {"batch_size": 12, "num_tasks": 2, "epochs_per_task": 2}
    run_one(algorithm, tmp_path / "compiled", **settings, compile_network=True)
    assert sizes == {8, 12}
    run_one(algorithm, tmp_path / "plain", **settings)
    assert differing_results(tmp_path / "compiled" / algorithm, tmp_path / "plain" / algorithm) == []


@pytest.mark.skipif(not STRESS, reason="compiles for three minutes; make stress runs it")
def test_a_compiled_run_that_is_interrupted_equals_an_uninterrupted_one(tmp_path, script):
    """Ten sizes of smaller batches, more than PyTorch compiles of a function; the resumed process meets only four of them."""
    settings = {"num_tasks": 10, "classes_per_task": 1, "epochs_per_task": 1, "train_images_per_class": 7, "batch_size": 20}
    algorithm = "base_deep_learning_system"

    def start(folder, prepare=None):
        return script(tiny_arguments(algorithm, tmp_path / folder, **settings, compile_network=True), prepare)

    stopped = start("interrupted", stop_in_epoch_6)
    assert stopped.wait(600) == 143, stopped.output()
    for run in (start("interrupted"), start("whole")):
        assert run.wait(600) == 0 and "warning: " not in run.output(), run.output()
    assert differing_results(tmp_path / "interrupted" / algorithm, tmp_path / "whole" / algorithm) == []
    plain = script(tiny_arguments(algorithm, tmp_path / "plain", **settings))
    assert plain.wait() == 0
    assert differing_results(tmp_path / "plain" / algorithm, tmp_path / "whole" / algorithm) != []  # something else was run


def test_a_thread_that_gets_no_stream_ends_with_an_error(tmp_path, monkeypatch, capsys):
    def no_stream(device):
        raise RuntimeError("CUDA error: unknown error")

    experiments = []
    for index in range(2):
        settings = TINY | {"results_dir": str(tmp_path)}
        experiments.append(incremental_cifar_experiment.IncrementalCIFARExperiment(settings, str(tmp_path / "run"), index, verbose=False))
        monkeypatch.setattr(experiments[-1], "prepare", lambda locks, images: True)
        monkeypatch.setattr(experiments[-1], "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "Stream", no_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert incremental_cifar_experiment.run_side_by_side(experiments) == 1
    assert capsys.readouterr().err.count("RuntimeError: CUDA error: unknown error") == 2


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


def were_recorded(folder):
    configs = [json.loads(path.read_text()) for path in folder.glob("config_files/*.json")]
    return configs != [] and all(config["_environment"]["cuda_graphs"] is True for config in configs)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("algorithm", ["continual_backpropagation", "shrink_and_perturb"])
def test_on_a_gpu_replayed_steps_are_the_plain_ones(algorithm, precision):
    is_folded = precision == "bf16"
    plain, plain_state = steps(algorithm, GPU, precision, width=8, is_folded=is_folded)
    replayed, state = steps(algorithm, GPU, precision, width=8, is_recorded=True, is_folded=is_folded)
    assert torch.equal(replayed, plain) and torch.isfinite(plain).all()
    assert [name for name, value in state.items() if not torch.equal(value, plain_state[name])] == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_on_a_gpu_steps_of_the_papers_size_can_be_recorded_and_repeated(precision):
    settings = {"num_steps": 16, "width": 64, "batch_size": 90}
    plain, plain_state = steps("continual_backpropagation", GPU, precision, **settings)
    assert torch.isfinite(plain).all()
    for _ in range(2):
        replayed, state = steps("continual_backpropagation", GPU, precision, is_recorded=True, **settings)
        assert torch.equal(replayed, plain)
        assert [name for name, value in state.items() if not torch.equal(value, plain_state[name])] == []


@pytest.mark.gpu
def test_on_a_gpu_compiled_steps_can_be_recorded():
    """The sizes are those of the test of bench.py, which then finds the kernels in PyTorch's cache."""
    settings = {"num_steps": 6, "width": 8, "batch_size": 45, "is_folded": True}
    uncompiled, _ = steps("continual_backpropagation", GPU, "bf16", **settings)
    plain, plain_state = steps("continual_backpropagation", GPU, "bf16", is_compiled=True, **settings)
    replayed, state = steps("continual_backpropagation", GPU, "bf16", is_compiled=True, is_recorded=True, **settings)
    assert torch.equal(replayed, plain)
    assert [name for name, value in state.items() if not torch.equal(value, plain_state[name])] == []
    # The first step is of a smaller batch, which is never compiled; in the second, fused operations round less often to 8 bits.
    assert torch.equal(plain[0], uncompiled[0]) and not torch.equal(plain[1:], uncompiled[1:])
    torch.testing.assert_close(plain[1, 0], uncompiled[1, 0], rtol=0.05, atol=0)


@pytest.mark.gpu
def test_on_a_gpu_old_graphs_may_become_garbage_while_another_is_recorded():
    """Graphs that only the collector finds, in a process that collects all the time; each call of the function leaves one behind."""
    ones = torch.ones(1000, device=GPU)
    old = [Recorded(lambda values: (values * 2,), (ones,), []) for _ in range(WARM_UP_CALLS + 1)]

    def add_one(values):
        recording = old.pop()
        recording.itself = recording
        del recording
        garbage = [[] for _ in range(100)]  # makes the collector look, where it may
        return (values + len(garbage) / 100,)

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        recorded = Recorded(add_one, (ones,), [])
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert old == [] and recorded(ones * 3)[0].tolist() == [4] * 1000
    assert Recorded(lambda values: (values - 1,), (ones,), [])(ones)[0].tolist() == [0] * 1000


def watched(function):
    """The same function; from the end of its first call on, whatever waits for the GPU raises."""

    def call(*arguments):
        outcome = function(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        return outcome

    return call


class WatchedEvaluationStep(EvaluationStep):
    def __call__(self, *arguments):
        return watched(super().__call__)(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_on_a_gpu_nothing_waits_inside_an_epoch(precision, is_recorded, monkeypatch):
    """Augmentation of several chunks, steps with resets and noise, evaluation with and without augmentation."""
    monkeypatch.setitem(training.STEPS_PER_CHUNK, GPU.type, 2)
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, GPU.type, 30)
    set_arithmetic(precision, deterministic=True)
    network = build_network(11, 8).to(GPU, memory_format=torch.channels_last)
    continual_backprop = ContinualBackprop(network, 3, 0.05, maturity_threshold=2)
    optimizer = make_optimizer(network, 0.01, 0.9, 0.0005)
    training_step = TrainingStep(network, optimizer, precision, [continual_backprop, WeightNoise(network, 3, 0.001)])
    evaluation_step = WatchedEvaluationStep(network, training_step.half, is_folded=precision == "bf16")
    if is_recorded:
        training_step.record(9)
        evaluation_step.record()
    image_set = ImageSet(np.random.default_rng(0).integers(0, 256, (100, 10, 32, 32, 3), dtype=np.uint8), GPU)
    losses, accuracies = torch.zeros(2, 12, device=GPU)
    try:
        train_one_epoch(watched(training_step), image_set, np.arange(10), 9, 11, 0, losses, accuracies, 0)
        torch.cuda.set_sync_debug_mode("default")
        for generator in (None, torch.Generator()):
            evaluate(evaluation_step, image_set, np.arange(10), generator)
            with pytest.raises(RuntimeError, match="synchronizing"):  # that the check can fail
                losses.sum().item()
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses).all() and (losses > 0).all() and continual_backprop.births.max() > 0


def two_steps(device, use_cbp, noise=0.0):
    """Losses and accuracies of two steps in fp32, the network after them, and when its units were reset. noise: a share of each weight."""
    set_arithmetic("fp32", deterministic=True)
    generator = torch.Generator().manual_seed(0)
    network = build_network(11, 8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    network = network.to(device, memory_format=torch.channels_last)
    continual_backprop = ContinualBackprop(network, 3, 0.1, maturity_threshold=1)
    step = TrainingStep(network, make_optimizer(network, 0.01, 0.9, 0.0005), "fp32", [continual_backprop] if use_cbp else [])
    values = []
    for number in range(2):
        images = torch.randn(12, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (12,), generator=generator).to(device)
        values.append(torch.stack(step(images, labels, unseen_mask(range(10), device), number)).cpu())
    return torch.stack(values), network.cpu(), continual_backprop.births.cpu()


@pytest.mark.parametrize(
    ("device", "noise"), [pytest.param(GPU, 0, marks=pytest.mark.gpu, id="gpu"), pytest.param(CPU, 1e-5, id="margin, by noise on the CPU")]
)
@pytest.mark.parametrize("use_cbp", [False, True])
def test_two_steps_on_a_gpu_are_the_cpus_to_rounding(use_cbp, device, noise):
    """Rounding is a noise of 1e-6 or less, and moves no weight by 1e-4 in two steps; one of 1e-5, by 3e-4."""
    values, network, births = two_steps(CPU, use_cbp)
    others, other_network, other_births = two_steps(device, use_cbp, noise)
    torch.testing.assert_close(others, values, rtol=0, atol=2e-3)
    assert torch.equal(other_births, births) and (births == 2).any() == use_cbp
    initial = build_network(11, 8).parameters()
    moved = [(after - before).abs().max().item() for after, before in zip(network.parameters(), initial, strict=True)]
    assert max(moved) > 4 * 2e-3
    for (name, ours), theirs in zip(network.named_parameters(), other_network.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_a_gpu_whole_runs_from_recorded_steps_are_the_plain_runs(algorithm, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, GPU.type, 4)
    run_one(algorithm, tmp_path / "plain", **GPU_SETTINGS, precision="bf16", cuda_graphs=False)
    experiment = run_one(algorithm, tmp_path / "recorded", **GPU_SETTINGS, precision="bf16")
    assert isinstance(experiment.learner.training_step.recorded, Recorded) and isinstance(
        experiment.learner.evaluation_step.recorded, Recorded
    )
    assert "warning: " not in capsys.readouterr().err
    assert differing_results(tmp_path / "recorded" / algorithm, tmp_path / "plain" / algorithm) == []


@pytest.mark.gpu
@pytest.mark.parametrize(("algorithm", "precision"), [("continual_backpropagation", "bf16"), ("shrink_and_perturb", "tf32")])
def test_on_a_gpu_runs_side_by_side_are_those_alone(algorithm, precision, tmp_path, monkeypatch, capsys):
    """In threads, where smaller batches and evaluations run plainly beside the replays of other runs."""
    monkeypatch.setitem(training.EVALUATION_BATCH_SIZE, GPU.type, 4)

    def run(folder, indices, **settings):
        arguments = tiny_arguments(algorithm, tmp_path / folder, **GPU_SETTINGS, precision=precision, **settings)
        assert run_script(incremental_cifar_experiment.main, [*arguments, "--experiment-index", indices]) == 0
        assert "warning: " not in capsys.readouterr().err
        return tmp_path / folder / algorithm

    together = run("together", "0-2")
    for index in "012":
        alone = run("alone", index)
    assert were_recorded(together) and were_recorded(alone)
    assert differing_results(together, alone) == []
    assert differing_results(together, run("plain", "0-2", cuda_graphs=False)) == []


def stop_in_epoch_6():
    """In the process of a run: as if somebody asked it to stop while it trains its sixth epoch."""
    train = incremental_cifar_experiment.IncrementalCIFARExperiment.train

    def stopping(self, epoch, *arguments):
        if epoch == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        train(self, epoch, *arguments)

    incremental_cifar_experiment.IncrementalCIFARExperiment.train = stopping


@pytest.mark.gpu
@pytest.mark.parametrize(("algorithm", "precision"), [("continual_backpropagation", "bf16"), ("shrink_and_perturb", "tf32")])
def test_on_a_gpu_two_processes_and_an_interrupted_run_agree_to_the_bit(algorithm, precision, tmp_path, script):
    def start(folder, prepare=None):
        return script(tiny_arguments(algorithm, tmp_path / folder, **GPU_SETTINGS, precision=precision), prepare)

    stopped, *uninterrupted = start("interrupted", stop_in_epoch_6), start("one"), start("other")
    assert stopped.wait() == 143, stopped.output()
    resumed = start("interrupted")
    for run in (resumed, *uninterrupted):
        assert run.wait() == 0 and "warning: " not in run.output(), run.output()
    assert "Resuming index 0 after epoch 6 of 12" in resumed.output()
    one = tmp_path / "one" / algorithm
    assert differing_results(tmp_path / "other" / algorithm, one) == []
    assert differing_results(tmp_path / "interrupted" / algorithm, one) == []
    assert were_recorded(one)


@pytest.mark.gpu
def test_on_a_gpu_four_tf32_runs_of_full_width_do_not_block_one_another(tmp_path, script):
    """cuDNN has batch norm kernels that wait until all their blocks are on the GPU, which those of other streams may keep off."""
    algorithm = "base_deep_learning_system"
    settings = GPU_SETTINGS | {"precision": "tf32", "network_width": 64, "batch_size": 90}
    settings |= {"num_tasks": 1, "classes_per_task": 5, "epochs_per_task": 10, "train_images_per_class": 180}
    together = script([*tiny_arguments(algorithm, tmp_path / "together", **settings), "--experiment-index", "0-3"])
    assert together.wait(60) == 0 and "warning: " not in together.output(), together.output()
    alone = script([*tiny_arguments(algorithm, tmp_path / "alone", **settings), "--experiment-index", "3"])
    assert alone.wait(60) == 0, alone.output()
    assert were_recorded(tmp_path / "together" / algorithm)
    assert differing_results(tmp_path / "together" / algorithm, tmp_path / "alone" / algorithm, "index-3") == []
