import jax
import pytest

from rho1_jax.errors import InputError
from rho1_jax.models import llama, presets

# Parameters as published, and forward FLOPs per token at 2,048 tokens: two for each weight of a
# matrix (the embedding is none, the head is one), and 4 * 2,048 for each head's width in a layer.
GOLDEN = {
    "nano": (360_768, 1_769_472),
    "micro": (716_448, 3_790_848),
    "tiny": (1_311_872, 6_815_744),
    "smollm2-135m": (134_515_008, 410_517_504),
    "smollm2-360m": (361_821_120, 975_175_680),
    "smollm2-1.7b": (1_711_376_384, 3_825_205_248),
    "tinyllama-1.1b": (1_100_048_384, 2_437_939_200),
    "mistral-7b": (7_241_732_096, 15_294_529_536),
    "llama-3-8b": (8_030_261_248, 16_083_058_688),
    "llama-3-70b": (70_553_706_496, 144_372_137_984),
    "llama-3-405b": (405_853_388_800, 824_407_228_416),
    "mistral-large-123b": (122_610_069_504, 253_268_852_736),
    "qwen3-0.6b": (596_049_920, 1_661_730_816),
    "qwen3-8b": (8_190_735_360, 16_344_154_112),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_golden_parameters_and_flops(name):
    config = presets.get(name)
    tree = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
    n = sum(x.size for x in jax.tree.leaves(tree))
    assert (n, llama.flops_per_token(config, 2048)) == GOLDEN[name]
    assert llama.param_count(config) == n


def test_what_the_counts_do_not_show():
    assert presets.get("mistral-7b").window == 4096
    assert presets.get("smollm2-135m").rope_theta == 1e5
    for name in ("tinyllama-1.1b", "mistral-7b"):
        assert presets.get(name).rope_theta == 1e4
    assert {presets.get(name).norm_eps for name in presets.PRESETS} == {1e-5, 1e-6}


def test_overrides():
    config = presets.get("tiny", vocab_size=300, window=64)
    assert (config.vocab_size, config.window, config.width) == (300, 64, 128)


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean tinyllama-1.1b"):
        presets.get("tinyllama")
    with pytest.raises(InputError, match="did you mean width"):
        presets.get("tiny", widht=64)
