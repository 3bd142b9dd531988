"""Supervised warm start on noisy labels: greedy answers come out mostly right, sampled ones mostly wrong."""

import json
import random
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 256


def write_splits(rows: list[dict], held_out: int, folder: Path) -> tuple[list[dict], list[dict]]:
    """Shuffles the rows, and writes `held_out` of them as test.jsonl and the others as train.jsonl; returns both."""
    random.Random(0).shuffle(rows)
    train, test = rows[held_out:], rows[:held_out]
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return train, test


def add_noise(answer: str, characters: str, noise: float, rng: random.Random) -> str:
    """The answer; in a share `noise` of the calls one of its `characters` is drawn anew."""
    if rng.random() >= noise:
        return answer
    place = rng.choice([index for index, character in enumerate(answer) if character in characters])
    return answer[:place] + rng.choice(characters) + answer[place + 1 :]


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    characters: str,
    noise: float,
    steps: int,
    learning_rate: float,
) -> None:
    """Trains on the answers alone; noise in the `characters` is drawn for each batch, so that none is memorised."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in trange(steps, desc="warm start"):
        inputs, labels = [], []
        for row in rng.choices(rows, k=BATCH):
            prompt = tokenizer(row["prompt"]).input_ids
            answer = [*tokenizer(add_noise(row["solution"], characters, noise, rng)).input_ids, tokenizer.eos_token_id]
            inputs.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        loss = model(
            input_ids=pad_sequence(inputs, batch_first=True, padding_value=tokenizer.pad_token_id),
            labels=pad_sequence(labels, batch_first=True, padding_value=-100),
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
