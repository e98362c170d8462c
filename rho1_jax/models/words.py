"""The rules by which text is split into words, inside of which byte-level BPE makes its tokens."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

LONGEST = 256  # characters of a word that a tokenizer is trained on


def byte_level(bpe: models.BPE, split: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """A tokenizer of words that `split` finds, spelt in bytes."""
    inner = tokenizers.Tokenizer(bpe)
    inner.pre_tokenizer = split
    inner.decoder = decoders.ByteLevel()
    return inner


def words() -> pre_tokenizers.PreTokenizer:
    """GPT-2's rule."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def digits_apart() -> pre_tokenizers.PreTokenizer:
    """SmolLM2's: each digit alone, then GPT-2's."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words()])


def endless_removed() -> pre_tokenizers.PreTokenizer:
    """Drops what `words` would make one word of more than LONGEST characters."""
    kinds = (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")
    endless = "|".join(f" ?{kind}{{{LONGEST + 1},}}" for kind in kinds)
    return pre_tokenizers.Split(tokenizers.Regex(endless), "removed")


def llama3() -> pre_tokenizers.PreTokenizer:
    """Words with the sign before them, digits in threes, line ends kept with what they follow."""
    alternatives = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
    split = pre_tokenizers.Split(tokenizers.Regex("|".join(alternatives)), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


BY_NAME = {"gpt-2": words, "smollm": digits_apart, "llama-bpe": llama3}
