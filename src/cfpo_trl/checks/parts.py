"""The parts of the check: what each runs, what it needs, and how long it may take."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A check that runs in a process of its own.

    Args:
        function: `module:function` of this package; takes the folder of the check's files, and returns what it
            measured as a text. It raises an `AssertionError` where that is outside its tolerance.
        seconds: It is stopped after that time, and has failed.
        about: What it shows.
        gpus: The fewest GPUs that it needs.
        on_cpu: It runs where there is no GPU at all, too.
        packages: All of these it needs; `vllm` stands for its CPU build, too.
    """

    function: str
    seconds: int
    about: str
    gpus: int = 0
    packages: tuple[str, ...] = ()
    on_cpu: bool = False

    def missing(self, machine: dict[str, Any]) -> str | None:
        """Why it cannot run on a machine of these [`~cfpo_trl.checks.machine.facts`]; None where it can."""
        there = {name.removesuffix("-cpu") for name in machine["packages"]}
        if absent := [package for package in self.packages if package not in there]:
            return f"{', '.join(absent)} is not installed"
        if len(machine["gpus"]) < self.gpus and not (self.on_cpu and not machine["gpus"]):
            return f"needs {self.gpus} GPU{'s' * (self.gpus > 1)}, and there are {len(machine['gpus'])}"
        return None

    def load(self) -> Callable[..., str]:
        module, function = self.function.split(":")
        return getattr(importlib.import_module(f".{module}", __package__), function)


TWO = "two processes train as one that has the whole batch"
DEEPSPEED, VLLM, PEFT = ("deepspeed",), ("vllm",), ("peft",)
PARTS = {
    "loss": Part("loss:precision", 90, "loss and gradient in fp32 and bf16 against an fp64 reference"),
    "one update": Part("loss:one_update", 90, "with one update per batch CFPO's weights are GRPO's"),
    "attention": Part("loss:attention", 90, "flash attention's log-probs against PyTorch's", 1, ("flash-attn",)),
    "learning": Part("training:learning", 240, "the reward of a tiny model rises"),
    "rollouts": Part("rollouts:by_transformers", 150, "transformers writes by the probabilities that are trained"),
    "resume": Part("training:resume", 150, "killed and resumed, a run ends as an uninterrupted one"),
    "LoRA": Part("training:lora", 90, "adapters move, the base does not", packages=PEFT),
    "QLoRA": Part("training:qlora", 120, "adapters over 4-bit weights", 1, (*PEFT, "bitsandbytes")),
    "step": Part("cost:step", 180, "a step's time and memory, CFPO over GRPO"),
    "step, Liger": Part("cost:step_with_liger", 180, "the same with Liger's kernels", 1, ("liger-kernel",)),
    "generation": Part("cost:generation", 90, "tokens per second by transformers"),
    "rewards": Part("cost:rewards", 90, "completions per second that the accuracy reward checks"),
    "2 processes, DDP": Part("processes:ddp", 240, TWO, 2, on_cpu=True),
    "2 processes, FSDP2": Part("processes:fsdp2", 240, TWO, 2),
    "2 processes, ZeRO-2": Part("processes:zero2", 240, TWO, 2, DEEPSPEED, on_cpu=True),
    "2 processes, ZeRO-3": Part("processes:zero3", 240, TWO, 2, DEEPSPEED, on_cpu=True),
    "vLLM, colocated": Part("rollouts:colocated", 240, "after updates its log-probs are the trainer's", 0, VLLM),
    "vLLM, server": Part("rollouts:server", 300, "the same from a server", 2, VLLM, on_cpu=True),
    "asynchronous": Part("rollouts:asynchronous", 300, "a server that goes on writing", 2, VLLM, on_cpu=True),
}
