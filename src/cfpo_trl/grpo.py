"""Trains a language model with CFPO, or with GRPO for comparison, from a YAML recipe.

accelerate launch src/cfpo_trl/grpo.py --config recipes/demo/config_cfpo.yaml
"""

import gc
import math
import os
import sys

gc.disable()  # the collector walks all that the imports make, again and again: a second of every start
if __name__ == "__main__":
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        sys.path[0] = os.getcwd()  # modules of the user come first; this folder's are cfpo_trl's alone
    from cfpo_trl.running.parent import end_with_launcher

    end_with_launcher()  # also while the rest is imported, which takes seconds

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging
from trl import DatasetMixtureConfig, ModelConfig

from cfpo_trl.config import CFPOConfig, check_alignment, check_config
from cfpo_trl.evaluation.callback import EvaluateCheckpoints, check_benchmarks
from cfpo_trl.mistakes import Mistake, checking, say_mistakes
from cfpo_trl.rewards.code_tests import columns_of_tests
from cfpo_trl.rewards.registry import CHOICES, NEED_SOLUTION, NEED_THINK_OPENED, check_rewards, load_rewards
from cfpo_trl.rewards.scores import RewardError
from cfpo_trl.rollouts.health import RolloutServerError
from cfpo_trl.rollouts.server import check_vllm, trl_rolls_out
from cfpo_trl.running.agents import AgentArguments, check_agent, load_agent, placeholders
from cfpo_trl.running.data import DataArguments, check_columns, load_splits, opens_think, prepare, render, select_split
from cfpo_trl.running.existing_run import RECORD, ExistingRun, FinishedRun
from cfpo_trl.running.images import check_images, placeholders_of
from cfpo_trl.running.interrupt import AlreadyTrained, RandomStateAtStep, SaveOnSignal, StopAtTheEnd
from cfpo_trl.running.loading import check_model, hide_tied_heads, load_processor, model_init_kwargs, public_name
from cfpo_trl.running.progress import one_line_per_log
from cfpo_trl.running.recipe import RecipeParser, given_option, mapping
from cfpo_trl.together import leave_together

if TYPE_CHECKING:
    from trl import GRPOTrainer

gc.freeze()  # and what they made lives as long as the process
gc.enable()

logger = logging.getLogger("cfpo_trl")

OBJECTIVES = ("cfpo", "grpo")
ROLLOUTS = ("sync", "async")


