"""The vLLM server that a recipe's training needs, so that model, dtype, lengths and log-probs cannot disagree.

python scripts/serve.py --config recipe.yaml [--options of the recipe] [-- further flags of `vllm serve`]
python scripts/serve.py --print --config recipe.yaml     shows the command
python scripts/serve.py --wait 600 --config recipe.yaml  waits for the health of the one that runs
"""

import argparse
import logging
import os
import shlex
import sys
from importlib.util import find_spec

import torch

from cfpo_trl.grpo import ARGUMENTS
from cfpo_trl.mistakes import say_mistakes
from cfpo_trl.recipe import RecipeParser
from cfpo_trl.vllm_server import serve_command, server_url, wait_for_health


def main(arguments: list[str]) -> None:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = arguments[end + 1 :]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--wait", type=float, metavar="SECONDS")
    mine, recipe = parser.parse_known_args(arguments[:end])
    script_args, training_args, model_args, _ = RecipeParser(ARGUMENTS).parse_args_and_config(recipe)

    if mine.wait is not None:
        logging.basicConfig(format="%(message)s", level=logging.INFO)
        try:
            wait_for_health(server_url(training_args), mine.wait)
        except ConnectionError as error:
            sys.exit(str(error))
        return
    command = [*serve_command(training_args, model_args, script_args.max_prompt_length), *flags]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # the endpoints by which weights are exchanged
    if not torch.cuda.is_available():
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    print(*(f"{name}={value}" for name, value in environment.items()), shlex.join(command), flush=True)
    if not mine.print:
        if find_spec("vllm") is None:
            sys.exit("This needs vLLM: `pip install 'cfpo_trl[vllm]'`.")
        os.execvpe(command[0], command, os.environ | environment)


if __name__ == "__main__":
    say_mistakes(lambda: main(sys.argv[1:]))
