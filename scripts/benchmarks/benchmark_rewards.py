"""The accuracy reward against TRL's: wall-clock on the same long completions, alternating in one run.

python scripts/benchmarks/benchmark_rewards.py [--completions 1024] [--rounds 3]     (or `make benchmark-rewards`)
"""

import argparse
import random
import statistics
import time

from trl.rewards import accuracy_reward as trl_accuracy

from cfpo_trl.rewards import get_accuracy_reward
from cfpo_trl.rewards.golds import read_gold

GROUP = 8  # completions per prompt
WORDS = [
    "we",
    "let",
    "then",
    "so",
    "the",
    "value",
    "of",
    "$x^2+3x$",
    "is",
    "$a=5$",
    "and",
    "sum",
    "12",
    "number",
    "first",
    "second",
    "multiply",
    "by",
    "therefore",
]


def make_answer(rng: random.Random) -> tuple[str, list[str]]:
    """A gold of one of several kinds, and answers that a group gives: it in two forms, and three wrong ones."""
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    return rng.choice(
        [
            (str(a * b), [str(a * b), f"{a} \\cdot {b}", str(a * b + 1), str(a), str(b)]),
            (f"\\frac{{{a}}}{{{b}}}", [f"\\dfrac{{{a}}}{{{b}}}", f"{a}/{b}", f"\\frac{{{b}}}{{{a}}}", str(a), "0"]),
            (f"{a}\\sqrt{{{b}}}", [f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{b}}}\\cdot {a}", f"\\sqrt{{{a}}}", str(a), "x"]),
            (f"{a}x+{b}", [f"{a}x+{b}", f"{b}+{a}x", f"{a}x-{b}", f"{b}x+{a}", f"x+{b}"]),
            (f"({a}, {b})", [f"({a},{b})", f"({a}, {b})", f"({b}, {a})", f"({a}, {b}]", str(a)]),
        ]
    )


def make_batch(completions: int, words: int, seed: int) -> tuple[list, list[str]]:
    rng = random.Random(seed)
    texts, golds = [], []
    for _ in range(completions // GROUP):
        gold, answers = make_answer(rng)
        for _ in range(GROUP):
            reasoning = " ".join(rng.choices(WORDS, k=words))
            texts.append(
                [{"role": "assistant", "content": f"{reasoning} so it is $\\boxed{{{rng.choice(answers)}}}$."}]
            )
            golds.append(read_gold(gold))
    return texts, golds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--words", type=int, default=1900)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    reward = get_accuracy_reward()
    start = time.perf_counter()
    reward(["$1$"], ["1"])
    print(f"start-up of the workers, once: {time.perf_counter() - start:.2f} s; {reward.limits.count()} workers")
    ratios = []
    for index in range(options.rounds):
        texts, golds = make_batch(options.completions, options.words, seed=index)  # new ones: no cache is warm
        timed = {}
        for name, function in [("ours", reward), ("trl", trl_accuracy)][:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            timed[name] = function(texts, golds), time.perf_counter() - start
        differ = sum(a != b for a, b in zip(timed["ours"][0], timed["trl"][0], strict=True))
        ratios.append(timed["trl"][1] / timed["ours"][1])
        print(
            f"{len(texts)} completions: cfpo_trl {timed['ours'][1]:.2f} s, TRL {timed['trl'][1]:.2f} s, "
            f"ratio {ratios[-1]:.2f}; {differ} verdicts differ"
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
