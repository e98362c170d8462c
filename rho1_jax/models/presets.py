"""Named shapes: the paper's two models, and others in use."""

import dataclasses
from dataclasses import replace

from rho1_jax.errors import require_known
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.rotary import RopeScaling

_LLAMA3 = Architecture(
    vocab_size=128_256,
    width=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    ffn_width=14_336,
    max_length=131_072,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 8192),
    tied_head=False,
)
_QWEN3 = Architecture(
    vocab_size=151_936,
    width=1024,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    head_dim=128,
    ffn_width=3072,
    max_length=40_960,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qk_norm=True,
)
_SMOLLM2 = Architecture(
    vocab_size=49_152,
    width=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    ffn_width=1536,
    max_length=8192,
    rope_theta=100_000.0,
)

PRESETS = {
    # Train in half a minute on one CPU core (experiments/ at scale tiny).
    "nano": Architecture(
        vocab_size=4096,
        width=64,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=32,
        ffn_width=192,
    ),
    "micro": Architecture(
        vocab_size=4096,
        width=96,
        n_layers=3,
        n_heads=3,
        n_kv_heads=1,
        head_dim=32,
        ffn_width=288,
    ),
    # Trains in minutes on two CPU cores.
    "tiny": Architecture(
        vocab_size=4096,
        width=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        ffn_width=384,
    ),
    # SmolLM2 (arXiv 2502.02737).
    "smollm2-135m": _SMOLLM2,
    "smollm2-360m": replace(
        _SMOLLM2, width=960, n_layers=32, n_heads=15, n_kv_heads=5, ffn_width=2560
    ),
    "smollm2-1.7b": replace(
        _SMOLLM2, width=2048, n_layers=24, n_heads=32, n_kv_heads=32, ffn_width=8192,
        rope_theta=130_000.0,
    ),
    # TinyLlama (arXiv 2401.02385): the paper's 1B model starts from it.
    "tinyllama-1.1b": Architecture(
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
    "mistral-7b": Architecture(
        vocab_size=32_000,
        width=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        ffn_width=14_336,
        max_length=32_768,
        tied_head=False,
        window=4096,
    ),
    # Mistral Large 2's shape.
    "mistral-large-123b": Architecture(
        vocab_size=32_768,
        width=12_288,
        n_layers=88,
        n_heads=96,
        n_kv_heads=8,
        head_dim=128,
        ffn_width=28_672,
        max_length=131_072,
        rope_theta=1_000_000.0,
        tied_head=False,
    ),
    # Llama 3.1, the herd of arXiv 2407.21783.
    "llama-3-8b": _LLAMA3,
    "llama-3-70b": replace(_LLAMA3, width=8192, n_layers=80, n_heads=64, ffn_width=28_672),
    "llama-3-405b": replace(_LLAMA3, width=16_384, n_layers=126, n_heads=128, ffn_width=53_248),
    # Qwen3 (arXiv 2505.09388).
    "qwen3-0.6b": _QWEN3,
    "qwen3-8b": replace(
        _QWEN3, width=4096, n_layers=36, n_heads=32, ffn_width=12_288, tied_head=False
    ),
}  # fmt: skip


def get(name: str, **overrides) -> Architecture:
    """The preset with some fields replaced; InputError for an unknown preset or field."""
    require_known("model.preset", name, PRESETS)
    fields = [field.name for field in dataclasses.fields(Architecture)]
    for field in overrides:
        require_known("model field", field, fields)
    return replace(PRESETS[name], **overrides)
