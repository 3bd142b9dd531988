"""Faults at random moments, in every way of training: what hangs, stays, is lost, or goes another way afterwards?

.venvs/scale/bin/python scripts/faults/chaos.py --faults 100        (goes on where it stopped)
.venv/bin/python scripts/faults/chaos.py --modes one two --faults 6 --rows runs/faults/short.csv

Each fault has a run of its own, of the tiny model of `cfpo check`. After it no process of the run is left, none hangs,
and the same command goes on to the end; where that is promised, with the weights of an uninterrupted run. A row each
in docs/faults/chaos.csv.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from cfpo_trl.checks.rollouts import ASYNCHRONOUS, PORT
from cfpo_trl.checks.task import recipe
from cfpo_trl.rollouts.serving import serving
from cfpo_trl.studies.report import markdown

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "docs" / "faults" / "chaos.csv"
OUT = Path("runs/faults").absolute()
INSIDE = Path(__file__).parent / "inside"  # what runs import
MARK = "CFPO_CHAOS"  # in the environment of all that a run starts
STEPS = 24
SECONDS_TO_END = 60.0  # from a fault that ends a run, or from the end of a pause, to the end of its processes
SECONDS_TO_FINISH = 300.0  # of an undisturbed run
SECONDS_TO_APPEAR = 10.0  # of the process, or of the first checkpoint, to strike
PAUSE = 40.0  # seconds of a SIGSTOP
FILES = 1000  # descriptors
JUMP = 7200.0  # seconds of a clock, forward or back
DISK = 24 * 2**20  # bytes: some checkpoints fit
SAVING: dict[str, Any] = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 2,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Mode:
    """A way of training: options of the recipe, arguments of `cfpo train`, whom faults strike, what is promised."""

    options: dict[str, Any] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()
    victims: tuple[str, ...] = ("trainer",)
    exact: bool = True  # resumed, it follows the trajectory of an uninterrupted run
    server: bool = False
    faults: tuple[str, ...] = ("SIGKILL", "SIGTERM", "SIGSTOP", "clock")


TWO = {"per_device_train_batch_size": 64}
VLLM = {"use_vllm": True, "num_iterations": 1, "vllm_gpu_memory_utilization": 0.2}
FROM_SERVER = {"vllm_mode": "server", "vllm_server_port": PORT}
JUDGED = {"reward_funcs": ["exact_match", "accuracy"], "reward_weights": [1.0, 0.0]}
PROGRAMS = {"reward_funcs": ["exact_match", "programs.printed"], "reward_weights": [1.0, 0.0]}
ANSWERS = ("SIGKILL", "slow", "garbage", "NaN", "too few", "silent")
DISKS = ("SIGKILL", "SIGTERM", "SIGSTOP", "clock", "full disk", "cut checkpoint", "few files")
GO_ON = ("SIGSTOP", "slow", "few files", "clock")  # faults that a run outlives
MISSED = ("nobody there", "it had ended", "no checkpoint yet")  # struck nothing
MODES = {
    "one": Mode(JUDGED, victims=("trainer", "judge"), faults=DISKS),
    "two": Mode(TWO, ("--engine", "cpu/ddp", "--num_processes", "2"), ("launcher", "rank", "command")),
    "zero3": Mode(TWO, ("--engine", "cpu/zero3", "--num_processes", "2"), ("launcher", "rank", "command")),
    "colocated": Mode(VLLM | {"vllm_mode": "colocate"}, exact=False),
    "server": Mode(VLLM | FROM_SERVER, victims=("trainer", "server"), exact=False, server=True),
    "asynchronous": Mode(ASYNCHRONOUS, victims=("trainer", "server", "rollouts"), exact=False, server=True),
    "reward server": Mode({"reward_funcs": ["exact_match", "URL"]}, faults=ANSWERS),
    "code reward": Mode(PROGRAMS, victims=("trainer", "sandbox")),
}


class Rewards:
    """A reward server in this process, whose answers can be spoilt; it gives every completion 0."""

    def __init__(self) -> None:
        self.answer, rewards = "right", self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.say(b"{}")

            def do_POST(self) -> None:
                count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["completions"])
                values = ["NaN" if rewards.answer == "NaN" else "0.0"] * (count - (rewards.answer == "too few"))
                if rewards.answer == "silent":
                    time.sleep(30)
                if rewards.answer == "slow":
                    time.sleep(1)
                good = f'{{"rewards": [{", ".join(values)}]}}'.encode()
                self.say(b"<html>busy</html>" if rewards.answer == "garbage" else good)

            def say(self, body: bytes) -> None:
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


REWARDS = Rewards()


def marked(mark: str) -> list[psutil.Process]:
    """All processes with that mark in their environment, zombies aside."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def sandboxes(parent: psutil.Process) -> list[psutil.Process]:
    """The sandboxes of a process, whose environment is empty."""
    with suppress(psutil.Error):
        return [process for process in parent.children(recursive=True) if process.name() == "bwrap"]
    return []


