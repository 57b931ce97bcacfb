"""What runs answered: details of a score, and which images changed their answer."""

import json

import pytest

from fastheads.train.answers import changed_answers, details, write_answers
from fastheads.train.evaluation import Score


def score(labels, answers, confidence):
    right = sum(a == b for a, b in zip(labels, answers, strict=True))
    return Score(right / len(labels), 0.0, len(labels), tuple(labels), tuple(answers), tuple(confidence))


def test_details_count_classes_confusions_and_confidence():
    found = details(score([0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2], [0.95, 0.55, 1.0, 0.31, 0.33, 0.05]), classes=4)
    assert found["by_class"] == {"images": [2, 3, 1, 0], "right": [1, 1, 1, 0]}
    assert found["confusions"] == [[1, 2, 2], [0, 1, 1]]
    assert found["calibration"]["images"] == [1, 0, 0, 2, 0, 1, 0, 0, 0, 2]
    assert found["calibration"]["right"] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert found["calibration"]["confidence"] == pytest.approx([0.05, 0, 0, 0.64, 0, 0.55, 0, 0, 0, 1.95])


def test_changed_answers_are_those_that_became_right_or_wrong(folders, tmp_path):
    labels = [label for _, label in folders.files[folders.index("red")]]
    before = [1 - label if i % 2 else label for i, label in enumerate(labels)]
    after = list(labels)
    after[0] = 1 - labels[0]
    for method, answers in (("zero-shot", before), ("hap", after)):
        write_answers(tmp_path / "red/seed0" / method, score(labels, answers, [0.5] * len(labels)))
    runs = [{"method": method, "target": "red", "seed": 0} for method in ("zero-shot", "hap")]
    changed = changed_answers(tmp_path, folders, runs)
    assert list(changed) == ["hap"]
    assert [(each.label, each.right) for each in changed["hap"]] == [("dark", False), ("dark", True), ("light", True)]
    assert all(each.path.is_file() and each.before != each.after for each in changed["hap"])
    assert json.loads((tmp_path / "red/seed0/hap/answers.json").read_text())["answers"] == after


def test_without_zero_shot_nothing_is_compared(folders, tmp_path):
    assert changed_answers(tmp_path, folders, [{"method": "hap", "target": "red", "seed": 0}]) == {}
