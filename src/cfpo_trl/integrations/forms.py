"""The forms of the objective that an engine selects by name. Imports nothing: OpenRLHF's hook must not."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_BOUND = 20.0  # verl's and OpenRLHF's, in their own losses


@dataclass(frozen=True)
class Form:
    """Whose ratio the objective has, and the largest slope of its penalty: see [`~cfpo_trl.cfpo_objective`].

    Args:
        sequence: One ratio per completion, the geometric mean of its tokens', in place of each token's.
        penalty_slope: As `CFPOConfig.penalty_slope`; None is the paper's form.
    """

    sequence: bool = False
    penalty_slope: float | None = None

    def log_ratio(self, log_ratio: "Tensor", mask: "Tensor") -> "Tensor":
        """The log-ratio that each token counts with, from its own, log π_θ − log π_old, and the mask; all `(B, T)`."""
        log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        if not self.sequence:
            return log_ratio
        means = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return means.expand_as(log_ratio)


FORMS = {
    "cfpo": Form(),
    "cfpo_bounded": Form(penalty_slope=1.0),
    "cfpo_sequence": Form(sequence=True, penalty_slope=1.0),
}
