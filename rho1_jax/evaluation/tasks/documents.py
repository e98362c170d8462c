"""The data sets of our tasks as documents of one form, and the grading of what is generated.

A document: `question`; `gold`, the answer; `target`, a solution that ends with it; and, where there
is a choice, `choices` and `label`, the index of the right one.
"""

import atexit
import functools
import json
import re
import string
from pathlib import Path
from typing import Any

from rho1_jax.errors import InputError
from rho1_jax.evaluation import answers, tools

Document = dict[str, Any]


def load(
    file: str, form: str, hub: str = "", data_dir: str = "", **_ignored: Any
) -> dict[str, Any]:
    """{"test": documents} of DATA_DIR/file, or of the hub's data set `hub` ("NAME:CONFIG").

    InputError for a file that is absent or has other fields than `form` says.
    """
    import datasets

    if not data_dir and not hub:
        raise InputError(f"{file} is on no hub in a form known here: give --data_dir.")
    source = f"{data_dir}/{file}" if data_dir else hub
    rows = _rows(Path(data_dir, file)) if data_dir else _hub_rows(hub)
    try:
        documents = [_FORMS[form](row) for row in rows]
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{source} has not the fields of {form}: {error!r}.") from error
    return {"test": datasets.Dataset.from_list(documents)}


def grade(document: Document, results: list[str]) -> dict[str, float]:
    """lm-eval's process_results: is the one generated text's answer right, read both ways?"""
    return {
        "correct": float(_right(document, answers.extract(results[0]))),
        "correct_strict": float(_right(document, answers.extract(results[0], strict=True))),
    }


def run_tests(document: Document, results: list[str]) -> dict[str, float]:
    """Does the program pass the document's `tests`, in the sandbox?"""
    program = document["head"] + results[0]
    return {"passed": float(_sandbox().passes(program, document["tests"]))}


@functools.cache
def _sandbox() -> tools.Sandbox:
    """One for all documents, for as long as this process lives."""
    sandbox = tools.Sandbox()
    atexit.register(sandbox.close)
    return sandbox


def _right(document: Document, answer: str | None) -> bool:
    """By its letter, or by the text of the option."""
    if answers.compare(document["gold"], answer).correct:
        return True
    if not document.get("choices") or not re.fullmatch(r"\(?[A-J]\)?", document["gold"]):
        return False
    return answers.compare(document["choices"][document["label"]], answer).correct


def _rows(path: Path) -> list[Document]:
    try:
        return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}.") from error


def _hub_rows(hub: str) -> list[Document]:
    import datasets

    name, _, config = hub.partition(":")
    splits = datasets.load_dataset(name, config or None)
    return list(splits["test" if "test" in splits else "validation"])


def _stated(question: str, gold: str, solution: str = "", **more: Any) -> Document:
    target = f"{solution} The answer is {gold}.".strip()
    return {"question": question.strip(), "gold": gold, "target": target} | more


def _chosen(question: str, choices: list[str], label: int, solution: str = "") -> Document:
    """A question whose answer is a letter."""
    listed = " ".join(f"({a}) {c}" for a, c in zip(string.ascii_uppercase, choices, strict=False))
    letter = string.ascii_uppercase[label]
    document = _stated(f"{question.strip()}\nOptions: {listed}", f"({letter})", solution)
    return document | {"choices": choices, "label": label}


def _ranked(question: str, choices: list[str], label: int) -> Document:
    """A question whose answers are compared by their likelihood."""
    document = _stated(question, choices[label], choices=choices, label=label)
    return document | {"target": choices[label]}


def _gsm8k(row: Document) -> Document:
    solution, _, gold = row["answer"].rpartition("####")
    solution = re.sub(r"<<.*?>>", "", solution).strip().replace("\n", " ")
    return _stated(row["question"], gold.strip(), solution)


def _math(row: Document) -> Document:
    gold = row.get("answer") or answers.gold_answer(row["solution"])
    return {"question": row["problem"], "gold": gold, "target": row["solution"]}


