"""The plan: what a run takes, before anything is read."""

import re
import shutil
from collections import namedtuple

import jax
import pytest

from rho1_jax import main
from rho1_jax.errors import InputError
from rho1_jax.models import llama, presets
from rho1_jax.models.tokenizer import SEPARATOR
from rho1_jax.pipeline import claim, models, plan
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.training import program, sharding
from rho1_jax.training.planning import around
from tests import tiny_config

Usage = namedtuple("Usage", "total used free")


def dry_run(texts, folder, **changes):
    config = tiny_config.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict({"data.root": str(texts)} | changes)
    main.run(config, folder, dry_run=True)


def test_a_dry_run_says_what_it_takes_and_does_nothing(texts, tmp_path, capsys):
    dry_run(texts, tmp_path)
    said = capsys.readouterr().out
    assert "reference   6 steps of 256 tokens, 1,536 in all" in said
    assert "train       8 steps of 256 tokens, 2,048 in all" in said
    assert "at most 64 rows" in said
    architecture = presets.get("tiny", vocab_size=300, max_length=32)
    parameters = llama.param_count(architecture) * 4
    assert f"{parameters / 2**20:.3g} MiB a device" in said or "KiB a device" in said
    assert "temporaries" in said
    assert re.search(r"memory +at most \S+ MiB a device, by the program `train`\n", said)
    assert {path.name for path in tmp_path.iterdir()} == {claim.LOCK}


def test_a_program_that_needs_more_than_a_device_has_is_named(texts, tmp_path, capsys, monkeypatch):
    """On a device that says how much it has; nothing is compiled, for speed."""
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda _: None)
    monkeypatch.setattr(around, "needs", lambda _, beside: around.Needs(0, 0, 0, 0, beside))
    monkeypatch.setattr(plan, "_limit", lambda: 1000)
    dry_run(texts, tmp_path)
    said = capsys.readouterr().out
    assert "by the program `save`; a device has 1e+03 B, which may be too little: try mesh" in said


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(plan, "_reserved", lambda *_: [])


@pytest.mark.usefixtures("uncompiled")
def test_sharded_parameters_take_their_part_of_a_device(texts, tmp_path, capsys):
    whole = presets.get("tiny", vocab_size=304, max_length=32)
    dry_run(texts, tmp_path, mesh__data=1, mesh__fsdp=8, tokenizer__vocab_size=304)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "parameters" in line)
    size, unit = line.split()[1:3]
    device = float(size) * {"KiB": 2**10, "MiB": 2**20}[unit]
    norms = (2 * whole.n_layers + 1) * whole.width * 4  # every device holds all of these
    expected = (llama.param_count(whole) * 4 - norms) / jax.device_count() + norms
    assert device == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "of_matrix", "of_rest"),  # bytes an entry; of all but layers' matrices
    [("adamw", "bfloat16", 6, 6), ("muon", "float32", 4, 8), ("muon", "bfloat16", 2, 6),
     ("adafactor", "bfloat16", 2, 2)],
)  # fmt: skip
def test_moments_are_those_of_the_optimizer(optimizer, dtype, of_matrix, of_rest):
    config = tiny_config.get_config()
    config.train.update(optimizer=optimizer, moments_dtype=dtype)
    shape = presets.get("tiny", vocab_size=304, max_length=32)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    built = program.of_policy(config, shape.computed(), shape.computed(), mesh, steps=8)
    whole = jax.eval_shape(lambda: llama.init(shape, jax.random.key(0)))
    matrices = sum(x.size for x in jax.tree.leaves(whole["layers"]) if x.ndim == 3)
    expected = of_matrix * matrices + of_rest * (llama.param_count(shape) - matrices)
    # Rows and columns, and matrices that are too narrow for that.
    sums = 0.2 if optimizer == "adafactor" else 0.0
    assert 1 < around.bytes_of(built.state.opt_state) / expected < 1.001 + sums


@pytest.mark.usefixtures("uncompiled")
def test_too_little_disk_is_said_before_anything_is_read(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 1000))
    with pytest.raises(InputError, match=r"needs .* has 1e\+03 B free|needs .* free: make room"):
        dry_run(texts, tmp_path)
    (tmp_path / "checkpoints" / "steps").mkdir(parents=True)
    dry_run(texts, tmp_path)  # a run that has begun is not kept from its last stages


def test_all_stages_are_checked_before_the_first(texts, tmp_path):
    """Mistakes that only the last stages would meet."""
    with pytest.raises(InputError, match="train.batch_size=8 rows do not divide"):
        dry_run(texts, tmp_path / "a", train__accumulation=4)
    with pytest.raises(InputError, match="gsm8"):
        dry_run(texts, tmp_path / "b", eval__tasks=("gsm8kk",), eval__data_dir=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="noisy"):
        dry_run(tmp_path / "empty", tmp_path / "c")
    with pytest.raises(InputError, match="nowhere"):
        dry_run(texts, tmp_path / "d", reference__init=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("apart", [True, False])
def test_every_model_of_a_run_keeps_documents_apart_or_none(texts, tmp_path, apart):
    """Also before there is a tokenizer whose separator it could be."""
    config = tiny_config.get_config()
    config.update_from_flattened_dict(
        {"data.root": str(texts), "data.separate_documents": apart, "tokenizer.vocab_size": 257}
    )
    ws = Workspace(config, tmp_path, sharding.make_mesh(**config.mesh))
    planned = models.planned(ws), models.planned_reference(ws)
    assert not any(tmp_path.iterdir())
    separator = ws.tokenizer.separator_id if apart else None
    assert [shape.separator for shape in (*planned, models.initial_shape(ws))] == 3 * [separator]
    assert ws.tokenizer.vocabulary[ws.separator] == SEPARATOR
