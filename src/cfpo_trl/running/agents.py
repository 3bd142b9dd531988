"""Agents in a recipe: tools, environments and rollout functions by dotted paths, checked before a model is loaded."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trl

from ..imports import imported
from ..suggestions import nearest
from .loading import reads_messages
from .recipe import mapping

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

EXAMPLE = "def look(box: str) -> str, with a docstring that describes it, and each argument under `Args:`"


@dataclass
class AgentArguments:
    """What an agent can do, beside TRL's `max_tool_calling_iterations` and `chat_template_kwargs`.

    Args:
        tools (`list[str]`, *optional*): Dotted paths of functions that the policy may call.
        environment (`str` or `dict[str, str]`, *optional*): Dotted path of a class, of which each completion has an
            instance: `reset` begins an episode with the row's columns, the other public methods are tools, and
            `get_reward`, where there is one, is a reward. Several by name: a column `environment` chooses.
        environment_parameters (`dict`, *optional*): Arguments of the class; of several classes by their names.
        rollout_func (`str`, *optional*): Dotted path of a function that makes the completions in TRL's place.
    """

    tools: list[str] = field(
        default_factory=list, metadata={"help": "Dotted paths of functions that the policy may call."}
    )
    environment: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Dotted path of an environment's class, or names and paths of several."}
    )
    environment_parameters: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the environment's class; of several by their names."}
    )
    rollout_func: str | None = field(
        default=None, metadata={"help": "Dotted path of a function that makes the completions in TRL's place."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.environment, str) and self.environment.startswith("{"):
            self.environment = mapping("environment", self.environment)
        self.environment_parameters = mapping("environment_parameters", self.environment_parameters)
        if self.environment_parameters and self.environment is None:
            raise ValueError("environment_parameters is given, and no environment.")
        if self.rollout_func and (self.tools or self.environment):
            raise ValueError(
                f"rollout_func={self.rollout_func!r} with tools or an environment: TRL ignores its env_mask then, and "
                "would train on what tools wrote. Call the tools in the function, or leave it out."
            )


@dataclass
class Agent:
    """The objects that the options name.

    Args:
        tools: Functions.
        environment: A class or a partial of one, several by name, or None.
        rollout_func: A function or None.
        callable_in: What the policy may call, by the name of the environment, or None where there are no names.
        rewards_itself: Whether every environment has a `get_reward`.
    """

    tools: list[Callable]
    environment: Callable[[], Any] | dict[str, Callable[[], Any]] | None
    rollout_func: Callable | None
    callable_in: dict[str | None, list[Callable]]
    rewards_itself: bool

    @property
    def calls(self) -> bool:
        """Whether there is anything to call."""
        return any(self.callable_in.values())

    def options(self) -> dict[str, Any]:
        """Arguments of TRL's trainers."""
        named = {"tools": self.tools, "environment_factory": self.environment, "rollout_func": self.rollout_func}
        return {name: value for name, value in named.items() if value}

    def shown(self, row: dict[str, Any]) -> dict[str, Any]:
        """The variables of the chat template by which a row's prompt shows what can be called."""
        name = row["environment"] if isinstance(self.environment, dict) else None
        tools = self.callable_in.get(name)
        return {"tools": tools} if tools else {}


def load_agent(args: AgentArguments) -> Agent:
    """What the options name; one instance of each environment is made, to look at it.

    Raises:
        ValueError: a path leads nowhere, a tool has no typed arguments or docstring, or an environment no `reset`.
    """
    tools = [imported("tools", path) for path in args.tools]
    for tool, path in zip(tools, args.tools, strict=True):
        check_tool("tools", path, tool)
    named = named_environments(args)
    factories = {name: environment_of(path, given) for name, (path, given) in named.items()}
    instances = {name: instance_of(named[name][0], factory) for name, factory in factories.items()}
    return Agent(
        tools,
        factories.get(None, factories or None),  # type: ignore[arg-type]
        imported("rollout_func", args.rollout_func) if args.rollout_func else None,
        {name: tools + methods_of(instance) for name, instance in instances.items()} or {None: tools},
        bool(instances) and all(hasattr(instance, "get_reward") for instance in instances.values()),
    )


