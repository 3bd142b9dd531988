"""Where data comes from, how a row becomes a prompt, and what is said of bad rows."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict
from transformers import set_seed
from trl import DatasetMixtureConfig

from cfpo_trl.rewards import accuracy_reward, exact_match_reward
from cfpo_trl.running.data import (
    DataArguments,
    build_prompt,
    check_columns,
    load_splits,
    opens_think,
    prepare,
    read_template,
    render,
    select_split,
)

ROWS = [{"prompt": f"{i}+1", "solution": str(i + 1)} for i in range(6)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def chat_tokenizer():
    from cfpo_trl.tiny.model import build_tokenizer

    tokenizer = build_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+; <>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows))


def load(name, **options):
    return load_splits(DataArguments(dataset_name=str(name), **options), DatasetMixtureConfig())


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_files(tmp_path, ending):
    write(tmp_path / f"data.{ending}", ROWS)
    dataset = load(tmp_path / f"data.{ending}")["train"]
    assert dataset["prompt"] == [row["prompt"] for row in ROWS]


def test_folders_of_files_and_saved_to_disk(tmp_path):
    (tmp_path / "files").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "files" / f"{split}.jsonl", ROWS)
    assert set(load(tmp_path / "files")) == {"train", "test"}
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert list(load(tmp_path / "one")) == ["train"]
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "two")
    assert set(load(tmp_path / "two")) == {"train", "test"}


def test_mixture(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    mixture = DatasetMixtureConfig(
        datasets=[{"path": "json", "data_files": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")]
    )
    assert len(load_splits(DataArguments(), mixture)["train"]) == 12
    with pytest.raises(ValueError, match="are both given"):
        load_splits(DataArguments(dataset_name="x"), mixture)
    mixture.streaming = True
    with pytest.raises(ValueError, match="streaming=True: every row is checked"):
        load_splits(DataArguments(), mixture)


def test_a_mixture_is_split_alike_at_every_start(tmp_path):
    rows = [{"prompt": str(i), "solution": str(i)} for i in range(200)]
    write(tmp_path / "a.jsonl", rows)
    files = {"path": "json", "data_files": str(tmp_path / "a.jsonl")}
    splits = []
    for seed in (1, 2):  # whatever was drawn before
        set_seed(seed)
        splits.append(load_splits(DataArguments(), DatasetMixtureConfig(datasets=[files], test_split_size=0.2)))
    assert splits[0]["test"]["prompt"] == splits[1]["test"]["prompt"]


def test_generated_offline_and_disjoint():
    options = {"size": 40, "test_size": 20, "min_terms": 2, "max_terms": 2}
    splits = load("reasoning_gym:chain_sum", dataset_options=options)
    again = load("reasoning_gym:chain_sum", dataset_options=json.dumps(options))
    assert splits["train"][:] == again["train"][:]
    assert len(splits["train"]) == 40
    assert len(splits["test"]) == 20
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])


def test_a_task_without_a_problem_left_for_the_test_split_is_refused():
    options = {"size": 3000, "test_size": 2, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ValueError, match="none of the 2 problems for test is new; chain_sum has no more .* smaller"):
        load("reasoning_gym:chain_sum", dataset_options=options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reasoning_gym:chain_sums", "'reasoning_gym:chain_sums': no such task; reasoning-gym has .*chain_sum"),
        ("no/such/data", "dataset_name='no/such/data' is no file or folder here, and no dataset that a hub gave"),
        ("setup.py", r"ends in '.py'; readable: .jsonl, .json, .csv, .parquet"),
    ],
)
def test_unreadable(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "1", "solution": "1"}\n{"prompt": "2", "solu\n')
    with pytest.raises(ValueError, match=r"broken.jsonl' cannot be read: .*(JSON|parse|row)"):
        load(path)


def test_neither_name_nor_mixture():
    with pytest.raises(ValueError, match="No data: give dataset_name, or a mixture"):
        load_splits(DataArguments(), DatasetMixtureConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_format": "chat"}, "prompt_format='chat' is unknown; use one of auto, conversational, plain"),
        ({"long_prompts": "cut"}, "long_prompts='cut' is unknown; use one of drop, refuse"),
        ({"dataset_streaming": True}, "dataset_streaming=True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**options)


def test_missing_columns_and_splits():
    dataset = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="dataset_prompt_column='question' .* its columns are: prompt, solution"):
        check_columns(dataset, DataArguments(dataset_prompt_column="question"), [])
    arguments = DataArguments(dataset_solution_column="answer")
    with pytest.raises(ValueError, match="dataset_solution_column='answer' .* the rewards accuracy, cosine need it"):
        check_columns(dataset, arguments, ["accuracy", "cosine"])
    with pytest.raises(ValueError, match="dataset_test_split='test' is not in the dataset, which has: train"):
        select_split(DatasetDict({"train": dataset}), "test", "dataset_test_split")


def test_columns_are_renamed_also_over_others(chat_tokenizer):
    rows = [{"question": "1+1", "answer": "so #### 2", "prompt": "unused"}]
    arguments = DataArguments(
        dataset_prompt_column="question", dataset_solution_column="answer", prompt_format="plain", system_prompt="sum"
    )
    dataset = prepare(Dataset.from_list(rows), arguments, chat_tokenizer, True)
    assert dataset[:] == {
        "prompt": ["sum\n1+1"],
        "solution": ["so #### 2"],  # as stored: rewards that compare texts read it, too
        "question": ["1+1"],  # and a reward of one's own may ask for the columns by their own names
        "answer": ["so #### 2"],
    }


def test_prompt_forms(chat_tokenizer):
    conversation = [{"role": "user", "content": "hi"}]
    system = {"role": "system", "content": "be brief"}
    assert build_prompt("hi", None, True) == conversation
    assert build_prompt("hi", "be brief", True) == [system, *conversation]
    assert build_prompt(conversation, "be brief", True) == [system, *conversation]
    assert build_prompt("hi", None, False) == "hi"
    assert render([system, *conversation], chat_tokenizer) == "sbe brief;uhi;a"


def test_a_system_prompt_takes_the_place_of_a_conversation_s_own(chat_tokenizer, caplog):
    own = [{"role": "system", "content": "be long"}, {"role": "user", "content": "hi"}]
    assert build_prompt(own, "be brief", True) == [{"role": "system", "content": "be brief"}, own[1]]
    assert build_prompt(own, None, True) == own
    rows = Dataset.from_list([{"prompt": own}, {"prompt": own[1:]}])
    dataset = prepare(rows, DataArguments(system_prompt="be brief"), chat_tokenizer, False)
    assert [render(prompt, chat_tokenizer) for prompt in dataset["prompt"]] == ["sbe brief;uhi;a"] * 2
    assert "system_prompt takes the place of the system message in 1 conversations" in caplog.text


def test_variables_of_the_template_are_part_of_the_prompt(chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}"
    prompt = [{"role": "user", "content": "hi"}]
    assert render(prompt, chat_tokenizer, {"enable_thinking": False}) == "uhi;a<think></think>"
    rows, arguments = Dataset.from_list(ROWS), DataArguments(max_prompt_length=10)
    assert len(prepare(rows, arguments, chat_tokenizer, False)) == len(ROWS)
    with pytest.raises(ValueError, match="No row of a split is left"):
        prepare(rows, arguments, chat_tokenizer, False, {"enable_thinking": False})


def test_a_template_is_text_or_a_file_that_exists(tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert read_template(DataArguments(chat_template=str(tmp_path / "chat.jinja")).chat_template) == TEMPLATE
    assert read_template(DataArguments(chat_template=TEMPLATE).chat_template) == TEMPLATE
    with pytest.raises(ValueError, match="chat.jnja' is no file here, and no Jinja template"):
        DataArguments(chat_template=str(tmp_path / "chat.jnja"))


@pytest.mark.parametrize("missing", [None, "", []])
def test_rows_without_a_prompt_are_named(chat_tokenizer, missing):
    rows = Dataset.from_list(
        [{"prompt": prompt} for prompt in (["a"] if missing != [] else [])] + [{"prompt": missing}]
    )
    with pytest.raises(ValueError, match="rows have no prompt in the column 'prompt', the first: row"):
        prepare(rows, DataArguments(), chat_tokenizer, False)


def test_prompts_that_are_neither_text_nor_conversation(chat_tokenizer):
    with pytest.raises(ValueError, match="row 0 has 7, which is neither a text nor a conversation"):
        prepare(Dataset.from_list([{"prompt": 7}]), DataArguments(), chat_tokenizer, False)


def test_exchanged_columns_and_one_for_both(chat_tokenizer):
    rows = [{"q": f"How much is {i} and one?", "a": str(i + 1)} for i in range(6)]
    swapped = DataArguments(dataset_prompt_column="a", dataset_solution_column="q")
    with pytest.raises(ValueError, match="6 of 6 solutions are no answers, and most prompts look like answers: are"):
        prepare(Dataset.from_list(rows), swapped, chat_tokenizer, True)
    both = DataArguments(dataset_prompt_column="q", dataset_solution_column="q")
    with pytest.raises(ValueError, match="dataset_prompt_column and dataset_solution_column are both 'q'"):
        check_columns(Dataset.from_list(rows), both, ["accuracy"])


def test_the_solutions_stay_as_stored_for_rewards_that_compare_texts(chat_tokenizer):
    rows = Dataset.from_list([{"prompt": "p", "solution": "2x+3"}, {"prompt": "p", "solution": "so #### 7"}])
    solutions = prepare(rows, DataArguments(), chat_tokenizer, True)["solution"]
    assert exact_match_reward(["2x+3", "so #### 7"], solutions) == [1, 1]
    assert accuracy_reward([r"\boxed{3+2x}", r"\boxed{7}"], solutions) == [1, 1]


def test_only_what_is_unreadable_is_dropped_however_long_the_check_takes(chat_tokenizer, monkeypatch):
    """As on a machine on which the check takes longer than a batch of rewards may."""
    monkeypatch.setattr("cfpo_trl.rewards.pool.Limits.budget", 1e-3)
    golds = [rf"\\frac{{{i}}}{{97}}" for i in range(1, 40)]
    rows = Dataset.from_list([{"prompt": "p", "solution": gold} for gold in [*golds, r"\det A", "2 hours 3 minutes"]])
    assert list(prepare(rows, DataArguments(), chat_tokenizer, True)["solution"]) == golds


TOGETHER = """
import os, sys
from accelerate import PartialState
from cfpo_trl.running.data import unparseable_golds
from cfpo_trl.together import decided_by_main, leave_together
rank = PartialState(cpu=True).process_index
decided = decided_by_main(lambda: os.getpid()), unparseable_golds(["$x$", r"$\\det A$"])
os.write(1, f"{rank} {decided}\\n".encode())  # at one go: two processes write
try:
    decided_by_main(lambda: 1 / 0)
