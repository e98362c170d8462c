"""A trained model as a Hugging Face folder, which transformers, vLLM and lm-eval open.

    python -m rho1_jax.models.formats.convert --checkpoint=RUN_OR_MODEL --out=DIR

DIR gets safetensors, config.json, generation_config.json, the tokenizer, and a model card that says
what a run's folder knows: base model, corpora, selection, tokens, evaluation. --dtype=bfloat16
takes half the room; float32, the default, keeps every bit.
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from rho1_jax import command_line, files, jsonfile
from rho1_jax.errors import InputError
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import huggingface, load
from rho1_jax.models.llama import Params, param_count
from rho1_jax.models.tokenizer import Tokenizer


def export(
    folder: Path,
    params: Params,
    config: Architecture,
    tok: Tokenizer,
    *,
    card: str,
    dtype: str = "float32",
) -> None:
    """Write the model into `folder`, which must be new or empty. float32 keeps every bit."""
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: give --out a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # Documents are separated by one token, so it ends one and begins the next.
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tok.separator_id)
    huggingface.save(folder, params, config, dtype=dtype, more=ends)
    # A list, as chat models have it: text is over where a turn is, too.
    jsonfile.write(folder / "generation_config.json", ends | {"eos_token_id": tok.end_ids})
    _save_tokenizer(folder, tok, config.max_length)
    files.write(folder / "README.md", card)


def model_card(source: str, config: Architecture, *, name: str, dtype: str) -> str:
    """The README.md of the model at `source`; a run's folder says how it came about."""
    run = load.locate(source)
    trained = _training(run) if (run / "checkpoints" / load.MODEL_FILE).exists() else []
    base = jsonfile.read(run / "config.json").get("model", {}).get("init") if trained else source
    hub_name = base if base and base.count("/") == 1 and not Path(base).exists() else None
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    header += [f"base_model: {hub_name}"] if hub_name else []
    facts = [("parameters", f"{param_count(config):,}"), ("stored as", dtype), *trained]
    if not trained:
        facts.insert(0, ("made from", source))
    table = ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts)]
    return "\n".join(
        [
            *header, "tags: [rho-1, selective-language-modeling]", "---", "", f"# {name}", "",
            "Trained and written by rho1_jax (Selective Language Modeling, arXiv 2404.07965)."
            if trained else "Converted by rho1_jax.",
            "", *table, *_evaluation(run if trained else None), "", "## Load", "", "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")', "```", "",
            "The tokenizer adds no special tokens: the model was trained on text without them. "
            f"Its context is {config.max_length:,} tokens.", "",
        ]
    )  # fmt: skip


def _save_tokenizer(folder: Path, tok: Tokenizer, max_length: int) -> None:
    """Its file, and what AutoTokenizer needs to split text as we do."""
    tok.save(folder, sealed=False)  # what others write there later is as good
    if (folder / "tokenizer.model").exists():
        _fast(folder / "tokenizer.model").save(str(folder / "tokenizer.json"))
    end = tok.vocabulary[tok.separator_id]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    jsonfile.write(folder / "tokenizer_config.json", settings)


def _fast(path: Path) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model with the same splits as a tokenizer.json.

    transformers' own reading of tokenizer.model drops a space at the beginning of a text.
    """
    # Here: generated for a newer protobuf than Apache Beam allows (data/on_beam.py).
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type != spec.BPE or normalizer.name not in ("", "identity"):
        raise InputError(f"{path} is no plain BPE model, so no tokenizer.json can be written.")
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    # The best piece is merged first, whichever two pieces it is made of.
    merges = [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in sorted(proto.pieces, key=lambda piece: -piece.score)
        for cut in range(1, len(piece.piece))
        if piece.type == piece.NORMAL and piece.piece[:cut] in ids and piece.piece[cut:] in ids
    ]
    fast = tokenizers.Tokenizer(
        models.BPE(
            ids, merges, unk_token=proto.pieces[spec.unk_id].piece, fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )  # fmt: skip
    prefix = [normalizers.Prepend("▁")] if normalizer.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = (proto.pieces[0].CONTROL, proto.pieces[0].UNKNOWN)
    fast.add_special_tokens([piece.piece for piece in proto.pieces if piece.type in special])
    return fast


def _training(run: Path) -> list[tuple[str, str]]:
    """What a run's config.json and metrics.csv say of the training."""
    c, rows = jsonfile.read(run / "config.json"), []
    if (run / "metrics.csv").exists():
        with (run / "metrics.csv").open(newline="") as f:
            rows = list(csv.DictReader(f))
    select, data = c["select"], c["data"]
    facts = [
        ("base model", c["model"]["init"] or f"none: {c['model']['preset']} from random weights"),
        ("corpus", _sources(data["corpus"])),
        *_reference(run, c),
        *_selection(run, select),
        ("sequence length", f"{data['seq_len']:,}"),
        ("learning rate", f"{c['train']['lr']:g}"),
    ]
    if rows:
        tokens = [0, *(int(row["tokens"]) for row in rows)]
        # A row stands for the steps since the row before it.
        selected = sum(
            float(row["selected_share"]) * (b - a)
            for row, a, b in zip(rows, tokens, tokens[1:], strict=False)
        )
        facts += [
            ("steps", rows[-1]["step"]),
            ("tokens seen", f"{tokens[-1]:,}"),
            ("tokens selected", f"{round(selected):,}"),
        ]
    return facts


def _reference(run: Path, c: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the reference is made of, if the run has one."""
    if not (run / "reference" / load.MODEL_FILE).exists():
        return []
    if c["reference"]["init"]:
        return [("reference", c["reference"]["init"])]
    return [("clean text of the reference", _sources(c["data"]["clean"]))]


def _selection(run: Path, select: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What entered the loss: as the evaluation says it, else as the config does."""
    evals = jsonfile.read(run / "eval.json") if (run / "eval.json").exists() else {}
    if said := evals.get("selection", {}).get("said"):
        return [("entered the loss", said)]
    if select["score"] == "all":
        return [("entered the loss", "every token")]
    return [
        ("score", f"{select['score']}, scope {select['scope']}"),
        ("ratio", f"{select['ratio']}"),
    ]


def _sources(domains: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({d['spec']}, weight {d['weight']:g})" for name, d in domains.items())


def _evaluation(run: Path | None) -> list[str]:
    """Held-out losses of each model that eval.json has."""
    if run is None or not (run / "eval.json").exists():
        return []
    result = jsonfile.read(run / "eval.json")
    lines = ["", "## Held-out text", "", "| model | text | nats per token | bits per byte |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    for model in ("initial", "reference", "policy"):
        for domain, r in result.get(model, {}).items():
            label = "this model" if model == "policy" else model
            lines.append(f"| {label} | {domain} | {r['loss']:.3f} | {r['bits_per_byte']:.3f} |")
    return lines


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    return command_line.run(_run, argv, __doc__)


def _run(argv: Sequence[str]) -> None:
    options = {"checkpoint": "", "out": Path, "dtype": ("float32", "bfloat16")}
    needs = {"checkpoint": f"give {load.ACCEPTED}", "out": "name a new folder"}
    args = command_line.parse(argv, options, required=needs)
    params, config, tok = load.load(args.checkpoint)
    card = model_card(args.checkpoint, config, name=args.out.name, dtype=args.dtype)
    export(args.out, params, config, tok, card=card, dtype=args.dtype)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
