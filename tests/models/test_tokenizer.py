import io
import itertools
import json

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from rho1_jax.errors import InputError
from rho1_jax.models import tokenizer
from rho1_jax.models import words as rules

TEXTS = [
    "Hello 123 world's end.\n\n\tTabs  and   spaces \r\n",
    "naïve café, 日本語 テスト, ∫₀^∞ e^{-x²} dx = √π/2, 𝔸 ⊂ ℝ, 👩‍👩‍👧",
    r"\begin{align} \frac{a_{1}}{b^2} &\le 3.14159 \\ \end{align} $x\in\mathbb{R}^{n}$",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # 0x1F + 1_000\n",
    "<|endoftext|> is text here, and so is </s>",
    " leading and trailing ",
    "",
]
CORPUS = [f"{text} Lemma {i}: the sum of {i * i} terms." for i in range(60) for text in TEXTS[:4]]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train(iter(CORPUS), 400)


@pytest.fixture(scope="module")
def pieces_model() -> bytes:
    """A SentencePiece model made by SentencePiece."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
        model_writer=out,
        vocab_size=390,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def pieces(pieces_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "m.model"
    path.write_bytes(pieces_model)
    return tokenizer.load(path)


@pytest.fixture(params=["bpe", "pieces"])
def either(request):
    return request.getfixturevalue(request.param)


def assert_text_comes_back(tok, texts):
    for text, (ids, starts) in zip(texts, tok.encode(texts), strict=True):
        assert ids.dtype == starts.dtype == np.int32
        assert tok.decode(ids) == text
        assert "".join(tok.pieces(ids)) == text
        assert sorted(starts) == starts.tolist()


def starts_by_counting_bytes(tok, ids, text):
    """A byte-level token is spelt with one letter per byte."""
    character_of_byte = [i for i, c in enumerate(text) for _ in c.encode()]
    lengths = [len(tok.vocabulary[i]) for i in ids]
    first_bytes = np.cumsum([0, *lengths])[:-1]
    return [character_of_byte[b] for b in first_bytes]


def test_text_comes_back(either):
    assert_text_comes_back(either, TEXTS)


def test_byte_level_offsets(bpe):
    for text, (ids, starts) in zip(TEXTS, bpe.encode(TEXTS), strict=True):
        assert starts.tolist() == starts_by_counting_bytes(bpe, ids, text)


def test_sentencepiece_offsets(pieces):
    for text, (ids, starts) in zip(TEXTS, pieces.encode(TEXTS), strict=True):
        own = [text[a:b] for a, b in itertools.pairwise([*starts.tolist(), len(text)])]
        # The first piece spells a space that is not in the text.
        assert pieces.pieces(ids) == own


def test_offsets_count_characters_and_repeat_within_one(bpe):
    rare = "\U000e0041"  # four bytes that the corpus lacks
    ids, starts = bpe.encode([f"a{rare}b"])[0]
    assert starts.tolist() == [0, 1, 1, 1, 1, 2]
    assert bpe.pieces(ids) == ["a", "", "", "", rare, "b"]
    assert bpe.pieces(ids[:3]) == ["a", "", "\ufffd"]  # cut within the character


def test_training_is_deterministic_and_splits_digits(bpe):
    again = tokenizer.train(iter(CORPUS), 400)
    assert again.fingerprint == bpe.fingerprint
    assert again.vocab_size == 400
    assert tokenizer.train(CORPUS[:40], 380).fingerprint != bpe.fingerprint
    assert bpe.pieces(bpe.encode(["2024"])[0].ids) == list("2024")
    assert not [t for t in bpe.vocabulary if len(t) > 1 and set(t) & set("0123456789")]


def test_separator_is_a_token_that_no_text_contains(bpe):
    assert bpe.vocabulary[bpe.separator_id] == "<|endoftext|>"
    ids = bpe.encode(["a<|endoftext|>b"])[0].ids
    assert bpe.separator_id not in ids
    assert bpe.decode([bpe.separator_id]) == "<|endoftext|>"


def test_sentencepiece_ends_documents_with_its_eos(pieces):
    assert pieces.vocabulary[pieces.separator_id] == "</s>"


def test_saved_and_loaded_is_the_same(either, tmp_path):
    either.save(tmp_path)
    for source in (tmp_path, next(tmp_path.iterdir())):
        again = tokenizer.load(source)
        assert again.fingerprint == either.fingerprint
        assert again.separator_id == either.separator_id
        assert again.encode(TEXTS[:1])[0].ids.tolist() == either.encode(TEXTS[:1])[0].ids.tolist()


def test_rules_of_a_tokenizer_json_that_add_or_cut_are_switched_off(bpe, tmp_path):
    bpe.save(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    (tmp_path / "changed").mkdir()
    inner.save(str(tmp_path / "changed" / "tokenizer.json"))
    changed = tokenizer.load(tmp_path / "changed")
    for ours, expected in zip(changed.encode(TEXTS), bpe.encode(TEXTS), strict=True):
        np.testing.assert_array_equal(ours.ids, expected.ids)
        np.testing.assert_array_equal(ours.starts, expected.starts)


def write_gguf(path, kind, pre, tokens, types, **arrays):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if "merges" in arrays:
        writer.add_token_merges(arrays["merges"])
    if "scores" in arrays:
        writer.add_token_scores(arrays["scores"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_bpe(path, tok, pre):
    model = json.loads(tok._backend.serialized())["model"]
    types = [3 if t == "<|endoftext|>" else 1 for t in tok.vocabulary]
    merges = [" ".join(m) for m in model["merges"]]
    return write_gguf(path, "gpt2", pre, tok.vocabulary, types, merges=merges)


def test_byte_level_bpe_in_gguf(bpe, tmp_path):
    again = tokenizer.load(write_bpe(tmp_path / "m.gguf", bpe, "smollm"))
    assert again.vocabulary == bpe.vocabulary
    for ours, expected in zip(again.encode(TEXTS), bpe.encode(TEXTS), strict=True):
        np.testing.assert_array_equal(ours.ids, expected.ids)
        np.testing.assert_array_equal(ours.starts, expected.starts)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["x", " 12345", "\n\n", " (", "y"]),
        ("smollm", ["x", " ", "1", "2", "3", "4", "5", "\n\n", " (", "y"]),
        ("llama-bpe", ["x", " ", "123", "45", "\n\n", " (", "y"]),
    ],
)
def test_each_pre_tokenizer_splits_words_its_own_way(pre, words):
    split = rules.BY_NAME[pre]()
    to_text = tokenizers.decoders.ByteLevel()
    found = [to_text.decode([word]) for word, _ in split.pre_tokenize_str("x 12345\n\n (y")]
    assert found == words


def test_sentencepiece_in_gguf(pieces, pieces_model, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(pieces_model)
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        "default",
        [p.piece for p in proto.pieces],
        [p.type for p in proto.pieces],
        scores=[p.score for p in proto.pieces],
    )
    again = tokenizer.load(path)
    tokenizer.require_same(pieces, again)
    assert again.separator_id == pieces.separator_id
    texts = [*TEXTS, "one<sep>two"]
    for ours, expected in zip(again.encode(texts), pieces.encode(texts), strict=True):
        np.testing.assert_array_equal(ours.ids, expected.ids)
        np.testing.assert_array_equal(ours.starts, expected.starts)


def test_mismatched_vocabularies_are_refused(bpe, pieces):
    tokenizer.require_same(bpe, tokenizer.train(CORPUS, 400))
    with pytest.raises(InputError, match=r"trained here.*m\.model.*400 and 390 tokens"):
        tokenizer.require_same(bpe, pieces)
    with pytest.raises(InputError, match=r"differ: id \d+ is"):
        tokenizer.require_same(bpe, tokenizer.train([text[::-1] for text in CORPUS], 400))


@pytest.mark.parametrize("name", ["tokenizer.json", "m.model", "m.gguf"])
def test_absent_and_damaged_files_are_refused(name, tmp_path):
    with pytest.raises(InputError, match="There is no tokenizer file"):
        tokenizer.load(tmp_path / name)
    (tmp_path / name).write_bytes(b"this is none of the three")
    with pytest.raises(InputError, match=f"{name} is not a"):
        tokenizer.load(tmp_path / name)


def test_unknown_kinds_are_refused_by_name(bpe, tmp_path):
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        tokenizer.load(tmp_path)
    (tmp_path / "words.txt").write_text("a b c")
    with pytest.raises(InputError, match=r"words\.txt is no tokenizer"):
        tokenizer.load(tmp_path / "words.txt")
    with pytest.raises(InputError, match="'mystery-bpe'"):
        tokenizer.load(write_bpe(tmp_path / "a.gguf", bpe, "mystery-bpe"))
    with pytest.raises(InputError, match="kind 'wordpiece'"):
        tokenizer.load(write_gguf(tmp_path / "b.gguf", "wordpiece", "x", ["a"], [1]))
    abc = write_gguf(
        tmp_path / "c.gguf", "gpt2", "smollm", ["a", "b", "ab"], [1, 1, 1], merges=["a b"]
    )
    with pytest.raises(InputError, match="no token that ends a document"):
        tokenizer.load(abc)
    with pytest.raises(InputError, match="vocab_size=256 is too small"):
        tokenizer.train(CORPUS, 256)


@pytest.mark.real_data
def test_smollm2_round_trip(smollm2_gguf):
    tok = tokenizer.load(smollm2_gguf)
    assert (tok.vocab_size, tok.separator_id) == (49_152, 0)
    assert_text_comes_back(tok, TEXTS)
    for text, (ids, starts) in zip(TEXTS, tok.encode(TEXTS), strict=True):
        assert starts.tolist() == starts_by_counting_bytes(tok, ids, text)
    assert tok.pieces(tok.encode(["10 apples"])[0].ids) == ["1", "0", " apples"]


@pytest.mark.real_data
@pytest.mark.slow
def test_smollm2_agrees_with_transformers(smollm2_gguf):
    """On text without digits: transformers ignores the "smollm" rule that sets them apart."""
    transformers = pytest.importorskip("transformers", reason="its tokenizer is the reference")
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    texts = ["".join(c for c in text if not c.isnumeric()) for text in TEXTS if "<|" not in text]
    ours = tokenizer.load(smollm2_gguf).encode(texts)
    for text, (ids, _) in zip(texts, ours, strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()


def test_a_text_is_over_where_a_chat_model_ends_its_turn():
    tok = tokenizer.train(["one two three"] * 5, 300)
    assert tok.end_ids == [tok.separator_id]
    chat = tokenizer.train(["one two three"] * 5, 300)
    chat.__dict__["vocabulary"] = [*chat.vocabulary, None, "<|im_end|>"]
    assert chat.end_ids == [chat.separator_id, chat.vocab_size - 1]


@pytest.mark.parametrize("word", ["a", "é", "=", " ", "\n", "7", "AC"])
def test_words_without_end_teach_nothing(word):
    texts = ["one two three", "four == five  six 123"] * 20
    plain = tokenizer.train(texts, 290)
    endless = tokenizer.train([*texts, word * (rules.LONGEST + 1), word * 10_000], 290)
    assert endless.fingerprint == plain.fingerprint
    assert endless.decode(endless.encode([word * 300])[0].ids) == word * 300


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_a_saved_file_that_changed_is_refused(bpe, tmp_path, at):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = path.read_bytes()
    flipped = bytearray(raw)
    flipped[at] ^= 1
    for damaged in (bytes(flipped), raw[:-1], b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="tokenizer.json is damaged, .* run the stage"):
            tokenizer.load(tmp_path)
    path.unlink()
    bpe.save(tmp_path)
    assert tokenizer.load(tmp_path).fingerprint == bpe.fingerprint
    (tmp_path / ".tokenizer.json.sha256").unlink()
    path.write_bytes(raw + b"\n")  # not ours: nothing is known of it
    assert tokenizer.load(tmp_path).fingerprint == bpe.fingerprint