@dataclass
class CFPOScriptArguments(AgentArguments, DataArguments):
    """What the script needs beside the data, agent, model and training arguments.

    Args:
        objective (`str`, defaults to `"cfpo"`): `cfpo` penalises the ratio, `grpo` clips it; all else stays equal.
        rollouts (`str`, defaults to `"sync"`): `sync`: each batch is written by the policy that trains on it;
            `async`: a vLLM server goes on writing, see [`~cfpo_trl.AsyncCFPOTrainer`].
        reward_funcs (`list[str]`): Names of reward functions, dotted import paths, reward models or URLs of reward
            servers; their sum, weighted by `reward_weights`, is the reward. None where the environment rewards.
        reward_parameters (`dict`, *optional*): Parameters of rewards, by name.
        benchmarks (`dict`, *optional*): Variables of `make evaluate`, which runs beside the training on each saved
            checkpoint, and on the final model.
    """

    objective: Literal["cfpo", "grpo"] = field(
        default="cfpo", metadata={"help": "`cfpo` penalises the ratio, `grpo` clips it; all else stays equal."}
    )
    rollouts: Literal["sync", "async"] = field(
        default="sync", metadata={"help": "`async`: a vLLM server goes on writing while the policy is trained."}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": f"The rewards: {CHOICES}."},
    )
    reward_parameters: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of reward functions, by name."}
    )
    benchmarks: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables of `make evaluate`, which runs on each saved checkpoint."}
    )

    def __post_init__(self) -> None:
        DataArguments.__post_init__(self)
        AgentArguments.__post_init__(self)
        for name, choices in (("objective", OBJECTIVES), ("rollouts", ROLLOUTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(choices)}.")
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        if self.reward_funcs or self.environment is None:  # an environment may reward itself
            check_rewards(self.reward_funcs, mapping("reward_parameters", self.reward_parameters))
        if self.benchmarks:
            check_benchmarks(mapping("benchmarks", self.benchmarks))


ARGUMENTS = (CFPOScriptArguments, CFPOConfig, ModelConfig, DatasetMixtureConfig)


def recipe_parser(arguments: list[str]) -> RecipeParser:
    """The parser of a recipe; its `rollouts` decide which training arguments there are."""
    if given_option(arguments, "rollouts") != "async":
        return RecipeParser(ARGUMENTS)
    from cfpo_trl.running.asynchronous import AsyncRecipeConfig

    classes = (CFPOScriptArguments, AsyncRecipeConfig, ModelConfig, DatasetMixtureConfig)
    return RecipeParser(classes, where=" with rollouts: async")


def main(arguments: list[str] | None = None, trainer_class: Callable[..., "GRPOTrainer"] | None = None) -> None:
    """Trains. `trainer_class` takes the place of the objective's trainer, for experiments with others.

    Raises:
        Mistake: options, data, rewards, model or server do not fit; before any model is loaded, where that can be.
        SystemExit: a signal ended the training, or rollouts or rewards failed; a checkpoint was saved.
    """
    with checking():
        # Options: what needs no data and no model
        if not torch.accelerator.is_available():  # with several processes it would be "cpu:0", unknown to torch.load
            os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        arguments = sys.argv[1:] if arguments is None else arguments
        parser = recipe_parser(arguments)
        script_args, training_args, model_args, mixture = parser.parse_args_and_config(arguments)
        asynchronous = script_args.rollouts == "async"
        if asynchronous:
            from cfpo_trl.running import asynchronous as with_server

            with_server.check_recipe(training_args, model_args, script_args.reward_funcs, script_args.rollout_func)
        else:
            if script_args.objective == "cfpo":
                check_config(training_args)
            check_alignment(training_args)
        check_model(model_args.model_name_or_path)
        log_setup(script_args, training_args, model_args, parser.notes)
        if asynchronous:
            script_args.max_prompt_length = with_server.check_server_and_lengths(
                training_args, model_args, script_args.max_prompt_length
            )
        elif training_args.use_vllm:
            check_vllm(training_args, model_args, script_args.max_prompt_length)

        # A run that is there already
        cycle = 1 if asynchronous else steps_per_rollout(training_args)
        if training_args.save_strategy == "steps" and training_args.save_steps % cycle:
            logger.warning(
                "save_steps=%s is no multiple of the %d steps that share a batch of rollouts: a run resumed within "
                "one makes new rollouts and departs from an uninterrupted run.",
                training_args.save_steps,
                cycle,
            )
        run = ExistingRun(
            training_args.output_dir, script_args.if_output_exists, training_args.resume_from_checkpoint, parser.given
        )
        try:
            checkpoint = run.checkpoint()
        except FinishedRun as finished:
            print(finished)
            return

        # Agent and data
        agent = load_agent(script_args)
        if not script_args.reward_funcs and not agent.rewards_itself:
            raise Mistake("No reward: reward_funcs is empty, and the environment has no get_reward.")
        evaluate = training_args.eval_strategy != "no"
        if agent.environment and not script_args.dataset_name and not mixture.datasets:
            splits = placeholders(training_args)
        else:
            splits = load_splits(script_args, mixture)
        train_dataset = select_split(splits, script_args.dataset_train_split, "dataset_train_split")
        eval_dataset = select_split(splits, script_args.dataset_test_split, "dataset_test_split") if evaluate else None
        needs_solution = [name for name in script_args.reward_funcs if name in NEED_SOLUTION]
        given = mapping("reward_parameters", script_args.reward_parameters)
        parameters = {name: dict(values or {}) for name, values in given.items()}
        tests = columns_of_tests(**parameters.get("code", {})) if "code" in script_args.reward_funcs else []
        for dataset in (train_dataset, eval_dataset) if evaluate else (train_dataset,):
            check_columns(dataset, script_args, needs_solution, tests)

        # The trainers take seconds to import, which no message above should wait for
        from trl import get_peft_config, get_quantization_config

        from cfpo_trl import AlignmentTrainer, CFPOTrainer

        # Prompts, as the model sees them
        templates = script_args.chat_template, mapping("response_template", script_args.response_template)
        processor = load_processor(training_args, model_args, *templates)
        tokenizer = getattr(processor, "tokenizer", processor)
        template_kwargs = training_args.chat_template_kwargs
        needs_mathematics = any(name != "exact_match" for name in needs_solution)
        as_prompts = partial(
            prepare,
            args=script_args,
            processor=processor,
            needs_mathematics=needs_mathematics,
            template_kwargs=template_kwargs,
            tests=tests,
            shown=agent.shown,
        )
        check_images(train_dataset, processor, asynchronous)
        train_dataset = as_prompts(train_dataset)
        eval_dataset = None if eval_dataset is None else as_prompts(eval_dataset)
        if asynchronous:
            with_server.check_conversations(train_dataset, tokenizer)
        check_agent(agent, train_dataset, tokenizer)
        shown = {**(template_kwargs or {}), **agent.shown(train_dataset[0])}
        first = render(train_dataset[0]["prompt"], processor, shown, placeholders_of(train_dataset.select([0]))[0])
        logger.info("%d rows to train on. The first prompt, as the model sees it:\n%s", len(train_dataset), first)

        # Rewards
        for name in NEED_THINK_OPENED & set(script_args.reward_funcs):
            if opens_think(first):
                logger.info("The chat template opens <think> already: the %s reward does not ask for it again.", name)
                parameters.setdefault(name, {}).setdefault("think_opened", True)
        reward_funcs = load_rewards(script_args.reward_funcs, parameters, train_dataset.column_names)

        # Trainer, which loads the model
        training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
        if asynchronous:
            del training_args.model_init_kwargs["attn_implementation"]  # TRL's own, for packed rows
        quantization = get_quantization_config(model_args)
        stop, random_state = SaveOnSignal(cycle), RandomStateAtStep()
        benchmarks = (
            EvaluateCheckpoints(mapping("benchmarks", script_args.benchmarks)) if script_args.benchmarks else None
        )
        callbacks = [stop, random_state, StopAtTheEnd(), *run.callbacks(), *([benchmarks] if benchmarks else [])]
        options = {
            "model": model_args.model_name_or_path,
            "args": training_args,
            "callbacks": callbacks,
            "peft_config": get_peft_config(model_args),
            **agent.options(),
        }
        if asynchronous:
            trainer = (trainer_class or with_server.TRAINERS[script_args.objective])(
                reward_funcs=with_server.that_pickle(script_args.reward_funcs, parameters, reward_funcs),
                train_dataset=train_dataset.shuffle(seed=training_args.seed),
                processing_class=tokenizer,
                **options,
            )
        else:
            trainer_class = trainer_class or {"cfpo": CFPOTrainer, "grpo": AlignmentTrainer}[script_args.objective]
            with rollouts(training_args):
                trainer = trainer_class(
                    reward_funcs=reward_funcs,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processor,
                    **options,
                    **({"quantization_config": quantization} if quantization else {}),  # TRL 1.0 has no such argument
                )
        one_line_per_log(trainer)
        run.begin()

    # Train
    with stop, hide_tied_heads(trainer.model):
        try:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except AlreadyTrained:
            metrics = {}
        except (RolloutServerError, RewardError) as error:
            save_and_exit(trainer, random_state, error)
        trainer.save_state()
        if stop.received and trainer.state.global_step < trainer.state.max_steps:
            say_stopped(trainer, stop, stop.exact and not asynchronous)

        # Save
        trainer.save_model(training_args.output_dir)
        trainer.create_model_card(
            model_name=Path(training_args.output_dir).name, dataset_name=public_name(script_args.dataset_name)
        )
        trainer.save_metrics("train", metrics)  # last: it marks the run as finished
        trainer.accelerator.print(
            f"Model saved in {training_args.output_dir}; every log in trainer_state.json, the options in {RECORD}."
        )
    if number := stop.received_by_any():
        trainer.accelerator.print("The training had ended when the signal came; the evaluation is left out.")
        leave_together()
        sys.exit(128 + number)
    if evaluate:
        trainer.save_metrics("eval", trainer.evaluate())
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=public_name(script_args.dataset_name))
    leave_together()  # now: the benchmarks may take longer than the others can wait
    if benchmarks and trainer.is_world_process_zero():
        benchmarks.start(Path(training_args.output_dir))
        benchmarks.wait()


