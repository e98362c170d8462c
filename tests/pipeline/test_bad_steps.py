"""A run whose steps stop being finite ends in a sentence, and loses nothing."""

import csv

import jax
import numpy as np
import pytest

from rho1_jax import main
from rho1_jax.errors import InputError
from rho1_jax.training.checkpoint import load_model
from tests import tiny_config
from tests.tiny_config import write_texts


def config(texts, **changes):
    c = tiny_config.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    c.update_from_flattened_dict({"data.root": str(texts)} | changes)
    return c


STAGES = ("prepare", "reference", "score", "train")


def test_a_learning_rate_that_is_mad_ends_soon_and_a_sane_one_goes_on(tmp_path, capsys):
    texts = write_texts(tmp_path / "text")
    every = {"checkpoint__every": 1, "eval__every": 14}
    mad = config(texts, train__lr=1e30, train__steps=14, **every)
    with pytest.raises(InputError, match=r"10 steps in a row .* lower train.lr"):
        main.run(mad, tmp_path / "w", STAGES)
    said = capsys.readouterr().out
    assert "changed nothing" in said
    assert "of noisy" in said  # the rows are named
    with (tmp_path / "w" / "metrics.csv").open(newline="") as f:
        assert len(list(csv.DictReader(f))) <= 20
    assert (tmp_path / "w" / "reference" / "steps" / "6").exists()
    saved = [path.name for path in (tmp_path / "w" / "checkpoints" / "steps").iterdir()]
    assert saved == ["1"]  # its learning rate was 0; the next one made junk, of finite numbers
    with pytest.raises(InputError, match=r"train.warmup_steps .* differ there and here"):
        main.run(config(texts, train__steps=14, train__warmup_steps=1), tmp_path / "w", STAGES)
    main.run(config(texts, train__steps=14, **every), tmp_path / "w", STAGES)
    assert "train: resumes at step 1\n" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"train.lr .* differ there and here"):
        main.run(mad, tmp_path / "w", STAGES)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_model(tmp_path / "w")[0]))