except ZeroDivisionError:
    os.write(1, f"{rank} failed\\n".encode())
leave_together()
"""


@pytest.mark.slow
def test_processes_decide_together(tmp_path):
    (tmp_path / "run.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    result = subprocess.run(
        [*command, str(tmp_path / "run.py")], env=environment, capture_output=True, text=True, check=True
    )
    lines = sorted(result.stdout.splitlines())
    assert [line for line in lines if "failed" in line] == ["0 failed", "1 failed"]
    first, second = (line.split(" ", 1)[1] for line in lines if "failed" not in line)
    assert first == second
    assert first.endswith(r"{'$\\det A$'})")


def test_auto_form_follows_the_tokenizer(chat_tokenizer):
    assert isinstance(prepare(Dataset.from_list(ROWS), DataArguments(), chat_tokenizer, False)[0]["prompt"], list)
    chat_tokenizer.chat_template = None
    assert prepare(Dataset.from_list(ROWS), DataArguments(), chat_tokenizer, False)[0]["prompt"] == "0+1"


def test_opened_think_is_seen(chat_tokenizer):
    assert not opens_think(render("<think> no </think>", chat_tokenizer))
    chat_tokenizer.chat_template = TEMPLATE.replace("}a{", "}a<think>\n{")
    assert opens_think(render([{"role": "user", "content": "x"}], chat_tokenizer))


def test_unreadable_golds_are_counted_shown_and_dropped(chat_tokenizer, caplog):
    rows = [*ROWS, {"prompt": "bad", "solution": "$$"}, {"prompt": "none", "solution": None}]
    dataset = prepare(Dataset.from_list(rows), DataArguments(), chat_tokenizer, True)
    assert len(dataset) == 7
    assert "Dropped 1 of 8 rows whose solution is not surely understood: row 6: '$$' (the sign $)" in caplog.text
    assert "1 of 8 rows have no solution; accuracy skips them" in caplog.text


def test_long_prompts_are_dropped_or_refused_never_cut(chat_tokenizer, caplog):
    rows = Dataset.from_list([*ROWS, {"prompt": "1+" * 50 + "1", "solution": "51"}])
    kept = prepare(rows, DataArguments(max_prompt_length=20, prompt_format="plain"), chat_tokenizer, False)
    assert kept["prompt"] == [row["prompt"] for row in ROWS]
    assert "1 of 7 prompts have more than max_prompt_length=20 tokens, the longest 101; dropped" in caplog.text
    with pytest.raises(ValueError, match="1 of 7 prompts .* raise it, or set long_prompts: drop"):
        prepare(rows, DataArguments(max_prompt_length=20, long_prompts="refuse"), chat_tokenizer, False)
    with pytest.raises(ValueError, match="No row of a split is left to train on"):
        prepare(rows, DataArguments(max_prompt_length=1), chat_tokenizer, False)
