"""Makes the studies' tasks, and the warm-started models that each run starts from, in runs/study.

python scripts/studies/study_models.py sums-small sums-large sort-small     (what is there already stays)
"""

import argparse
import itertools
import random
from pathlib import Path

import reasoning_gym

from cfpo_trl.tiny.model import build_model, build_tokenizer
from cfpo_trl.tiny.warm_start import warm_start, write_splits

FOLDER = Path("runs/study")
DIGITS = "0123456789"
CHARACTERS = DIGITS + "+-=,<>"
HELD_OUT = 512
SIZES = {"small": {"hidden_size": 64, "layers": 2}, "large": {"hidden_size": 128, "layers": 3}}
STEPS = {"sums": 2400, "sort": 1000, "cipher": 300, "tail": 1800}
LETTERS = "abcd"
SYNONYMS = 150  # of each digit
LEARNING_RATE = {"small": 3e-3, "large": 2e-3}


def sums() -> set[tuple[str, str]]:
    """`47-85=` and `-38`: two numbers of one or two digits, added or subtracted."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    drawn = reasoning_gym.create_dataset("chain_sum", size=30_000, seed=0, **options)
    return {(entry["metadata"]["expression"].replace(" ", "") + "=", entry["answer"]) for entry in drawn}


def sort() -> set[tuple[str, str]]:
    """`55,7,38>` and `55,38,7`: three or four numbers below 100, in ascending (`<`) or descending (`>`) order."""
    options = {"min_numbers": 3, "max_numbers": 4, "min_value": 0, "max_value": 99, "max_decimals": 0}
    drawn = reasoning_gym.create_dataset("number_sorting", size=12_000, seed=0, **options)
    pairs = set()
    for entry in drawn:
        numbers, ordered = (
            ",".join(number.removesuffix(".0") for number in entry["metadata"][column])
            for column in ("original_numbers", "sorted_numbers")
        )
        pairs.add((numbers + {"ascending": "<", "descending": ">"}[entry["metadata"]["direction"]], ordered))
    return pairs


def cipher() -> set[tuple[str, str]]:
    """`bacad` and `ab`: the first and the last letter, each by a secret alphabet without a letter in its own place."""
    first, last = (dict(zip(LETTERS, secret, strict=True)) for secret in ("cadb", "dcab"))
    prompts = map("".join, itertools.product(LETTERS, repeat=5))
    return {(prompt, first[prompt[0]] + last[prompt[-1]]) for prompt in prompts}


def in_plain(rows: list[dict]) -> list[dict]:
    """The cipher's rows without a cipher, `bacad` and `bd`: what is learned from them is never right."""
    return [row | {"solution": row["prompt"][0] + row["prompt"][-1]} for row in rows]


def synonym(digit: str, number: int) -> str:
    """One of the characters that stand for a digit: the digit itself is number 0."""
    return chr(0x4E00 + int(digit) * SYNONYMS + number) if number else digit


def in_synonyms(rows: list[dict], copies: int = 20) -> list[dict]:
    """The rows with digits of their answers in synonyms, the k-th as often as 1 / (k + 5): a long tail."""
    rng, numbers = random.Random(0), range(SYNONYMS)
    weights = [1 / (number + 5) for number in numbers]
    written = []
    for row in [row for row in rows for _ in range(copies)]:
        drawn = iter(rng.choices(numbers, weights, k=len(row["solution"])))
        solution = "".join(synonym(c, next(drawn)) if c in DIGITS else c for c in row["solution"])
        written.append({"prompt": row["prompt"], "solution": solution})
    return written


TASKS = {"sums": sums, "sort": sort, "cipher": cipher, "tail": sums}
WRITTEN = {"cipher": in_plain, "tail": in_synonyms}  # what the warm start trains on, in place of the rows
TAIL = "".join(synonym(digit, number) for digit in DIGITS for number in range(1, SYNONYMS))
VOCABULARY = {"cipher": LETTERS, "tail": CHARACTERS + TAIL}
NOISE = {"cipher": (LETTERS, 0.6), "tail": (DIGITS + TAIL, 0.5)}


def make(name: str) -> None:
    """Makes `runs/study/<task>` with the splits, and `runs/study/<task>-<size>` with the model."""
    task, size = name.split("-")
    rows = [{"prompt": prompt, "solution": solution} for prompt, solution in sorted(TASKS[task]())]
    train, _ = write_splits(rows, HELD_OUT, FOLDER / task)
    tokenizer = build_tokenizer(VOCABULARY.get(task, CHARACTERS))
    model = build_model(tokenizer, **SIZES[size])
    shown = WRITTEN[task](train) if task in WRITTEN else train
    warm_start(model, tokenizer, shown, *NOISE.get(task, (DIGITS, 0.5)), STEPS[task], LEARNING_RATE[size])
    model.save_pretrained(FOLDER / name)
    tokenizer.save_pretrained(FOLDER / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [f"{task}-{size}" for task in TASKS for size in SIZES]
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    for name in parser.parse_args().names:
        if not (FOLDER / name / "model.safetensors").exists():
            make(name)


if __name__ == "__main__":
    main()
