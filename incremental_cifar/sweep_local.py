"""A sweep on this machine: packs of runs over its GPUs or cores, a thread per place that waits for its processes.

sweep = LocalSweep(packs, find_places(packs, gpus=None), retries=1, analyse=True, keep="all")
sweep.run()                                           # sweep.problems: a line for everything that was given up
"""

import collections
import concurrent.futures
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from incremental_cifar.command_line import STOP_SIGNALS, status_text, warn
from incremental_cifar.config import REPOSITORY, UserError, overrides_of
from incremental_cifar.run_files import Runs, last_line
from incremental_cifar.safe_files import make_folder, share


def visible_gpus() -> list[str]:
    """The GPUs of this machine by number, or those that CUDA_VISIBLE_DEVICES names, by number or UUID."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = re.match(r"((\d+|(GPU|MIG)-[^,]+)(,|$))*", re.sub(r"\s", "", visible))[0].split(",")  # as CUDA, up to any other
        return list(dict.fromkeys(filter(None, names)))
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        text = "" if isinstance(error, FileNotFoundError) else str(error)
    gpus = re.findall(r"^[ \t]*(\d+)[ \t]*$", text, re.MULTILINE)  # among them it warns of what is damaged
    if text and not gpus:
        warn(f"nvidia-smi names no GPU: {' '.join(text.split())}")
    return gpus


def find_places(packs: Sequence[Runs], gpus: str | None) -> dict[str, dict[str, str]]:
    """What a process has beyond our environment, by the names of the places: GPUs (all, or as in "0,1"), or else cores.

    A process on cores takes as many as OMP_NUM_THREADS says; 1, if it is not set. Raises UserError.
    """
    devices = {pack.config.device: pack.source for pack in packs}
    if other := next((device for device in devices if device.startswith("cuda:")), None):
        raise UserError(f'{devices[other]}: device is "{other}"; a sweep chooses the GPUs itself: --set device=auto, and --gpus')
    present = visible_gpus() if devices.keys() - {"cpu"} else []
    chosen = present if gpus is None else [name.strip() for name in gpus.split(",")]
    if missing := [name for name in chosen if name not in present]:
        raise UserError(f'--gpus: no GPU "{missing[0]}" for these configs; there are: {", ".join(present) or "none"}')
    if "cuda" in devices and not chosen:
        raise UserError(f'{devices["cuda"]}: device is "cuda", but there is no GPU here; set device=cpu')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // len(chosen)) if chosen else 1)
    ours = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # nvidia-smi's order
    if chosen:
        return {f"GPU {name}": ours | {"CUDA_VISIBLE_DEVICES": name} for name in chosen}
    each = int(threads) if re.fullmatch(r"[1-9]\d{0,5}", threads) else cores
    return {f"slot {number + 1}": ours for number in range(max(1, cores // each))}


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(f"{time.strftime('%H:%M:%S')} {text}\n", end="", flush=True)  # at once: others say something too


class LocalSweep:
    """Packs, and the places that train and analyse them. A signal is passed on to all processes as SIGTERM, and nothing new begins."""

    def __init__(self, packs: Sequence[Runs], places: dict[str, dict[str, str]], retries: int, analyse: bool, keep: str):
        self.waiting, self.places = collections.deque(packs), places
        self.retries, self.analyse, self.keep = retries, analyse, keep
        self.stop_signal: int | None = None
        self.problems: list[str] = []
        self.processes: set[subprocess.Popen] = set()
        self.left_to: dict[Runs, str] = {}  # who works on what is waited for

    def run(self) -> None:
        """Until all is done or given up, or a signal has come and everything has ended."""
        handled = [number for number in STOP_SIGNALS if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self.pass_on) for number in handled}  # not nohup's SIGHUP; shells have & ignore SIGINT
        with concurrent.futures.ThreadPoolExecutor(len(self.places)) as pool:
            working = [pool.submit(self.work, place) for place in self.places]
            while concurrent.futures.wait(working, timeout=0.2).not_done:
                pass  # a signal that another thread took is handled when this one wakes up
        for each in working:
            each.result()
        for number, handler in previous.items():
            signal.signal(number, handler)

    def pass_on(self, number: int, frame: object) -> None:
        # Whoever signals our whole group has asked the runs too: within two seconds they take SIGTERM for the same request.
        self.stop_signal = self.stop_signal or number
        for process in list(self.processes):
            process.kill() if number == signal.SIGALRM else process.send_signal(signal.SIGTERM)
        if number == signal.SIGUSR1:  # slurm_job.sh's; what does not stop in time goes on from the checkpoint before
            signal.signal(signal.SIGALRM, self.pass_on)
            signal.alarm(int(os.environ.get("SECONDS_TO_STOP", 0)))

    def work(self, place: str) -> None:
        while self.stop_signal is None:
            try:
                pack = self.waiting.popleft()
            except IndexError:
                return
            if (holder := pack.holder()) is None:
                self.do(pack, place)
                continue
            if self.left_to.get(pack) != holder:
                say(f"waiting   {pack}: left to {holder}")
            self.left_to[pack] = holder
            self.waiting.append(pack)
            time.sleep(0.5)

    def do(self, pack: Runs, place: str) -> None:
        """Train and analyse a pack, again after failures, but not more than `retries` in a row that get it no further."""
        for what, left in {"train": pack.unfinished, "analyse": pack.unanalysed if self.analyse else set}.items():
            failures = 0
            while self.stop_signal is None and (indices := left()):
                before, part = pack.progress(), pack._replace(indices=tuple(sorted(indices)))
                say(f"{what:9} {part} ({place})")
                reason = self.run_process(part, what, place)
                if not (part := part._replace(indices=tuple(sorted(indices & left())))).indices:
                    say(f"done      {what} {part._replace(indices=tuple(sorted(indices)))}")
                elif part.holder():  # another process was faster
                    return self.waiting.append(pack)
                elif self.stop_signal is not None or reason.startswith("stopped"):
                    return say(f"stopped   {part}: {reason}")
                else:
                    failures = 1 + failures * (pack.progress() == before)
                    say(f"{'failed' if failures <= self.retries else 'gave up':9} {part}: {reason}")
                    if failures > self.retries:
                        self.problems.append(f"{what} {part}: {reason}")
                        break
        pack.tidy(self.keep)

    def run_process(self, part: Runs, what: str, place: str) -> str:
        """Train or analyse in a process of its own, its output in a log; return how it ended and why, empty if well."""
        log, config = part.folder / "logs" / f"index-{part.indices_text}.log", part.for_gpu(place.startswith("GPU")).config
        script = ["incremental_cifar_experiment.py", "--config", part.source, "--set", *overrides_of(config)]
        if what == "analyse":
            script = ["post_run_analysis.py", "--results_dir", str(part.folder), "--data_path", config.data_path, "--device", config.device]
        command = [sys.executable, str(REPOSITORY / script[0]), *script[1:], "--experiment-index", part.indices_text]
        try:
            make_folder(log.parent)
            with open(log, "ab", buffering=0) as file:
                share(file.fileno(), log.parent)
                now, host = time.strftime("%F %T"), os.uname().nodename
                file.write(f"\n=== started: {now}, {host}, {place}: {shlex.join(command)}\n".encode())
                streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
                process = subprocess.Popen(command, **streams, env=os.environ | self.places[place])
                self.processes.add(process)
                if self.stop_signal is not None:  # it came before
                    process.send_signal(signal.SIGTERM)
                reason = status_text(process.wait())
                self.processes.discard(process)
                reason = f"{reason}: {last_line(log)} ({log})" if reason else ""
                file.write(f"\n=== {reason or 'done'}\n".encode())
                return reason
        except (OSError, UserError) as error:
            return str(error)
