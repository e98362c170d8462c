"""A new model of 300 tokens, asked as benchmarks ask one."""

import jax
import pytest

from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.models import llama, tokenizer
from rho1_jax.models.llama import LlamaConfig


@pytest.fixture(scope="module")
def scorer():
    tok = tokenizer.train(["Question: what is it? Answer: true false 1 2 3"] * 5, 300)
    config = LlamaConfig(
        vocab_size=tok.vocab_size, width=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8,
        ffn_width=32,
    )  # fmt: skip
    params = llama.init(config, jax.random.key(0))
    return Scorer(params, config, tok, batch_size=4, max_length=1024)
