"""The command `cfpo`: each of its sub-commands is a function of a module, which takes the rest of the line."""

import importlib
import os
import sys

from .mistakes import Mistake, say_mistakes
from .suggestions import nearest

COMMANDS = {  # module and function, and what the list says of it
    "train": ("running.launch:train", "train a policy: cfpo train [--engine zero3 --num_processes 8] --config RECIPE"),
    "reward": ("running.launch:train_reward", "train a reward model from preferences: cfpo reward --config RECIPE"),
    "recipes": ("running.catalogue:main", "list the recipes of the package, or copy one: cfpo recipes NAME FILE"),
    "serve": ("serve:main", "start the vLLM server of a recipe: cfpo serve --config RECIPE"),
    "serve-reward": ("rewards.serve:main", "serve a reward model by HTTP: cfpo serve-reward MODEL --port 8100"),
    "evaluate": ("evaluation.environment:evaluate", "score a model with lighteval: cfpo evaluate --model M --task T"),
    "compare": ("evaluation.environment:compare", "compare two evaluations: cfpo compare A B"),
    "check": ("checks.run:main", "find out in ten minutes what works on this machine: cfpo check"),
    "study": ("studies.run:main", "train objectives side by side, and report: cfpo study STUDY"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        ["usage: cfpo COMMAND ...", "", *lines, "", "`cfpo COMMAND --help` lists the options of a command."]
    )


def run(arguments: list[str]) -> None:
    """Runs the sub-command. Raises a `Mistake` where there is none of that name."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise Mistake(f"{name!r} is no command{nearest(name, COMMANDS)}; `cfpo --help` lists them.")
    module, function = COMMANDS[name][0].split(":")
    getattr(importlib.import_module(f".{module}", __package__), function)(rest)


def main() -> None:
    sys.path.insert(0, os.getcwd())  # rewards of the user's own
    say_mistakes(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
