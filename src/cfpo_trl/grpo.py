"""Trains a language model with CFPO, or with GRPO for comparison, from a YAML recipe.

accelerate launch src/cfpo_trl/grpo.py --config recipes/demo/config_cfpo.yaml
"""

from dataclasses import dataclass, field
from typing import Literal

from datasets import load_dataset
from trl import GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from cfpo_trl import CFPOConfig, CFPOTrainer
from cfpo_trl.config import check_config
from cfpo_trl.rewards import exact_match_reward

TRAINERS = {"cfpo": CFPOTrainer, "grpo": GRPOTrainer}
REWARDS = {"exact_match": exact_match_reward}


@dataclass
class CFPOScriptArguments(ScriptArguments):
    """What the script needs beside TRL's dataset, model and training arguments.

    Args:
        objective (`str`, defaults to `"cfpo"`): `cfpo` penalises the ratio, `grpo` clips it; all else stays equal.
        reward_funcs (`list[str]`): Names of the reward functions; their weighted sum is the reward.
    """

    objective: Literal["cfpo", "grpo"] = field(
        default="cfpo", metadata={"help": "`cfpo` penalises the ratio, `grpo` clips it; all else stays equal."}
    )
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": f"Names of the reward functions: {', '.join(REWARDS)}."}
    )

    def __post_init__(self):
        if self.objective not in TRAINERS:
            raise ValueError(f"objective={self.objective!r} is unknown; use one of {', '.join(TRAINERS)}.")
        if not self.reward_funcs or not set(self.reward_funcs) <= set(REWARDS):
            raise ValueError(f"reward_funcs={self.reward_funcs} must name some of: {', '.join(REWARDS)}.")


def main(arguments: list[str] | None = None) -> None:
    parser = TrlParser((CFPOScriptArguments, CFPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    if script_args.objective == "cfpo":
        check_config(training_args)

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = TRAINERS[script_args.objective](
        model=model_args.model_name_or_path,
        reward_funcs=[REWARDS[name] for name in script_args.reward_funcs],
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved in {training_args.output_dir}")


if __name__ == "__main__":
    main()
