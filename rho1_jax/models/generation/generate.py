"""Text from a decoder: ragged prompts in one batch, a cache of keys and values, greedy or sampled.

python -m rho1_jax.models.generation.generate --checkpoint=MODEL --prompt="Once upon a time"

--max_new_tokens=128; --temperature=0 is greedy, above it is sampled with --top_p=1 and --seed=0;
--stop=TEXT, as often as you like, ends it before that text.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rho1_jax import command_line
from rho1_jax.errors import InputError
from rho1_jax.models.formats import load
from rho1_jax.models.generation import decoding, prefix
from rho1_jax.models.generation.decoding import GREEDY, Sampling
from rho1_jax.models.llama import LlamaConfig, Params
from rho1_jax.models.tokenizer import Tokenizer

OPTIONS: dict[str, Any] = {
    "checkpoint": "", "prompt": "", "max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0,
    "seed": 0, "stop": [],
}  # fmt: skip
REQUIRED = {"checkpoint": f"give {load.ACCEPTED}"}


def generate(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    finished: Callable[[list[int]], bool] = lambda _: False,
    sampling: Sampling = GREEDY,
    unstacked: Params | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, all prompts in one batch.

    A row ends before a token of `stop_ids`, at `max_new_tokens`, or when `finished` says so of its
    new tokens, which it is asked every 8 tokens. All stop when all have ended.
    unstacked: decoding.unstack of the params, for callers who have more than one batch.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for rows in stream(  # noqa: B007
        params,
        config,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        finished=finished,
        sampling=sampling,
        unstacked=unstacked,
    ):
        pass
    return rows


def stream(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    finished: Callable[[list[int]], bool] = lambda _: False,
    sampling: Sampling = GREEDY,
    unstacked: Params | None = None,
) -> Iterator[list[list[int]]]:
    """`generate`, but after every few tokens yields the new tokens so far of all rows."""
    if not all(prompts):
        raise InputError("A prompt has no tokens: begin it with the token that ends documents.")
    if max_new_tokens < 1 or not prompts:
        return
    n_shared = prefix.shared(prompts, min(map(len, prompts)) - 1, config)
    before = prefix.read(params, prompts[0][:n_shared], config)
    tokens, lengths = decoding.padded([prompt[n_shared:] for prompt in prompts], config)
    stop = jnp.array(sorted(stop_ids), jnp.int32)
    n_chunks = -(-max_new_tokens // decoding.CHUNK)
    key, sampling = jax.random.key(sampling.seed), dataclasses.replace(sampling, seed=0)
    n_prompt = n_shared + tokens.shape[1]
    # Many prompts share few sizes of the cache: tokens are decoded by few programs.
    n_slots = max(256, decoding.rounded(n_prompt + n_chunks * decoding.CHUNK))
    state, emitted = decoding.prefill(
        params, before, tokens, lengths, stop, key,
        config=config, sampling=sampling, n_slots=n_slots,
    )  # fmt: skip
    unstacked = unstacked or decoding.unstack(params, config)
    rows: list[list[int]] = [[] for _ in prompts]
    done = np.arange(len(tokens)) >= len(prompts)
    written = 1
    while True:
        done |= np.asarray(state.done)
        for i, (row, new) in enumerate(zip(rows, np.asarray(emitted), strict=False)):
            row += new[new != decoding.NOTHING].tolist()
            done[i] = done[i] or finished(row)
        yield [list(row) for row in rows]
        more = min(decoding.CHUNK, max_new_tokens - written)
        if done.all() or not more:
            return
        state, emitted = decoding.decode(
            unstacked,
            state._replace(done=jnp.asarray(done)),
            stop,
            more,
            n_prompt,
            config=config,
            sampling=sampling,
        )
        written += more


def complete(
    params: Params,
    config: LlamaConfig,
    tok: Tokenizer,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Collection[str] = (),
    sampling: Sampling = GREEDY,
) -> list[str]:
    """What the model writes after each text, up to a stop string or the end of the document."""
    rows = generate(
        params,
        config,
        _encoded(tok, texts),
        max_new_tokens=max_new_tokens,
        stop_ids=tok.end_ids,
        finished=lambda row: cut(tok.decode(row), stop)[1],
        sampling=sampling,
    )
    return [cut(tok.decode(row), stop)[0] for row in rows]


def stream_text(
    params: Params,
    config: LlamaConfig,
    tok: Tokenizer,
    text: str,
    *,
    max_new_tokens: int,
    stop: Collection[str] = (),
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """`complete` of one text, piece by piece as it is written."""
    held_back = max(map(len, stop), default=1) - 1  # perhaps the beginning of a stop string
    whole = said = ""
    for (row,) in stream(
        params,
        config,
        _encoded(tok, [text]),
        max_new_tokens=max_new_tokens,
        stop_ids=tok.end_ids,
        finished=lambda row: cut(tok.decode(row), stop)[1],
        sampling=sampling,
    ):
        whole, _ = cut(tok.decode(row), stop)
        settled = whole.rstrip("\ufffd")  # a character may be cut in the middle
        settled = settled[: max(len(said), len(settled) - held_back)]
        yield settled[len(said) :]
        said = settled
    yield whole[len(said) :]


def _encoded(tok: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text; an empty text begins like a document, after the end of another."""
    return [encoded.ids.tolist() or [tok.separator_id] for encoded in tok.encode(texts)]


def cut(text: str, stop: Collection[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(found, default=len(text))], bool(found)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    return command_line.run(_run, argv, __doc__)


def _run(argv: Sequence[str]) -> None:
    args = command_line.parse(argv, OPTIONS, required=REQUIRED)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    params, architecture, tok = load.load(args.checkpoint)
    pieces = stream_text(
        params,
        architecture.computed(),
        tok,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
        sampling=sampling,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
