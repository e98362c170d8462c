"""Which characters and tokens of a fine-tuning text carry loss."""

import json
from collections import Counter

import numpy as np
import pytest

from rho1_jax.data import builder, corpora, dialogs, loader
from rho1_jax.data.corpora import Source
from rho1_jax.errors import InputError
from tests.data.stand_in import Words

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]


def learnt(text, spans):
    return [text[start:stop] for start, stop in spans]


def test_a_response_carries_loss_and_its_prompt_none():
    text, spans = dialogs.answered("Q: 1+1?\nA:", " 2")
    assert text == "Q: 1+1?\nA: 2"
    assert learnt(text, spans) == [" 2"]


def test_the_output_of_tools_carries_none():
    response = "```python\nprint(2)\n```\n```output\n2\n```\nSo 2.\n```output\n3\n```"
    text, spans = dialogs.answered("Q", response)
    assert learnt(text, spans) == ["```python\nprint(2)\n```\n", "So 2.\n"]


def test_of_a_conversation_what_the_assistant_says_carries_loss():
    text, spans = dialogs.chat(json.dumps(MESSAGES))
    assert text == ("Be brief.\n\nQuestion: 2+2?\n\nAnswer: 4\n\nQuestion: 3+3?\n\nAnswer: 6")
    assert learnt(text, spans) == ["4", "6"]


NO_ANSWERS = (
    "[]", "3", "[{}]", "not json", '[{"role": "user", "content": "x"}]',
    '[{"role": "assistant", "content": null}]',
)  # fmt: skip


@pytest.mark.parametrize("bad", NO_ANSWERS)
def test_no_conversation(bad):
    assert dialogs.chat(bad) is None


def test_tokens_that_reach_into_a_span_and_the_end():
    starts = np.array([0, 2, 5, 7])
    assert dialogs.trained_tokens(((6, 9),), starts, 9).tolist() == [False, False, True, True, True]
    assert dialogs.trained_tokens(((2, 5),), starts, 9).tolist() == [0, 1, 0, 0, 0]
    assert dialogs.trained_tokens((), starts, 9).tolist() == [0] * 5


def write(folder, rows):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def batches_of(tmp_path, source, seq_len):
    tok = Words()
    manifest = builder.prepare(
        "sft", source, root=tmp_path, tokenizer=tok, seq_len=seq_len, out=tmp_path / "out"
    )
    rows = loader.open_rows(tmp_path / "out", "sft", "train")
    return manifest, next(loader.ordered_batches(rows, batch_size=len(rows)))


def test_packed_rows_train_on_answers_only(tmp_path):
    """The same from the loader of training and of evaluation; bytes are those of the answers."""
    write(tmp_path, [{"q": "a b", "a": "c d e", "split": "train"}] * 3)
    source = Source("files:a.jsonl", text=" {a}", prompt="{q} >", split_field="split")
    manifest, batch = batches_of(tmp_path, source, seq_len=20)
    assert batch["tokens"].shape == (1, 21)
    # Stream: a b > c d e SEP, three times; targets are everything but the first token.
    one = [False, False, False, True, True, True, True]
    assert batch["valid"][0].tolist() == (one * 3)[1:]
    assert batch["bytes"].tolist() == [3 * len(" c d e")]
    assert manifest["binding"]["prompt"] == "{q} >"
    rows = {"sft": loader.open_rows(tmp_path / "out", "sft", "train")}
    trained = next(
        loader.train_batches(rows, {"sft": 1.0}, batch_size=1, seed=0, start_step=0, num_steps=1)
    )
    np.testing.assert_array_equal(trained["valid"], batch["valid"])


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    one = {"q": "a " * 51, "a": "x y", "split": "train"}
    write(tmp_path, [one] * 3)
    source = Source("files:a.jsonl", text=" {a}", prompt="{q}>", split_field="split")
    manifest, batch = batches_of(tmp_path, source, seq_len=6)
    n_rows, left_out = manifest["splits"]["train"]["rows"], manifest["counts"]["rows without loss"]
    assert n_rows == len(batch["valid"]) == 5  # two answers lie across borders
    assert n_rows + left_out == -(-(manifest["splits"]["train"]["tokens"] - 1) // 6)
    assert batch["valid"].any(axis=1).all()
    assert batch["valid"].sum() == 3 * 3  # x, y and the end
    assert batch["bytes"].sum() == 3 * len(" x y")
    assert f"{left_out} rows without loss" in capsys.readouterr().out


def test_a_split_without_any_answer_is_refused_before_training(tmp_path):
    ends_in_tool = "```output\n4\n```\n"
    good, bad = ({"q": "q", "a": a, "split": s} for a, s in (("x", "train"), (ends_in_tool, "val")))
    write(tmp_path, [good, bad])
    source = Source("files:a.jsonl", text="{a}", prompt="{q} ", split_field="split")
    with pytest.raises(InputError, match="No token of the split 'val' of 'sft' carries loss"):
        batches_of(tmp_path, source, seq_len=6)


def test_conversations_from_a_file(tmp_path):
    write(tmp_path, [{"messages": MESSAGES}, {"messages": "no"}, {"messages": [{"role": "user"}]}])
    counts: Counter[str] = Counter()
    source = Source("files:a.jsonl", text="messages")
    documents = list(corpora.split_documents(source, root=tmp_path, counts=counts))
    assert [learnt(d.text, d.trained) for _, d in documents] == [["4", "6"]]
    assert counts["malformed"] == 2


def test_half_a_surrogate_pair_in_a_conversation_is_replaced(tmp_path):
    turns = [{"role": "user", "content": "\ud83d?"}, {"role": "assistant", "content": "4\udc00!"}]
    write(tmp_path, [{"messages": turns}])
    counts: Counter[str] = Counter()
    source = Source("files:a.jsonl", text="messages")
    ((_, document),) = corpora.split_documents(source, root=tmp_path, counts=counts)
    assert learnt(document.text, document.trained) == ["4\ufffd!"]
    assert counts["invalid"] == 1


def test_a_text_without_prompt_carries_loss_everywhere(tmp_path):
    write(tmp_path, [{"text": "a b c", "split": "train"}])
    _, batch = batches_of(tmp_path, Source("files:a.jsonl", split_field="split"), seq_len=3)
    assert batch["valid"].all()
    assert "trained" not in batch
