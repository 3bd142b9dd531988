"""lighteval on a checkpoint: `cfpo evaluate --model path-or-id --task math_500`, or `make evaluate MODEL=… TASK=…`.

python -m cfpo_trl.evaluation --model MODEL --task TASK[,TASK…] [--backend transformers|vllm|server]
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from . import report
from .checkpoint import fingerprint, prepare
from .environment import VARIABLES, as_options
from .errors import EvaluationError

SHOWN = 3  # questions that a message shows


def parse(arguments: list[str] | None, environment: bool = False) -> argparse.Namespace:
    """The options of the command line, or those that `make evaluate` passes by the environment."""
    parser = argparse.ArgumentParser(prog="cfpo evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a checkpoint or an adapter, or a hub's name")
    parser.add_argument("--task", required=True, help="tasks of lighteval, groups, or .jsonl files, by commas")
    parser.add_argument("--backend", choices=("transformers", "vllm", "server"), default="transformers")
    parser.add_argument("--server", help="address of the server that runs already, for --backend server")
    parser.add_argument("--samples", type=int, default=1, help="completions per question, n")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, help="longest completion; default: the task's")
    parser.add_argument("--metric", choices=("math", "exact_match"), default="math", help="for .jsonl tasks")
    parser.add_argument("--system-prompt")
    parser.add_argument("--batch-size", type=int, default=16, help="for --backend transformers")
    parser.add_argument("--limit", type=int, help="a fixed draw of that many questions: for a try, not for a result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs that share the work")
    parser.add_argument(
        "--parallel", choices=("data", "tensor"), default="data", help="what they share: the questions, or the model"
    )
    parser.add_argument("--vllm-python", help="Python of the environment that has vLLM's CPU build")
    parser.add_argument("--server-seconds", type=float, default=900.0, help="longest start of the server")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder of the results")
    if environment:
        arguments = as_options({name: os.environ[name] for name in VARIABLES if os.environ.get(name)})
    options = parser.parse_args(arguments)
    if options.samples > 1 and options.temperature == 0:
        parser.error(f"SAMPLES={options.samples} at TEMPERATURE=0 are all the same; raise the temperature.")
    if (options.backend == "server") != (options.server is not None):
        parser.error("SERVER=http://… and BACKEND=server go together.")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments, environment=arguments is None and sys.argv[1:] == ["--environment"])
    shared = options.num_gpus > 1 and options.parallel == "data"
    if shared and options.backend == "transformers" and "RANK" not in os.environ:
        launch_processes(options.num_gpus)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        model = prepare(options.model, scratch, readers(options))
        # lighteval takes seconds to import, which the message above does not wait for
        from .pipeline import run
        from .server import serving, vllm_command
        from .tasks import TaskOptions, build_tasks

        task_options = TaskOptions(options.samples, options.max_new_tokens, options.metric)
        tasks = build_tasks(options.task.split(","), task_options, scratch / "data")
        url = options.server
        if options.backend == "vllm":
            command = vllm_command(model, options.num_gpus, options.parallel, options.vllm_python)
            url = stack.enter_context(serving(command, scratch / "server.log", options.server_seconds))
        outcome = run(options, model, url, tasks, scratch)
    if outcome is None:
        return
    questions, prompts = outcome
    rows = [report.summarise(task, rows, len(tasks.refused.get(task, ()))) for task, rows in questions.items()]
    summary = {
        "model": options.model,
        "weights_sha256": fingerprint(options.model),
        "tasks": rows,
        "prompts": prompts,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "versions": {name: version(name) for name in ("lighteval", "transformers", "torch")},
        "python": platform.python_version(),
        "commit": commit(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    for task, refused in tasks.refused.items():
        if refused:
            shown = "; ".join(f"row {row}: {why}" for row, why in list(refused.items())[:SHOWN])
            print(f"{task}: left out {len(refused)} questions whose answer is not surely understood: {shown}")
    print(f"\n{report.write(options.out, summary, questions)}\n\n{options.out}/results.json, {summary['seconds']} s")


def readers(options: argparse.Namespace) -> dict[str, str]:
    """The versions of transformers that read the checkpoint, by whose they are.

    Raises:
        EvaluationError: vLLM is to serve it, and is not there.
    """
    found = {"the evaluator": version("transformers")}
    if options.backend == "vllm":
        vllm = shutil.which("vllm")
        python = options.vllm_python or (vllm and str(Path(vllm).resolve().parent / "python"))
        if not python or not Path(python).exists():
            raise EvaluationError(
                f"BACKEND=vllm finds no vLLM: put `vllm` on the PATH, or let VLLM_PYTHON={python!r} be the Python "
                "of an environment that has it."
            )
        code = "from importlib.metadata import version; print(version('transformers'))"
        found["vLLM's environment"] = subprocess.check_output([python, "-c", code], text=True).strip()
    return found


def launch_processes(number: int) -> NoReturn:
    """Runs this command again in a process for each GPU, which share the questions."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(number),
        "-m",
        "cfpo_trl.evaluation",
    ]
    os.execv(sys.executable, [*launch, *sys.argv[1:]])


def commit() -> str | None:
    """The commit of this package's repository, where it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, text=True, capture_output=True)
    return result.stdout.strip() or None


if __name__ == "__main__":
    try:
        main()
    except EvaluationError as error:
        sys.exit(str(error))
