import jax
import pytest

from rho1_jax.errors import InputError
from rho1_jax.models import llama, presets


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny", 1_311_872),
        ("smollm2-135m", 134_515_008),
        ("tinyllama-1.1b", 1_100_048_384),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_published_parameter_counts(name, count):
    config = presets.get(name)
    tree = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(tree)) == llama.param_count(config) == count


def test_every_preset_is_covered_by_the_counts_above():
    assert set(presets.PRESETS) == {"tiny", "smollm2-135m", "tinyllama-1.1b", "mistral-7b"}


def test_what_the_counts_do_not_show():
    assert presets.get("mistral-7b").window == 4096
    assert presets.get("smollm2-135m").rope_theta == 1e5
    for name in ("tinyllama-1.1b", "mistral-7b"):
        assert presets.get(name).rope_theta == 1e4
    assert {presets.get(name).norm_eps for name in presets.PRESETS} == {1e-5}


def test_overrides():
    config = presets.get("tiny", vocab_size=300, dtype="bfloat16")
    assert (config.vocab_size, config.dtype, config.width) == (300, "bfloat16", 128)


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean tinyllama-1.1b"):
        presets.get("tinyllama")
    with pytest.raises(InputError, match="did you mean dtype"):
        presets.get("tiny", dtyp="bfloat16")
