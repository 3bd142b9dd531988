"""How long completions are, and how much of the reward goes with their length."""

from torch import Tensor

QUANTILES = (0.1, 0.5, 0.9)


def length_metrics(scored: Tensor, reward_names: list[str]) -> dict[str, float]:
    """Quantiles of the lengths in tokens; correlation and slope of the reward, and of each of several, against them.

    Args:
        scored: A row per completion, `(N, 2 + F)`: length, weighted reward, and the F rewards; NaN where none applied.
        reward_names: The F rewards' names.

    Returns:
        `completions/length_q10`, `_q50`, `_q90`; `reward_length/correlation` (Pearson's, −1 to 1) and
        `reward_length/slope` (reward per token, least squares), and with several rewards
        `rewards/<name>/length_correlation` and `rewards/<name>/length_slope`. Left out where lengths are all equal;
        the correlation also where rewards are.
    """
    lengths, total, *rewards = scored.cpu().double().unbind(dim=1)
    levels = lengths.new_tensor(QUANTILES)
    quantiles = zip(QUANTILES, lengths.quantile(levels).tolist(), strict=True)
    metrics = {f"completions/length_q{100 * level:.0f}": value for level, value in quantiles}
    columns = {"reward_length/": total}
    if len(rewards) > 1:
        columns |= {f"rewards/{name}/length_": values for name, values in zip(reward_names, rewards, strict=True)}
    for prefix, values in columns.items():
        slope, correlation = regress(values, lengths)
        metrics |= {f"{prefix}slope": slope, f"{prefix}correlation": correlation}
    return {name: value for name, value in metrics.items() if value is not None}


def regress(values: Tensor, lengths: Tensor) -> tuple[float | None, float | None]:
    """Slope and correlation of the values that are not NaN; None where undefined."""
    known = ~values.isnan()
    x, y = lengths[known], values[known]
    x, y = x - x.mean(), y - y.mean()
    spread, covariance = x.square().sum(), (x * y).sum()
    if not spread > 0:
        return None, None
    size = (spread * y.square().sum()).sqrt()
    return (covariance / spread).item(), (covariance / size).item() if size > 0 else None