def log_setup(
    script_args: CFPOScriptArguments, training_args: CFPOConfig, model_args: ModelConfig, notes: list[str]
) -> None:
    """Shows messages of the main process, and says in a few lines what will be trained on what."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO if training_args.process_index == 0 else logging.ERROR)
    transformers_logging.set_verbosity(training_args.get_process_log_level())
    logger.info(
        "%s of %s on %s; rewards: %s; epsilon %s; %s; %d processes on %s; output in %s",
        script_args.objective,
        model_args.model_name_or_path,
        script_args.dataset_name or ("an environment" if script_args.environment else "a mixture"),
        ", ".join(script_args.reward_funcs) or "the environment's",
        training_args.epsilon,
        use_of_rollouts(training_args),
        training_args.world_size,
        training_args.device,
        training_args.output_dir,
    )
    for note in notes:
        logger.info(note)


def use_of_rollouts(args: Any) -> str:
    """What a batch of rollouts, or an asynchronous one, is used for."""
    if hasattr(args, "max_staleness"):
        return f"rollouts up to {args.max_staleness} versions of the policy old"
    return (
        f"{args.loss_type}, {args.num_iterations} iterations x {args.steps_per_generation} steps per batch of rollouts"
    )


def steps_per_rollout(args: CFPOConfig) -> int:
    """Optimizer steps after which a batch of rollouts and an update end together."""
    micro_batches = args.num_iterations * args.steps_per_generation
    return micro_batches // math.gcd(micro_batches, args.gradient_accumulation_steps)


def rollouts(args: CFPOConfig) -> AbstractContextManager[None]:
    """Where trainers are built: with TRL's rollouts, or with our own where TRL's way ends."""
    if trl_rolls_out(args):
        return nullcontext()
    from cfpo_trl.rollouts.generation import vllm_generation_for

    return vllm_generation_for(args)


def save_and_exit(
    trainer: "GRPOTrainer", random_state: RandomStateAtStep, error: RolloutServerError | RewardError
) -> NoReturn:
    """Keeps what was trained when rollouts or rewards failed; exits with status 1."""
    step = trainer.state.global_step
    if step and not Path(trainer.args.output_dir, f"checkpoint-{step}", "trainer_state.json").exists():
        random_state.restore(step)
        trainer._save_checkpoint(trainer.model, trial=None)
    saved = get_last_checkpoint(trainer.args.output_dir) or "none, for no step was done"
    trainer.accelerator.print(
        f"{error}\nStopped at step {trainer.state.global_step}; last checkpoint: {saved}. "
        "When that works again, run the same command again."
    )
    leave_together()
    sys.exit(1)


def say_stopped(trainer: "GRPOTrainer", stop: SaveOnSignal, exact: bool) -> NoReturn:
    """Says where the run can go on after a signal, and whether exactly; exits with the signal's status."""
    exactly = "" if exact else " It makes new rollouts, and departs from the trajectory of an uninterrupted run."
    trainer.accelerator.print(
        f"Stopped at step {trainer.state.global_step}; saved in {get_last_checkpoint(trainer.args.output_dir)}. "
        f"To go on from there, run the same command again.{exactly}"
    )
    leave_together()
    sys.exit(128 + stop.received)


if __name__ == "__main__":
    say_mistakes(main)
