"""What is saved with a model says what it is, and nothing of how it was computed."""

import dataclasses
import json

import pytest

from rho1_jax.errors import InputError
from rho1_jax.models import presets
from rho1_jax.models.architecture import Architecture, Compute, LlamaConfig


def test_only_the_architecture_is_saved():
    tiny = presets.get("tiny")
    computed = tiny.computed(dtype="bfloat16", remat="full", scan_layers=False)
    assert (computed.dtype, computed.remat, computed.width) == ("bfloat16", "full", 128)
    for config in (tiny, computed):
        stored = json.loads(json.dumps(config.to_json()))
        assert not stored.keys() & {field.name for field in dataclasses.fields(Compute)}
        again = Architecture.from_json(stored)
        assert again == tiny
        assert again.computed() == LlamaConfig(**dataclasses.asdict(tiny))


def test_model_files_that_also_say_how_it_was_computed():
    """As earlier versions wrote them."""
    stored = dataclasses.asdict(presets.get("llama-3-8b").computed(dtype="bfloat16", remat="dots"))
    assert Architecture.from_json(json.loads(json.dumps(stored))) == presets.get("llama-3-8b")


@pytest.mark.parametrize("how", [{"dtype": "float16"}, {"remat": "some"}])
def test_unknown_ways_to_compute(how):
    with pytest.raises(InputError, match=rf"{next(iter(how))}=.* must be"):
        presets.get("tiny").computed(**how)
