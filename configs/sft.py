"""Supervised fine-tuning of a trained model: loss on the answers only, packed rows, 3 epochs.

    python -m rho1_jax.main --config=configs/sft.py --config.model.init=RUN --config.data.root=DIR

RUN is the folder of a run (or a GGUF file, a Hugging Face folder, a hub name); the records of the
files in DIR/sft (.jsonl, .json or .ndjson, plain, .gz or .zst; .parquet) have one of these forms:

    configs/sft.py          {"question", "answer"}
    configs/sft.py:tora     {"prompt", "output"}, programs and their output inside: none on output
    configs/sft.py:chat     {"messages": [{"role", "content"}, ...]}: on what the assistant says

configs/sft.py:qa,slm (or tora,slm and chat,slm) selects among the tokens of the answers (token
cleaning), by a reference that is fine-tuned on the files in DIR/sft_clean. The paper (section 3.2)
fine-tunes on ToRA data for 3 epochs; its batch and learning rate are not stated, those here are our
choice.

Hardware: one accelerator for a 1B model. Results of small models on CPU: docs/results.
"""

from ml_collections import ConfigDict

from rho1_jax.config import default_config, source
from rho1_jax.errors import require_known

FORMS = {
    "qa": ("Question: {question}\nAnswer:", " {answer}"),
    "tora": ("Question: {prompt}\nAnswer:\n", "{output}"),
    "chat": ("", "messages"),
}


def get_config(variant: str = "qa") -> ConfigDict:
    form, _, selection = variant.partition(",")
    require_known("configs/sft.py variant", form, FORMS)
    require_known("configs/sft.py variant", selection or "slm", ("slm",))
    prompt, text = FORMS[form]
    c = default_config()
    c.name = f"sft-{variant.replace(',', '-')}"
    c.model.init = "runs/math"
    c.tokenizer.source = "init"
    c.data.root = "data"
    c.data.seq_len = 512
    c.data.corpus.sft = source("files:sft/*", text=text, prompt=prompt)
    c.select.score, c.select.ratio = "all", 1.0
    if selection:
        c.data.clean.sft_clean = source("files:sft_clean/*", text=text, prompt=prompt)
        c.select.score, c.select.ratio = "excess", 0.6
    for section in (c.reference, c.train):
        section.update(steps=0, epochs=3.0, batch_size=32, lr=2e-5, warmup_steps=20)
    return c.lock()
