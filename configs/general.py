"""Continual pretraining on general text (paper, section 3.3): TinyLlama on web, code and
mathematics.

    python -m rho1_jax.main --config=configs/general.py

The paper's values: 80B tokens of SlimPajama, StarCoderData and OpenWebMath in the ratio 6:3:1, lr
1e-4, 1M-token batches of 2,048, 60% of the tokens, a reference trained for 3 epochs on 1.9B tokens
of instruction data. Set model.init to the base model's weights and the sources to your copies.
What the paper does not state (optimizer, warmup, decay) is our choice.

Hardware: TPU or GPU slice. Result: not run here.
"""

from ml_collections import ConfigDict

from rho1_jax.config import default_config, paper_batches, source


def get_config() -> ConfigDict:
    c = default_config()
    c.name = "general"
    c.model.preset = "tinyllama-1.1b"
    c.model.init = "models/tinyllama-1.1b.gguf"
    c.model.dtype = c.model.ref_dtype = "bfloat16"
    c.model.remat = "full"
    c.tokenizer.source = "init"
    c.data.seq_len = 2048
    c.data.separate_documents = False  # the paper fills plain contexts, as its base model did
    c.data.root = "data"
    c.data.corpus.web = source("files:slimpajama/*.jsonl.zst", weight=6.0)
    c.data.corpus.code = source("files:starcoder/*.parquet", text="content", weight=3.0)
    c.data.corpus.math = source("files:openwebmath/*.parquet", weight=1.0)
    c.data.clean.instructions = source("files:instructions/*.jsonl")
    paper_batches(c.reference, tokens=0, seq_len=2048, lr=5e-5)
    paper_batches(c.train, tokens=80_000_000_000, seq_len=2048, lr=1e-4)
    c.select.ratio = 0.6
    c.loss_chunk_tokens = 65_536
    c.score.batch_size = 128
    c.eval.every = c.checkpoint.every = 1000
    c.log_every = 10
    return c.lock()
