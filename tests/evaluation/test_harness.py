"""Benchmarks end to end with a tiny model and a few items, through lm-eval."""

import json
import math

import numpy as np
import pytest

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.evaluation import harness, likelihood
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.evaluation.tasks import documents

GSM8K = [
    {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
    for i in range(3)
]
BOOLQ = [
    {
        "instruction": "Please answer with true or false, question: is it so?\n\n"
        "Answer format: true/false",
        "answer": answer,
    }
    for answer in ("true", "false")
]


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, "gsm8k.jsonl", GSM8K)
    write(folder, "boolq.jsonl", BOOLQ)
    return str(folder)


@pytest.fixture(scope="module")
def finished(scorer, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    settings = {"data_dir": data_dir, "num_fewshot": 1, "max_gen_toks": 4}
    return out, harness.evaluate(scorer, ["gsm8k", "boolq"], out=out, **settings), settings


def test_results_have_what_they_promise(finished):
    out, results, _ = finished
    assert results == jsonfile.read(out / "results.json")
    assert results["versions"].keys() >= {"lm_eval", "jax", "math-verify"}
    gsm8k, boolq = results["tasks"]["gsm8k"], results["tasks"]["boolq"]
    assert (gsm8k["n"], boolq["n"]) == (3, 2)
    assert (gsm8k["cut"], gsm8k["solution_cut"], gsm8k["defined_by"]) == (0, 0, "rho1_jax")
    assert results["context"] == 1024
    assert len(gsm8k["prompts"]) == 64
    assert gsm8k["correct"] == [0.0, 0.0]
    for value in (gsm8k["correct_strict"], boolq["acc"], boolq["acc_norm"]):
        assert 0 <= value[0] <= 1
    # A new model gives every one of its 300 tokens about the same probability.
    assert gsm8k["solution_loss"][0] == pytest.approx(math.log(300), rel=0.05)
    assert "correct" in harness.table(results)
    samples = (out / "samples" / "gsm8k.jsonl").read_text().splitlines()
    assert [json.loads(s)["correct"] for s in samples] == [0.0] * 3


def test_a_second_run_answers_from_the_cache(finished, scorer, monkeypatch):
    out, results, settings = finished

    def refuse(*_args, **_kwargs):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(scorer, "complete", refuse)
    monkeypatch.setattr(likelihood, "small_metrics", lambda *_: {})
    again = harness.evaluate(scorer, ["gsm8k"], out=out, **settings)
    assert again["tasks"]["gsm8k"]["correct"] == results["tasks"]["gsm8k"]["correct"]


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest(scorer, data_dir, tmp_path):
    with pytest.raises(InputError, match="did you mean gsm8k"):
        harness.evaluate(scorer, ["gsm8kk"], out=tmp_path, data_dir=data_dir)


def test_bad_input_is_one_sentence(data_dir, capsys):
    assert not harness.has_data("tabmwp", data_dir)
    assert harness.has_data("gsm8k", data_dir)
    assert harness.has_data("gsm8k", "")  # from a hub
    assert harness.main(["", "--checkpoint=/nowhere", "--tasks=gsm8k"]) == 2
    assert "nowhere" in capsys.readouterr().err


class FewTasks:
    """lm-eval's index, without the seconds it takes."""

    all_tasks = ("hellaswag", "arc_easy")


def test_tasks_are_checked_without_a_model(data_dir, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("lm-eval's tasks were read")

    monkeypatch.setattr(harness, "_manager", refuse)
    harness.check(["gsm8k", "boolq"], data_dir)
    harness.check([" gsm8k"])
    harness.check([])
    with pytest.raises(InputError, match=rf"tabmwp\.jsonl, which is not in {data_dir}"):
        harness.check(["gsm8k", "tabmwp"], data_dir)
    monkeypatch.setattr(harness, "_manager", lambda *_, **__: FewTasks)
    harness.check(["hellaswag", "gsm8k"], data_dir)
    harness.check(["arc_easy"])  # lm-eval's own, where no folder is given
    for wrong, nearest in {
        "gsm8kk": "gsm8k", "hellaswagg": "hellaswag", "nin": "nine", "_choices": "_*",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"no task {wrong}: did you mean {nearest}"):
            harness.check([wrong], data_dir)
    with pytest.raises(InputError, match=r"tabmwp needs tabmwp\.jsonl: name a data_dir"):
        harness.check(["tabmwp"])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--batch_size=3", "--batch_size=3 does not divide over 8 devices: make it a multiple of"),
        ("--batch_size=0", "--batch_size=0: give at least 1."),
        ("--limit=0", "--limit=0: give at least 1."),
        ("--max_gen_toks=0", "--max_gen_toks=0: give at least 1."),
        ("--num_fewshot=-1", "--num_fewshot=-1: give at least 0."),
        ("--tasks=,", "--tasks names no task"),
        ("--data_dir=/nowhere", "gsm8k.jsonl, which is not in /nowhere"),
        ("--out=/dev/null/x", "--out=/dev/null/x cannot be made"),
    ],
)
def test_a_wrong_option_is_said_before_a_model_is_loaded(option, said, tmp_path, capsys):
    argv = ["", "--checkpoint=/absent", "--tasks=gsm8k", f"--out={tmp_path}", option]
    assert harness.main(argv) == 2
    assert said in capsys.readouterr().err


