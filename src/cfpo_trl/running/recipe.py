"""Recipes: YAML and command line to arguments, so that nothing is taken for something else."""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from trl import TrlParser

from ..mistakes import Mistake
from ..suggestions import nearest
from . import catalogue

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 reads 1e-6 as a text
TYPES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}
GENERATION_BATCH = re.compile(r"generation_batch_size \((\d+)\)")
ALSO_TRUE_OR_FALSE = ("resume_from_checkpoint", "scale_rewards")  # whose types say text alone
NO_GPU = "There is no GPU here: bf16 is off. (With `use_cpu: true` it is as the recipe says.)"


class RecipeParser(TrlParser):
    """TRL's parser of `--config recipe.yaml --option value …`, with messages for those who mistype.

    After parsing, `given` holds the options that recipe and command line set, and `notes` what the user should know.

    Args:
        dataclass_types: The arguments' classes.
        where: In which recipes these are the options, for messages.
    """

    def __init__(self, dataclass_types: Sequence[type], where: str = ""):
        self.where = where
        usage = "%(prog)s --config RECIPE [--option value ...]"
        super().__init__(dataclass_types, allow_abbrev=False, usage=usage)
        self.defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        self.types = {name: kind for cls in dataclass_types for name, kind in get_type_hints(cls).items()}
        ours = [cls for cls in dataclass_types if cls.__module__.startswith("cfpo_trl.")]
        self.own_options = {name for cls in ours for base in cls.__mro__ for name in own_fields(base)}
        self.given: dict[str, Any] = {}
        self.notes: list[str] = []

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options: Any) -> tuple:
        """The dataclasses. Raises a `Mistake` that names the option, the rule and the nearest name."""
        given = sys.argv[1:] if args is None else args
        args = with_config_file([part for argument in given for part in split_config(argument)])
        try:
            return super().parse_args_and_config(args, **options)
        except Mistake:
            raise
        except yaml.YAMLError as error:
            raise Mistake(f"The recipe is no YAML: {error}") from error
        except (ValueError, TypeError) as error:
            raise Mistake(translated(str(error))) from error

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """TRL's, with the numbers that YAML reads as texts.

        Raises:
            Mistake: an option does not exist, or takes no value of this type: argparse checks none of a recipe's.
        """
        unknown = [f"{name!r}{nearest(name, self.defaults)}" for name in config if name not in self.defaults]
        if unknown:
            raise Mistake(f"The recipe has {', '.join(unknown)}, which is no option{self.where}; --help lists them.")
        config = with_numbers(config)
        for action in self._actions:
            if action.dest in config:
                check_type(action, self.types[action.dest], config[action.dest])
        return super().set_defaults_with_config(**config)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """argparse's; raises a `Mistake` for what is no option."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            name = rest[0].partition("=")[0]
            if not name.startswith("-"):
                raise Mistake(f"{name!r} belongs to no option; a recipe is given by --config {name}.")
            dashed = [f"--{option}" for option in self.defaults]
            raise Mistake(f"{name} is no option{self.where}{nearest(name, dashed)}; --help lists them.")
        values = vars(namespace)
        self.given = {name: value for name, value in values.items() if value != self.defaults.get(name)}
        if "bf16" in values and not torch.accelerator.is_available() and not (namespace.use_cpu and namespace.bf16):
            if namespace.bf16 is not False:
                self.notes.append(NO_GPU)
            namespace.bf16 = False
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise Mistake(message)

    def format_help(self) -> str:
        """The script's and CFPO's own options first, then the hundreds of TRL and transformers."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        own = [action for action in self._actions if action.dest in self.own_options]
        for title, actions in (
            ("options of cfpo_trl", own),
            ("options of TRL and transformers", [action for action in self._actions if action not in own]),
        ):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def check_type(action: argparse.Action, kind: Any, value: Any) -> None:
    """Raises a `Mistake` for a recipe's value that an option of this type, or with these choices, cannot take."""
    if isinstance(value, bool) and action.dest in ALSO_TRUE_OR_FALSE:
        return
    if not fits(value, kind):
        words = dict.fromkeys(
            TYPES[type(None)] if part is None else TYPES.get(part, str(part)) for part in parts(kind)
        )
        raise Mistake(f"{action.dest}={value!r} is {TYPES[type(value)]}, and it takes {' or '.join(words)}.")
    if action.choices and isinstance(value, str) and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise Mistake(f"{action.dest}={value!r} is unknown{nearest(value, action.choices)}; use one of {choices}.")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value that YAML gave is of a field's type; argparse itself reads texts as what it takes."""
    if isinstance(value, str) or kind is Any:
        return True
    for part in parts(kind):
        origin, members = get_origin(part) or part, get_args(part)
        if isinstance(value, list) and origin is list:
            mapped = bool(members) and is_dataclass(members[0])  # of `datasets`, which TRL makes of mappings
            return all(mapped or fits(member, members[0]) for member in value) if members else True
        if (
            type(value) is origin
            or (type(value) is int and origin is float)
            or (origin is Literal and value in members)
        ):
            return True
    return False