def _asdiv(row: Document) -> Document:
    return _stated(f"{row['body']} {row['question']}", row["answer"], row.get("formula", ""))


def _svamp(row: Document) -> Document:
    # Statements without a full stop occur.
    body = re.sub(r"(?<![.?!,;:])$", ".", row["Body"].strip())
    return _stated(f"{body} {row['Question']}", answers.gold_answer(row["Answer"]))


def _mawps(row: Document) -> Document:
    question = row["input"] if "input" in row else row["question"]
    return _stated(
        question, answers.gold_answer(row["target"] if "target" in row else row["result"])
    )


def _tabmwp(row: Document) -> Document:
    title = f"{row['table_title']}\n" if row["table_title"] else ""
    unit = f" (Unit: {row['unit']})" if row["unit"] else ""
    question = f"Read the table.\n{title}{row['table']}\n{row['question']}{unit}"
    if choices := row["choices"]:
        listed = " ".join(
            f"({a}) {c}" for a, c in zip(string.ascii_uppercase, choices, strict=False)
        )
        question += f"\nOptions: {listed}"
    return _stated(question, row["answer"], row["solution"].replace("\n\n", " "))


def _mathqa(row: Document) -> Document:
    # "a ) 1 , b ) 2", and now and then the same as a list in Python's spelling
    split = re.split(r"(?:^\W*|['\"]?\s*,\s*['\"]?)[a-e]\s*\)\s*", row["options"])
    choices = [choice.strip(" ']\"") for choice in split[1:]]
    return _chosen(row["problem"], choices, "abcde".index(row["correct"]), row["rationale"])


def _sat_math(row: Document) -> Document:
    choices = [c.strip() for c in re.split(r"(?:^|\s)[A-D][.)]\s*", row["options"])[1:]]
    return _chosen(row["question"], choices, "ABCD".index(row["Answer"]))


def _mmlu_stem(row: Document) -> Document:
    return _chosen(row["question"], row["choices"], int(row["answer"]))


def _mmlu(row: Document) -> Document:
    return _ranked(row["question"], row["choices"], "ABCD".index(row["answer"]))


def _agieval(row: Document) -> Document:
    choices = [re.sub(r"^\([A-E]\)\s*", "", option) for option in row["options"]]
    question = f"{row['passage'] or ''}\n{row['question']}"
    return _ranked(question, choices, "ABCDE".index(row["label"]))


def _instruction(row: Document) -> Document:
    """ "Please ...: QUESTION [options] Answer format: answer1/answer2"; the answer names one."""
    text, _, names = row["instruction"].partition("Answer format:")
    asked = re.split(r"(?:question|sentence): ", text, maxsplit=1)[1]
    question, *choices = re.split(r"\s*\b(?:Answer|Option)\d: ", asked)
    labels = names.strip().split("/")
    return _ranked(question, [c.strip() for c in choices] or labels, labels.index(row["answer"]))


def _bbh(row: Document) -> Document:
    return _stated(row["input"], row["target"])


def _humaneval(row: Document) -> Document:
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    head = row["prompt"]
    return {"question": head, "target": row["canonical_solution"], "head": head, "tests": tests}


def _mbpp(row: Document) -> Document:
    """The task and its tests as a docstring, as the data set's authors ask it."""
    tests = "\n".join(row["test_list"])
    question = f'"""\n{row["text"]}\n{tests}\n"""\n'
    tests = f"{row.get('test_setup_code', '')}\n{tests}"
    return {"question": question, "target": row["code"], "head": "", "tests": tests}


_FORMS = {
    "bbh": _bbh,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "gsm8k": _gsm8k,
    "math": _math,
    "svamp": _svamp,
    "asdiv": _asdiv,
    "mawps": _mawps,
    "tabmwp": _tabmwp,
    "mathqa": _mathqa,
    "mmlu_stem": _mmlu_stem,
    "sat_math": _sat_math,
    "mmlu": _mmlu,
    "agieval": _agieval,
    "instruction": _instruction,
}
