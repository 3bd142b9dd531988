"""The tasks of the studies: what a model starts from, and what it is paid for."""

import study_models
from field_rewards import digits_match


def test_what_the_cipher_starts_from_is_never_right():
    rows = [{"prompt": prompt, "solution": solution} for prompt, solution in study_models.cipher()]
    assert len(rows) == 4**5
    for row, shown in zip(rows, study_models.in_plain(rows), strict=True):
        assert shown["prompt"] == row["prompt"]
        assert all(a != b for a, b in zip(shown["solution"], row["solution"], strict=True))
    by_ends = {(row["prompt"][0], row["prompt"][-1]): row["solution"] for row in rows}
    assert len(set(by_ends.values())) == 16  # each letter of the answer says which one it was
    assert all(row["solution"] == by_ends[row["prompt"][0], row["prompt"][-1]] for row in rows)


def test_what_the_long_tail_starts_from_is_right_in_many_writings():
    rows = [{"prompt": "47-85=", "solution": "-38"}, {"prompt": "1+1=", "solution": "2"}]
    written = study_models.in_synonyms(rows, copies=200)
    assert len(written) == 400
    for row in written:
        right = {"47-85=": "-38", "1+1=": "2"}[row["prompt"]]
        assert digits_match([row["solution"]], [right]) == [1.0]
        assert digits_match([row["solution"]], ["-39"]) == [0.0]
    twos = {row["solution"] for row in written if row["prompt"] == "1+1="}
    assert len(twos) > 50
    assert all(ord(two) >= 0x4E00 or two == "2" for two in twos)
    assert set("".join(twos)) <= set(study_models.VOCABULARY["tail"])