def test_what_did_not_fit_into_the_context_is_counted_and_said(scorer, data_dir, tmp_path):
    short = Scorer(scorer.params, scorer.config, scorer.tokenizer, batch_size=4, max_length=48)
    settings = {"data_dir": data_dir, "num_fewshot": 0, "max_gen_toks": 4}
    found = harness.evaluate(short, ["gsm8k"], out=tmp_path, **settings)
    assert found["context"] == 48
    assert found["tasks"]["gsm8k"]["cut"] == 0
    assert "did not fit" not in harness.table(found)
    settings["max_gen_toks"] = 48  # as much as the context
    found = harness.evaluate(short, ["gsm8k"], out=tmp_path, **settings)
    assert found["tasks"]["gsm8k"]["cut"] == 3
    assert "did not fit into 48 tokens" in harness.table(found)
    assert "gsm8k (3 of 3 items)" in harness.table(found)


def test_more_examples_than_a_task_has_are_refused(scorer, data_dir, tmp_path):
    with pytest.raises(InputError, match="num_fewshot=9: a task has not so many examples"):
        harness.evaluate(scorer, ["gsm8k"], out=tmp_path, data_dir=data_dir, num_fewshot=9)


class Knows(Scorer):
    """A scorer to whom every second token is likely and the tokens of `right` more so."""

    def __init__(self, right):
        self.right = right
        self.tokenizer = type("T", (), {"separator_id": 0})

    def encode(self, text):
        return list(text.encode())

    def fits(self, prompt, then):
        return len(prompt + then) < 8

    def score(self, pairs):
        texts = [bytes(continuation).decode() for _, continuation in pairs]
        return [(-1.0 * len(t) + (5.0 if self.right in t else 0.0), False) for t in texts]


def test_small_metrics_by_hand():
    asked = [("Q", {"gold": gold, "target": f"x = {gold}"}) for gold in ("11", "22", "33")]
    found = likelihood.small_metrics(Knows("11"), asked)
    # Targets " x = nn": 7 characters at one nat each, of the first 5 less.
    np.testing.assert_allclose(found["solution_loss"][0], (2 / 7 + 1 + 1) / 3)
    np.testing.assert_allclose(
        found["solution_bits_per_byte"][0], (2 / 7 + 1 + 1) / 3 / math.log(2)
    )
    # Item 1: right is 5 nats likelier than both; items 2, 3: one wrong answer is 5 likelier.
    assert found["answer_margin"][0] == pytest.approx((5 - 2.5 - 2.5) / 3)
    assert found["answer_first"][0] == pytest.approx(1 / 3)
    assert found["solution_cut"] == 3  # of a prompt's letter and 7 of the solution
    assert likelihood.small_metrics(Knows("11"), [("Q", {"question": "of another form"})]) == {}