def victim_of(name: str, mark: str, command: subprocess.Popen) -> psutil.Process | None:
    """The process to strike; None where there is none of that kind at present."""
    everyone = marked(mark)

    def those(*words: str, without: str = "nothing") -> list[psutil.Process]:
        found = []
        for process in everyone:
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if all(word in line for word in words) and without not in line:
                    found.append(process)
        return found

    if name in ("trainer", "command"):
        return psutil.Process(command.pid) if command.poll() is None else None
    found = {
        "launcher": lambda: those("accelerate.commands.launch"),
        "rank": lambda: [p for p in those("cfpo_trl.grpo", without="accelerate") if "RANK" in p.environ()],
        "judge": lambda: those("rewards/verifier.py"),
        "rollouts": lambda: those("spawn_main"),
        "sandbox": lambda: sandboxes(psutil.Process(command.pid)),
        "server": lambda: marked(f"{mark} server"),
    }[name]()
    return random.choice(found) if found else None


def clock_of(run: str) -> Path:
    """The file with the seconds by which that run's clock is wrong."""
    return OUT / f"{run}.clock"


def start(file: Path, mode: Mode, mark: str, log: Path, limit: int | None = None) -> subprocess.Popen:
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_PORT": "0"}
    environment |= {"PYTHONPATH": str(INSIDE), "CFPO_CHAOS_CLOCK": str(clock_of(mark))}
    command = [sys.executable, "-m", "cfpo_trl.cli", "train", *mode.launcher]
    if mode.launcher:
        command += ["--main_process_port", "0"]
    if limit:
        command = ["prlimit", f"--nofile={limit}", *command]
    with log.open("a") as output:
        return subprocess.Popen(
            [*command, "--config", str(file)], stdout=output, stderr=output, env=environment, start_new_session=True
        )