def parts(kind: Any) -> tuple:
    """The alternatives of a type: `int | None` has two."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def given_option(arguments: list[str], name: str) -> Any:
    """What command line or recipe give for an option, before it is known which options there are; else None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in (name, "config"):
        parser.add_argument(f"--{option}")
    args = with_config_file([part for argument in arguments for part in split_config(argument)])
    given, _ = parser.parse_known_args(args)
    value = getattr(given, name)
    if value is not None or given.config is None:
        return value
    try:
        recipe = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise Mistake(f"The recipe is no YAML: {error}") from error
    return recipe.get(name) if isinstance(recipe, dict) else None


def own_fields(cls: type) -> list[str]:
    """The fields that a class of this package declares itself."""
    return list(inspect.get_annotations(cls)) if cls.__module__.startswith("cfpo_trl.") else []


def split_config(argument: str) -> list[str]:
    """`--config=recipe.yaml` as the two arguments that TRL knows."""
    name, equals, value = argument.partition("=")
    return [name, value] if name == "--config" and equals else [argument]


def with_config_file(args: list[str]) -> list[str]:
    """The arguments with a file behind `--config`: the one that it names, or the package's recipe of that name.

    Raises:
        Mistake: there is none.
    """
    if "--config" not in args:
        return args
    place = args.index("--config") + 1
    if place == len(args) or args[place].startswith("--"):
        raise Mistake("--config names no file; give a path, or the name of a recipe that `cfpo recipes` lists.")
    file = Path(args[place])
    found = file if file.is_file() else catalogue.find(args[place])
    if found is None:
        beside = [str(other) for other in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        names = [name for name, _ in catalogue.recipes()]
        raise Mistake(f"--config {file}: there is no such file{nearest(str(file), [*beside, *names])}.")
    return [*args[:place], str(found), *args[place + 1 :]]


def with_numbers(value: Any) -> Any:
    """The value with texts such as `1e-6`, which are numbers in YAML 1.2, as numbers."""
    if isinstance(value, dict):
        return {key: with_numbers(member) for key, member in value.items()}
    if isinstance(value, list):
        return [with_numbers(member) for member in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def mapping(option: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The value of an option that is a mapping: the recipe gives it as such, the command line as JSON."""
    try:
        read = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        read, problem = None, f" ({error})"
    else:
        problem = ""
    if not isinstance(read, dict):
        raise ValueError(f"{option}={value!r} is no mapping{problem}; on the command line it is written as JSON.")
    return dict(read)


def translated(message: str) -> str:
    """A message of TRL or transformers in the options that the user wrote."""
    return GENERATION_BATCH.sub(r"per_device_train_batch_size × processes × steps_per_generation (here \1)", message)
