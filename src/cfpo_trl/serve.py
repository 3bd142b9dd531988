"""The vLLM server that a recipe's training needs, so that model, dtype, lengths and log-probs cannot disagree.

cfpo serve --config recipe.yaml [--options of the recipe] [-- further flags of `vllm serve`]
cfpo serve --print --config recipe.yaml     shows the command
cfpo serve --wait 600 --config recipe.yaml  waits for the health of the one that runs
"""

import argparse
import logging
import os
import shlex
import sys
from importlib.util import find_spec

import torch

from .grpo import recipe_parser
from .mistakes import Mistake, checking
from .rollouts.server import serve_command, server_url, wait_for_health


def main(arguments: list[str]) -> None:
    """Becomes the process that runs the server, and ends with all of it.

    Raises:
        Mistake: the recipe is wrong, vLLM is missing, or nothing gets healthy.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = arguments[end + 1 :]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--wait", type=float, metavar="SECONDS")
    mine, recipe = parser.parse_known_args(arguments[:end])
    with checking():
        script_args, training_args, model_args, _ = recipe_parser(recipe).parse_args_and_config(recipe)
        if mine.wait is not None:
            logging.basicConfig(format="%(message)s", level=logging.INFO)
            wait_for_health(server_url(training_args), mine.wait)
            return
    command = [*serve_command(training_args, model_args, script_args.max_prompt_length), *flags]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # the endpoints by which weights are exchanged
    if not torch.cuda.is_available():
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    print(*(f"{name}={value}" for name, value in environment.items()), shlex.join(command), flush=True)
    if not mine.print:
        if find_spec("vllm") is None:
            raise Mistake("cfpo serve needs vLLM: `pip install 'cfpo_trl[vllm]'`.")
        # vLLM's engine outlives a server that is killed, with all of its memory: a process in between ends it.
        between = [sys.executable, "-m", "cfpo_trl.running.group"]
        os.execve(sys.executable, [*between, *command], os.environ | environment)
