"""Programs per second of the code reward, by how many run at a time, alternating in one run.

python scripts/benchmarks/benchmark_code.py
"""

import argparse
import statistics
import time

from cfpo_trl.rewards.code import get_code_reward

WORKERS = (1, 2, 4)


def batch(size: int) -> tuple[list[str], list[list]]:
    """Programs of one test each, half of them with an input, half with an assert."""
    completions, tests = [], []
    for number in range(size):
        program = f"print({number} * int(input()))" if number % 2 else f"def f(x):\n    return x + {number}"
        completions.append(f"```python\n{program}\n```")
        tests.append([{"input": "3", "output": str(3 * number)}] if number % 2 else [f"assert f(1) == {number + 1}"])
    return completions, tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="programs in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    completions, tests = batch(args.size)
    rates: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for _ in range(args.rounds):
        for workers in WORKERS:
            reward = get_code_reward(workers=workers)
            start = time.perf_counter()
            assert reward(completions, tests=tests) == [1.0] * args.size
            rates[workers].append(args.size / (time.perf_counter() - start))
    print("| at a time | programs per second, median of rounds | smallest | largest |\n|---|---|---|---|")
    for workers, found in rates.items():
        print(f"| {workers} | {statistics.median(found):.0f} | {min(found):.0f} | {max(found):.0f} |")


if __name__ == "__main__":
    main()