@contextmanager
def server_of(mode: Mode, file: Path, mark: str, log: Path) -> Iterator[list[int]]:
    """The vLLM server of the recipe, where the mode has one; behind the block the list says how much of it stayed."""
    stayed: list[int] = []
    if not mode.server:
        yield stayed
        return
    environment = os.environ | {MARK: f"{mark} server", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    try:
        with serving(file, log, environment):
            yield stayed
    finally:
        stayed.append(clear(f"{mark} server"))


def wait(command: subprocess.Popen, seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        command.wait(seconds)
    return command.poll() is not None


def left_by(mark: str) -> list[psutil.Process]:
    """What is left of a run: its processes, and sandboxes that nobody owns and that are no older than this program."""
    began = psutil.Process().create_time()
    orphans = [process for process in sandboxes(psutil.Process(1)) if process.ppid() == 1]
    if mark.endswith("server"):  # whose engines have no environment, either
        orphans += [process for process in psutil.process_iter() if process.name().startswith("VLLM::")]
    return marked(mark) + [process for process in orphans if process.create_time() >= began]


def clear(mark: str, grace: float = SECONDS_TO_END) -> int:
    """Kills what is left of a run after some seconds, in which it may save; how many that were."""
    end = time.monotonic() + grace
    while (left := left_by(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    for process in left:
        with suppress(psutil.Error):
            print(f"left by {mark}: {process.status()} {' '.join(process.cmdline())[:200]}", flush=True)
            process.kill()
    return len(left)


def steps_of(output: Path) -> list[int]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if "loss" in entry]


def recipe_of(name: str, mode: Mode, run: str, **changed: Any) -> Path:
    """The recipe of a mode's run of that name, with other options where `changed` has them."""
    options = {key: value for key, value in mode.options.items() if key != "reward_funcs"}
    if funcs := mode.options.get("reward_funcs"):
        options["reward_funcs"] = [REWARDS.url if reward == "URL" else reward for reward in funcs]
        if "URL" in funcs:
            options["reward_parameters"] = {REWARDS.url: {"timeout": 5, "retries": 1}}
    return recipe(OUT, run, **(SAVING | options | changed))


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(OUT / run / "model.safetensors")


def undisturbed(name: str, mode: Mode) -> float:
    """Trains the mode's run without a fault, where there is none; the seconds that it takes."""
    run = name.replace(" ", "-")
    file = OUT / run / "seconds"
    if not file.exists():
        REWARDS.answer = "right"
        recipe_file, log = recipe_of(name, mode, run), OUT / f"{run}.log"
        with server_of(mode, recipe_file, run, log):
            began = time.monotonic()
            command = start(recipe_file, mode, run, log)
            done = wait(command, SECONDS_TO_FINISH)
            seconds = time.monotonic() - began
        if not done or command.returncode:
            clear(run, 0)
            raise RuntimeError(f"{name} does not train even undisturbed: {log}")
        file.write_text(str(seconds))
    return float(file.read_text())


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A small file system in the folder's place."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def cut_newest_checkpoint(output: Path, rng: random.Random) -> bool:
    """Halves a file of the newest checkpoint, as a power cut may."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not found:
        return False
    file = rng.choice(sorted(file for file in found[-1].iterdir() if file.stat().st_size > 100))
    os.truncate(file, file.stat().st_size // 2)
    return True


def strike(fault: str, victim: str, mark: str, command: subprocess.Popen, output: Path, rng: random.Random) -> str:
    """The fault; what was struck, or why nothing could be."""
    if fault in ANSWERS and fault != "SIGKILL":
        REWARDS.answer = fault
        return "answers"
    if fault == "few files":
        return "limit"
    if fault == "clock":
        clock_of(mark).write_text(str(rng.choice([JUMP, -JUMP])))
        return "the wall clock"
    if fault == "full disk":
        with suppress(OSError):
            (output / "filler").write_bytes(b"0" * DISK)
        return "disk"
    end = time.monotonic() + SECONDS_TO_APPEAR
    if fault == "cut checkpoint":
        while not any(output.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < end:
            time.sleep(0.05)
        command.kill()
        command.wait()
        return "a checkpoint" if cut_newest_checkpoint(output, rng) else "no checkpoint yet"
    while (process := victim_of(victim, mark, command)) is None:
        if command.poll() is not None or time.monotonic() > end:
            return "nobody there"
        time.sleep(0.05)
    with suppress(psutil.Error):
        process.send_signal(signal.Signals[fault])
        if fault == "SIGSTOP":
            time.sleep(PAUSE)
            process.send_signal(signal.SIGCONT)
    return victim


def one_fault(number: int, name: str, fault: str, victim: str, seed: int) -> dict[str, Any]:
    """A run with a fault, and the same command again until it is done; the row of its results."""
    rng, mode = random.Random(f"{seed} {number}"), MODES[name]
    random.seed(f"{seed} {number}")
    seconds = undisturbed(name, mode)
    run = f"fault-{number}"
    log, output = OUT / f"{run}.log", OUT / run
    log.unlink(missing_ok=True)
    clock_of(run).unlink(missing_ok=True)
    REWARDS.answer = "right"
    file = recipe_of(name, mode, run)
    moment = rng.uniform(0.1, 1.0) * seconds
    row = {"number": number, "mode": name, "fault": fault, "moment": round(moment, 1)}
    disk = small_disk(output) if fault == "full disk" else nullcontext()
    with disk:
        with server_of(mode, file, run, log) as stayed:
            command = start(file, mode, run, log, FILES if fault == "few files" else None)
            wait(command, moment)
            struck = strike(fault, victim, run, command, output, rng) if command.poll() is None else "it had ended"
            began = time.monotonic()
            goes_on = fault in GO_ON or struck in ("nobody there", "judge", "sandbox")
            ended = wait(command, SECONDS_TO_FINISH if goes_on else max(SECONDS_TO_END, 2 * seconds))
            status = command.returncode  # before what hangs is killed
            orphans = clear(run)
            row |= {"struck": struck, "ended": round(time.monotonic() - began, 1), "hang": not ended}
            row |= {"status": status if ended else "", "orphans": orphans}
        row["orphans"] += sum(stayed)
        (output / "filler").unlink(missing_ok=True)
        REWARDS.answer = "right"
        again = 0
        while not (output / "train_results.json").exists() and again < 3:
            with server_of(mode, file, run, log) as stayed_again:
                command = start(file, mode, run, log)
                row["hang"] |= not wait(command, SECONDS_TO_FINISH)
                row["orphans"] += clear(run)
            row["orphans"] += sum(stayed_again)
            again += 1
        steps = steps_of(output) if (output / "trainer_state.json").exists() else []
        whole = (output / "train_results.json").exists() and steps == list(range(1, STEPS + 1))
        row |= {"again": again, "whole": whole, "trajectory": "not promised"}
        if mode.exact and whole:
            expected, found = weights(name.replace(" ", "-")), weights(run)
            worst = max((expected[key] - found[key]).abs().max().item() for key in expected)
            row["trajectory"] = "equal" if worst < 1e-6 else f"differs by {worst:.1e}"
    good = row["whole"] and not row["hang"] and not row["orphans"] and not row["trajectory"].startswith("differs")
    if good:
        shutil.rmtree(output)
        log.unlink()
        clock_of(run).unlink(missing_ok=True)
    return row | {"good": good}


def plan(names: list[str], faults: int, seed: int) -> list[tuple[int, str, str, str]]:
    """Number, mode, fault and victim of each: the modes in turn, and of each mode its faults and victims in turn."""
    turns = {}
    for name in names:
        kinds = MODES[name].faults, MODES[name].victims
        turns[name] = zip(*(shuffled(f"{seed} {name}", some) for some in kinds), strict=True)
    return [(number, name, *next(turns[name])) for number, name in zip(range(faults), cycle(names), strict=False)]


def shuffled(seed: str, kinds: tuple[str, ...]) -> Iterator[str]:
    """All of the kinds in a random order, again and again."""
    rng = random.Random(f"{seed} {len(kinds)}")
    while True:
        yield from rng.sample(kinds, len(kinds))


def read(rows: Path) -> list[dict[str, str]]:
    if not rows.exists():
        return []
    with rows.open() as file:
        return list(csv.DictReader(file))


def outcomes(rows: list[dict[str, str]]) -> str:
    """A row per fault and a column per way of training: how many that struck ended well, of how many; in Markdown."""
    rows = [row for row in rows if row["struck"] not in MISSED]
    names = [name for name in MODES if any(row["mode"] == name for row in rows)]
    lines = []
    for fault in sorted({row["fault"] for row in rows}):
        of_fault = [row for row in rows if row["fault"] == fault]
        cells = []
        for name in names:
            good = [row["good"] == "True" for row in of_fault if row["mode"] == name]
            cells.append(f"{sum(good)} of {len(good)}" if good else "")
        lines.append([fault, *cells, f"{max(float(row['ended']) for row in of_fault):.0f}"])
    return markdown(lines, ["fault", *names, "slowest end, s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    done = {row["number"] for row in read(options.rows)}
    for number, name, fault, victim in plan(options.modes, options.faults, options.seed):
        if str(number) in done:
            continue
        row = one_fault(number, name, fault, victim, options.seed)
        with options.rows.open("a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        print(*row.values(), flush=True)
    rows = read(options.rows)
    bad = [row for row in rows if row["good"] != "True"]
    print(outcomes(rows))
    missed = sum(row["struck"] in MISSED for row in rows)
    print(f"{len(rows) - len(bad)} of {len(rows)} faults: nothing hung, stayed, was lost or went another way")
    print(f"{missed} of them struck nothing: the run, or that process of it, had ended or had yet to begin")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