def named_environments(args: AgentArguments) -> dict[str | None, tuple[str, dict[str, Any]]]:
    """The path and the parameters of each environment, by its name, or of the one under None."""
    given = dict(args.environment_parameters or {})  # type: ignore[arg-type]
    if args.environment is None:
        return {}
    if isinstance(args.environment, str):
        return {None: (args.environment, given)}
    for name in given:
        if name not in args.environment:
            known = ", ".join(args.environment)
            raise ValueError(
                f"environment_parameters has {name!r}{nearest(name, args.environment)}, no environment: {known}."
            )
    return {name: (path, given.get(name) or {}) for name, path in args.environment.items()}


def environment_of(path: str, parameters: dict[str, Any]) -> Callable[[], Any]:
    """The class with its parameters."""
    cls = imported("environment", path)
    if not callable(getattr(cls, "reset", None)):
        raise ValueError(f"environment={path!r} has no method reset, which begins an episode with the row's columns.")
    return partial(cls, **parameters) if parameters else cls


def instance_of(path: str, factory: Callable[[], Any]) -> Any:
    """An instance whose tools can be told to a model."""
    try:
        instance = factory()
    except Exception as error:
        raise ValueError(f"environment={path!r} cannot be made: {type(error).__name__}: {error}") from error
    for method in methods_of(instance):
        check_tool("environment", f"{path}.{method.__name__}", method)
    return instance


def methods_of(environment: Any) -> list[Callable]:
    """The methods that TRL gives to the policy as tools."""
    return [
        getattr(environment, name)
        for name, _ in inspect.getmembers(type(environment), inspect.isfunction)
        if not name.startswith("_") and name not in ("reset", "get_reward")
    ]


def check_tool(option: str, path: str, tool: Any) -> None:
    """Raises a `ValueError` where the model could not be told what a tool takes."""
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException, TypeError) as error:
        raise ValueError(f"{option} has {path!r}, which is no tool: {error} Write it as {EXAMPLE}.") from error


def placeholders(args: Any) -> "DatasetDict":
    """Empty prompts, which the environment's `reset` fills, enough for a batch of rollouts; TRL's way.

    Raises:
        ValueError: nothing says how long to train, or an evaluation has no data.
    """
    from datasets import Dataset, DatasetDict

    if args.max_steps <= 0:
        raise ValueError("Without data, where the environment makes the prompts, max_steps says how long to train.")
    if args.eval_strategy != "no":
        raise ValueError("Without data there is none to evaluate on; set eval_strategy: 'no', or give dataset_name.")
    batch = args.per_device_train_batch_size * args.world_size * getattr(args, "steps_per_generation", 1)
    return DatasetDict({"train": Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * batch})})


def check_agent(agent: Agent, dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises a `ValueError` where the data or the chat template do not fit the agent.

    Refused: a dataset without the column `environment`, or with a name in it that there is not, where there are
    several; a chat template that drops tool calls or results, or whose calls TRL cannot read from a completion.
    """
    if isinstance(agent.environment, dict):
        if "environment" not in dataset.column_names:
            raise ValueError("With several environments a column `environment` names one for each row; it is missing.")
        if unknown := set(dataset["environment"]) - set(agent.environment):
            known = ", ".join(agent.environment)
            raise ValueError(f"The column environment has {min(map(str, unknown))!r}, no environment: {known}.")
    if not agent.calls:
        return
    try:
        from trl.chat_template_utils import (
            get_training_chat_template,
            is_chat_template_prefix_preserving,
            supports_tool_calling,
        )
    except ImportError as error:
        raise ValueError(f"Tools and environments need trl>=1.4 here, and {trl.__version__} is installed.") from error
    if not supports_tool_calling(tokenizer):
        raise ValueError(
            "The model's chat template drops tool calls or their results; use a model that calls tools, or give a "
            "chat_template that renders both."
        )
    if not reads_messages(tokenizer):
        raise ValueError(
            "TRL does not know how this chat template writes tool calls, and could not read them from completions; "
            "give response_template, or a chat_template that TRL knows."
        )
    if not is_chat_template_prefix_preserving(tokenizer):
        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                "The chat template writes earlier turns in another way when others follow, so that what the policy "
                "wrote could not be told from them; give a chat_template that does not."
            ) from error
