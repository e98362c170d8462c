"""The same weights in transformers and here give the same logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.models import llama

torch = pytest.importorskip("torch", reason="PyTorch is the other side of the comparison")
transformers = pytest.importorskip("transformers", reason="its models are the reference")

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
CONFIG = llama.LlamaConfig(
    vocab_size=96, width=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, ffn_width=80
)
NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def to_ours(model) -> llama.Params:
    theirs = {name: p.detach().numpy() for name, p in model.named_parameters()}
    params = {
        "embed": theirs["model.embed_tokens.weight"],
        "final_norm": theirs["model.norm.weight"],
        "layers": {
            ours: np.stack([theirs[f"model.layers.{i}.{name}.weight"].T for i in range(3)])
            for ours, name in NAMES.items()
        },
    }
    if "lm_head.weight" in theirs:
        params["head"] = theirs["lm_head.weight"]
    return params


def randomised(model):
    """Weights large enough that a wrong rotation or mask shows, norms away from one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_logits_match(window, tied):
    if window is None:
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SHAPE, rope_theta=500.0, tie_word_embeddings=tied)
        )
    else:
        theirs = transformers.MistralForCausalLM(
            transformers.MistralConfig(
                **SHAPE, head_dim=8, rope_theta=500.0, sliding_window=5, tie_word_embeddings=tied
            )
        )
    theirs = randomised(theirs)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 140))  # longer than a block of attention
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()

    config = dataclasses.replace(CONFIG, rope_theta=500.0, window=window, tied_head=tied)
    params = to_ours(theirs)
    assert ("head" in params) is not tied
    hidden, head = jax.jit(lambda p, t: llama.apply(p, t, config=config))(params, tokens)
    ours = jnp.einsum("bsd,vd->bsv", hidden, head)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
