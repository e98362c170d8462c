"""One small corpus and one pool of runs for every test of experiments/."""

import json

import pytest

from experiments.lab.study import Study
from tests.tiny_config import write_texts


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What --data takes; the experiments' folders come beside it."""
    root = tmp_path_factory.mktemp("experiments")
    texts = write_texts(root / "data", n_documents=200)
    for name, place in (("noisy", "corpus"), ("clean", "clean"), ("clean", "eval")):
        (texts / place).mkdir()
        text = (texts / f"{name}.jsonl").read_text()
        (texts / place / f"{name}.jsonl").write_text(text)
    questions = [{"question": f"one plus {i}", "answer": "two", "split": "val"} for i in range(40)]
    (texts / "eval" / "clean.jsonl").unlink()
    (texts / "eval" / "sums.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (texts / "sft").mkdir()
    answers = [{"question": f"one plus {i}", "answer": f"is {i + 1}"} for i in range(200)]
    (texts / "sft" / "sums.jsonl").write_text("\n".join(map(json.dumps, answers)))
    return root


@pytest.fixture(scope="session")
def study(folder):
    return Study("example", folder / "example", "debug", seeds=2, data=str(folder / "data"))
