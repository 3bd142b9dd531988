"""What a recipe with `rollouts: async` takes, and what must hold before its model is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import GRPOConfig, ModelConfig

from ..asynchronous import AsyncCFPOConfig, AsyncCFPOTrainer, AsyncClipTrainer, check_asynchronous
from ..rewards.named import NamedReward
from ..rollouts.server import check_vllm, get_json, server_url
from ..together import decided_by_main
from .loading import reads_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINERS = {"cfpo": AsyncCFPOTrainer, "grpo": AsyncClipTrainer}
WITHOUT_HORIZON = ("constant", "constant_with_warmup")
SERVER_OPTIONS = (
    "vllm_server_host",
    "vllm_server_port",
    "vllm_tensor_parallel_size",
    "vllm_max_model_length",
    "vllm_model_impl",
)

# As GRPOConfig has them: a recipe with a vLLM server becomes asynchronous by one line.
ServerOptions = make_dataclass(
    "ServerOptions",
    [
        (one.name, one.type, field(default=one.default, metadata=one.metadata))
        for one in fields(GRPOConfig)
        if one.name in SERVER_OPTIONS
    ],
    namespace={"__module__": __name__},
)


@dataclass
class AsyncRecipeConfig(AsyncCFPOConfig, ServerOptions):  # type: ignore[misc, valid-type]
    """[`AsyncCFPOConfig`], with the names by which `GRPOConfig` describes the vLLM server."""

    dtype: str = field(default="float32", init=False)  # ModelConfig has it, too, and is asked
    use_vllm: bool = field(default=True, metadata={"help": "Always true: a vLLM server rolls out."})
    vllm_mode: str = field(default="server", metadata={"help": "Always `server`."})
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "The server's URL, in place of its host and port."}
    )
    vllm_server_timeout: float = field(
        default=10.0, metadata={"help": "Seconds to wait for the vLLM server at the start."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vllm_server_base_url = server_url(self)


def check_recipe(
    args: AsyncRecipeConfig, model_args: ModelConfig, reward_funcs: list[str], rollout_func: str | None = None
) -> None:
    """Raises a `ValueError` that names the value, the rule and the fix for what a recipe cannot ask for."""
    check_asynchronous(args)
    if not args.use_vllm or args.vllm_mode != "server":
        raise ValueError(
            f"rollouts: async needs a vLLM server, and the recipe has use_vllm: {args.use_vllm}, vllm_mode: "
            f"{args.vllm_mode}; use true and server, or rollouts: sync."
        )
    if rollout_func is not None:
        raise ValueError(f"rollout_func={rollout_func!r}: TRL's asynchronous trainer has its own; use an environment.")
    if args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r}: TRL's asynchronous trainer does not evaluate; use 'no', and "
            "`benchmarks:` for checkpoints."
        )
    if args.max_steps <= 0 and args.lr_scheduler_type not in WITHOUT_HORIZON:
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} needs max_steps: how many steps an epoch has is "
            f"known at its end. Give max_steps, or use {' or '.join(WITHOUT_HORIZON)}."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("Quantized weights cannot be sent to the server; remove load_in_4bit and load_in_8bit.")
    if args.reward_weights and len(args.reward_weights) != len(reward_funcs):
        raise ValueError(f"reward_weights has {len(args.reward_weights)} numbers for {len(reward_funcs)} rewards.")
    for name in reward_funcs:
        if "/" in name and "://" not in name:
            raise ValueError(
                f"reward_funcs has {name!r}, a reward model, and the rollout process sees no GPU; serve it by "
                "`cfpo serve-reward`, and give its URL."
            )


def check_server_and_lengths(args: AsyncRecipeConfig, model_args: ModelConfig, max_prompt_length: int | None) -> int:
    """The longest prompt that the server takes beside a completion, or the recipe's; see [`check_vllm`]."""
    decided_by_main(partial(check_vllm, args, model_args, max_prompt_length))
    if max_prompt_length is not None:
        return max_prompt_length
    served = decided_by_main(lambda: get_json(server_url(args), "/v1/models")["data"][0]["max_model_len"])
    return served - args.max_completion_length


def check_conversations(dataset: Dataset, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises a `ValueError` where TRL could not render the prompts, or not read the completions as messages."""
    if not isinstance(dataset[0]["prompt"], list):
        raise ValueError(
            "rollouts: async needs conversations: give a chat_template, or `prompt_format: conversational`."
        )
    if not reads_messages(tokenizer):
        raise ValueError(
            "rollouts: async reads completions as messages, and TRL does not know how with this model's chat "
            "template; give response_template, or a chat_template that TRL knows."
        )


def that_pickle(
    names: list[str], parameters: dict[str, dict[str, Any]], rewards: list[Callable]
) -> list[Callable[..., Any]]:
    """The rewards as the rollout process can build them: by name, but for coroutines, which TRL awaits."""
    return [
        reward if iscoroutinefunction(reward) else NamedReward(name, parameters.get(name), reward.__name__)
        for name, reward in zip(names, rewards, strict=True)
    ]
