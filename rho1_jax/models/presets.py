"""Named shapes: the paper's two models, and two that fit a small machine."""

import dataclasses

from rho1_jax.errors import require_known
from rho1_jax.models.llama import LlamaConfig

PRESETS = {
    # Trains in minutes on two CPU cores.
    "tiny": LlamaConfig(
        vocab_size=4096,
        width=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        ffn_width=384,
    ),
    # SmolLM2 (arXiv 2502.02737).
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152,
        width=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        ffn_width=1536,
        rope_theta=100_000.0,
    ),
    # TinyLlama (arXiv 2401.02385): the paper's 1B model starts from it.
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32_000,
        width=2048,
        n_layers=22,
        n_heads=32,
        n_kv_heads=4,
        head_dim=64,
        ffn_width=5632,
        tied_head=False,
    ),
    # Mistral 7B (arXiv 2310.06825): the paper's 7B model starts from it.
    "mistral-7b": LlamaConfig(
        vocab_size=32_000,
        width=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        ffn_width=14_336,
        tied_head=False,
        window=4096,
    ),
}


def get(name: str, **overrides) -> LlamaConfig:
    """The preset with some fields replaced; InputError for an unknown preset or field."""
    require_known("model.preset", name, PRESETS)
    fields = [field.name for field in dataclasses.fields(LlamaConfig)]
    for field in overrides:
        require_known("model field", field, fields)
    return dataclasses.replace(PRESETS[name], **overrides)