FORMS = [
    ("gsm8k", GSM8K[1], "What is 1 + 1?", "2"),
    ("math", {"problem": "P", "solution": r"so $\boxed{3}$"}, "P", "3"),
    ("svamp", {"Body": "It is 3", "Question": "So?", "Answer": 3.0}, "It is 3. So?", "3"),
    ("asdiv", {"body": "B.", "question": "Q?", "answer": "9 (cats)"}, "B. Q?", "9 (cats)"),
    ("mawps", {"input": "I", "target": 43.0}, "I", "43"),
    ("mathqa", {"problem": "P", "options": "a ) 1 , b ) 2,000 , c ) 3", "correct": "b",
                "rationale": "r"}, "P\nOptions: (A) 1 (B) 2,000 (C) 3", "(B)"),
    ("mathqa", {"problem": "P", "options": "['a ) 1', 'b ) 2']", "correct": "a", "rationale": "r"},
     "P\nOptions: (A) 1 (B) 2", "(A)"),
    ("sat_math", {"question": "Q", "options": "A) x B) y", "Answer": "B"},
     "Q\nOptions: (A) x (B) y", "(B)"),
    ("mmlu_stem", {"question": "Q", "choices": ["u", "v"], "answer": 1},
     "Q\nOptions: (A) u (B) v", "(B)"),
    ("mmlu", {"question": "Q", "choices": ["u", "v"], "answer": "B"}, "Q", "v"),
    ("agieval", {"passage": None, "question": "Q", "options": ["(A)u", "(B)v"], "label": "A"},
     "Q", "u"),
    ("instruction", {"instruction": "Please choose the answer to the question: Why?\n\nAnswer1: u "
                     "Answer2: v\n\nAnswer format: answer1/answer2", "answer": "answer2"},
     "Why?", "v"),
    ("tabmwp", {"table_title": "T", "table": "a | 1", "question": "Q?", "unit": "$",
                "choices": None, "answer": "1", "solution": "s"},
     "Read the table.\nT\na | 1\nQ? (Unit: $)", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row", "question", "gold"), FORMS)
def test_documents_have_one_form(form, row, question, gold, tmp_path):
    write(tmp_path, "a.jsonl", [row])
    loaded = documents.load(file="a.jsonl", form=form, data_dir=str(tmp_path))
    (document,) = loaded["test"]
    assert (document["question"], document["gold"]) == (question, gold)
    assert document["target"]
    write(tmp_path, "b.jsonl", [{"x": 1}])
    with pytest.raises(InputError, match="has not the fields"):
        documents.load(file="b.jsonl", form=form, data_dir=str(tmp_path))


def test_a_choice_may_be_named_by_its_letter_or_its_text():
    document = {"gold": "(B)", "choices": ["10%", "25%"], "label": 1}
    for text in ("The answer is (B).", "The answer is B", "The answer is 25%."):
        assert documents.grade(document, [text])["correct"] == 1.0
    for text in ("The answer is (A).", "The answer is 10%.", "Perhaps"):
        assert documents.grade(document, [text])["correct"] == 0.0


def test_programs_pass_or_fail_their_tests(tmp_path):
    row = {
        "prompt": "def double(x):\n", "canonical_solution": "    return 2 * x\n",
        "test": "def check(f):\n    assert f(3) == 6", "entry_point": "double",
    }  # fmt: skip
    write(tmp_path, "a.jsonl", [row])
    (document,) = documents.load(file="a.jsonl", form="humaneval", data_dir=str(tmp_path))["test"]
    assert documents.run_tests(document, [document["target"]]) == {"passed": 1.0}
    assert documents.run_tests(document, ["    return x\n"]) == {"passed": 0.0}
    assert documents.run_tests(document, ["    import os; os._exit(0)\n"]) == {"passed": 0.0}


def test_every_task_has_shots_and_data():
    names = [path.stem for path in harness.TASKS.glob("[a-z]*.yaml")]
    assert set(harness.GROUPS["nine"].split()) <= set(names)
    for name in names:
        text = (harness.TASKS / f"{name}.yaml").read_text()
        assert f"task: rho_{name}\n" in text
        assert "form: " in text
