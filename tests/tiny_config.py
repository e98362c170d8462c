"""A whole run in seconds: two small domains of text files under data.root, a two-layer model."""

import json
import random
from pathlib import Path

from rho1_jax.config import default_config, source

WORDS = ("one", "two", "three", "four", "five", "plus", "minus", "times", "equals", "so", "thus")


def get_config():
    c = default_config()
    c.name = "tiny"
    c.tokenizer.vocab_size = 300
    c.data.seq_len = 32
    c.data.corpus.noisy = source("files:noisy.jsonl", split="split")
    c.data.clean.clean = source("files:clean.jsonl", split="split")
    c.reference.update(steps=6, batch_size=8, warmup_steps=2)
    c.train.update(steps=8, batch_size=8, warmup_steps=2)
    c.score.batch_size = 8
    c.eval.update(every=4, rows=8)
    c.checkpoint.every = 2
    return c.lock()


def write_texts(folder: Path, n_documents: int = 60) -> Path:
    """noisy.jsonl and clean.jsonl in `folder`; the noisy one has numbers in the place of words."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("noisy", "clean"):
        rng = random.Random(name)
        with (folder / f"{name}.jsonl").open("w") as f:
            for i in range(n_documents):
                words = [rng.choice(WORDS) for _ in range(120)]
                if name == "noisy":
                    words[::3] = [str(rng.randrange(10**6)) for _ in words[::3]]
                split = "val" if i % 10 == 0 else "train"
                f.write(json.dumps({"text": " ".join(words), "split": split}) + "\n")
    return folder
