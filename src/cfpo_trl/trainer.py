"""CFPOTrainer: TRL's GRPOTrainer with the soft clip in place of the clip."""

import logging
import textwrap
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from .alignment import AlignmentTrainer, loss_mask
from .config import CFPOConfig, check_config, uses_rollouts_once
from .seam import SoftClipSeam
from .signatures import like

logger = logging.getLogger("cfpo_trl")


class CFPOTrainer(SoftClipSeam, AlignmentTrainer):
    """Trains with Clipping-Free Policy Optimization (https://arxiv.org/abs/2601.22801); a drop-in `GRPOTrainer`.

    Takes the arguments of [`~trl.GRPOTrainer`] and keeps all of its features: the loss is TRL's own, with the clip of
    the ratio replaced by [`~cfpo_trl.soft_clip`]. `args` is a [`CFPOConfig`] or a plain `GRPOConfig`.

    Logs, over the real tokens of all processes since the last log, in training and in evaluation: `cfpo/tv`,
    `cfpo/penalty`, `cfpo/outside`, `cfpo/ess`, `cfpo/ratio_min` and `cfpo/ratio_max`, beside all that `GRPOTrainer`
    logs.

    Raises:
        ValueError: before any model is loaded, where the configuration has no clip to replace or an epsilon is
            invalid; see [`~cfpo_trl.config.check_config`].
        RuntimeError: at the first loss, where the installed TRL no longer clips in the way that this trainer replaces.

    Example:

        >>> trainer = CFPOTrainer("Qwen/Qwen2.5-1.5B-Instruct", reward_funcs=accuracy_reward, train_dataset=dataset)
        >>> trainer.train()
    """

    _tag_names: ClassVar[list[str]] = ["trl", "cfpo"]
    _name = "CFPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Clipping-Free Policy Optimization for Large Language Models",
        "id": "2601.22801",
        "citation": textwrap.dedent("""\
            @article{cagatan2026clipping,
                title   = {Clipping-Free Policy Optimization for Large Language Models},
                author  = {{\\c{C}}a{\\u{g}}atan, {\\"O}mer Veysel and Akg{\\"u}n, Bar{\\i}{\\c{s}} and {\\c{S}}ahin, G{\\"o}zde G{\\"u}l and Zhao, Xuandong},
                journal = {arXiv preprint arXiv:2601.22801},
                year    = {2026},
            }"""),  # noqa: E501
    }

    @like(GRPOTrainer.__init__)
    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        **keywords: Any,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else model.config._name_or_path
            args = CFPOConfig(f"{model_name.split('/')[-1]}-CFPO")
        check_config(args)
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        if uses_rollouts_once(self.args) and self.accelerator.is_main_process:
            logger.warning(
                "Every batch of rollouts is used for one update: all ratios are 1, and CFPO is GRPO. They differ with "
                "num_iterations above 1, or with steps_per_generation above gradient_accumulation_steps."
            )

    def counted_advantages(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The batch's advantages, `(B,)` or `(B, T)`, and the mask of the policy's own tokens, `(B, T)`."""
        return inputs["advantages"], loss_mask(inputs)
