"""Bring your own domain: code, medicine, law, or whatever you have clean and noisy text of.

    python -m rho1_jax.main --config=configs/domain.py:NAME --config.data.root=DIR
        --config.model.init=MODEL

    DIR/noisy/*    what you would pretrain on anyway: a crawl, repositories, case files, ...
    DIR/clean/*    a tenth as much or less of what you want the model to know: textbooks,
                   reviewed code, guidelines, statutes, questions with their answers
    MODEL          the model to go on from: a run, a Hugging Face folder or name, a GGUF file

Files are .jsonl, .json or .ndjson (plain, .gz or .zst), .parquet or .txt; records have a `text`, or
a `question` and an `answer`. NAME is your domain's name, in the run's folder runs/NAME.

Selection is worth its cost where much of the noisy text is of no use to the domain, and the model
has already read text like it. To see whether yours is such a domain before you pay for it, compare
with the controls first, on a sample:

    python -m experiments.math_pretraining --scale=small --data=DIR2

with DIR2/corpus and DIR2/clean as DIR/noisy and DIR/clean. Then look at report.html of the run: the
marked passages show which tokens your clean text selects. Too few that matter: more clean text, or
a higher select.ratio; the warning "the policy knows ... better than its reference": more
reference.epochs or better clean text.

Hardware: one accelerator for a model of 1B parameters. The paper's values where it states them.
"""

from ml_collections import ConfigDict

from rho1_jax.config import default_config, source


def get_config(name: str = "domain") -> ConfigDict:
    c = default_config()
    c.name = name
    c.model.init = "HuggingFaceTB/SmolLM2-135M"
    c.model.remat = "full"
    c.tokenizer.source = "init"
    c.data.root = "data"
    c.data.seq_len = 1024
    text = "text | {question}\n{answer}"
    c.data.corpus.noisy = source("files:noisy/*", text=text)
    c.data.clean.clean = source("files:clean/*", text=text)
    c.reference.update(steps=0, epochs=3.0, batch_size=64, lr=5e-5, warmup_steps=50)
    c.train.update(steps=0, epochs=1.0, batch_size=64, lr=8e-5, warmup_steps=50)
    c.select.ratio = 0.6
    c.score.batch_size = 8
    c.eval.update(every=200, rows=64)
    return c.lock()
