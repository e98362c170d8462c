"""Whose folder it is: one process at a time, one method per stage."""

import contextlib
import fcntl
import os
import subprocess
import sys

import pytest

from rho1_jax.errors import InputError
from rho1_jax.pipeline import claim
from tests import tiny_config


def config(**changes):
    c = tiny_config.get_config()
    c.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})
    return c


HOLD = """
import pathlib, sys
from rho1_jax.pipeline import claim
with claim.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    said = pytest.raises(InputError, match=rf"process {os.getpid()} on .*since")
    with claim.held(tmp_path), said, claim.held(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"process {holder.pid} on"), claim.held(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with claim.held(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / claim.LOCK).read_text()


def test_a_folder_is_free_again_afterwards(tmp_path):
    for _ in range(2):
        with claim.held(tmp_path):
            pass
    with (tmp_path / claim.LOCK).open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_keys_bind_when_their_stage_begins(tmp_path):
    claim.begin(tmp_path, config())
    claim.bind(tmp_path, config(), "prepare")
    claim.begin(tmp_path, config(train__lr=1e-4))  # training has not begun
    with pytest.raises(InputError, match=r"seq_len .*32.*64.* prepare has begun"):
        claim.begin(tmp_path, config(data__seq_len=64))
    claim.bind(tmp_path, config(train__lr=1e-4), "train")
    claim.begin(tmp_path, config(train__lr=1e-3))  # it has left no checkpoint
    (tmp_path / "checkpoints" / "steps" / "2").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train.lr .* train has begun"):
        claim.begin(tmp_path, config(train__lr=1e-3))


WSD = {"train__schedule": "wsd", "train__decay_steps": 2, "reference__schedule": "constant"}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({}, {"train__steps": 9}, None),
        ({"train__schedule": "constant", "train__decay_steps": 0}, {"train__steps": 9}, None),
        ({"train__steps": 0, "train__epochs": 1.0}, {"train__epochs": 2.0}, None),
        ({}, {"train__steps": 7}, r"train.steps \(8, 7\) differ"),
        ({}, {"train__steps": 9, "train__lr": 1.0}, "train.lr"),
        ({}, {"train__steps": 0, "train__epochs": 9.0}, "train.(epochs|steps)"),
        ({}, {"reference__steps": 9}, r"reference.steps \(6, 9\) differ .* score has begun"),
        *(
            (other, {"train__steps": 9}, r"train.steps \(8, 9\) .* nothing depends on how many")
            for other in (
                {"train__schedule": "cosine", "train__decay_steps": 0},
                {"train__schedule": "linear", "train__decay_steps": 0},
                {"select__final_ratio": 0.5},
                {"data__weight_changes": ((0.5, "noisy", 2.0),)},
            )
        ),
    ],
)
def test_more_steps_where_nothing_depends_on_how_many_there_are(before, after, words, tmp_path):
    for stage in ("prepare", "reference", "score", "train"):
        claim.bind(tmp_path, config(**WSD | before), stage)
    (tmp_path / "checkpoints" / "steps" / "2").mkdir(parents=True)
    refused = pytest.raises(InputError, match=words) if words else contextlib.nullcontext()
    with refused:
        claim.begin(tmp_path, config(**WSD | before | after))


def test_a_reference_may_go_on_while_nothing_is_made_with_it(tmp_path):
    claim.bind(tmp_path, config(**WSD), "reference")
    (tmp_path / "reference" / "steps" / "2").mkdir(parents=True)
    claim.begin(tmp_path, config(**WSD, reference__steps=9))


def test_a_released_key_is_free_until_its_stage_goes_on(tmp_path):
    claim.bind(tmp_path, config(), "train")
    (tmp_path / "checkpoints" / "steps" / "2").mkdir(parents=True)
    claim.release(tmp_path, "train", ("lr", "clip"))
    lower = config(train__lr=1e-9)
    claim.begin(tmp_path, lower)
    with pytest.raises(InputError, match="train.b1"):
        claim.begin(tmp_path, config(train__lr=1e-9, train__b1=0.5))
    claim.bind(tmp_path, lower, "train")
    claim.begin(tmp_path, lower)
    with pytest.raises(InputError, match="train.lr"):
        claim.begin(tmp_path, config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score__batch_size", 16),
        ("loss_chunk_tokens", 64),
        ("model__remat", "full"),
        ("train__accumulation", 2),
        ("eval__tasks", ("gsm8k",)),
        ("eval__limit", 5),
        ("eval__every", 2),
        ("mesh__fsdp", 2),
        ("checkpoint__every", 1),
        ("log_every", 5),
    ],
)
def test_what_only_says_how_to_compute_may_change(key, value, tmp_path):
    for stage in ("prepare", "reference", "score", "train", "evaluate"):
        claim.bind(tmp_path, config(), stage)
    for name in ("reference", "checkpoints"):
        (tmp_path / name / "steps" / "2").mkdir(parents=True)
    claim.begin(tmp_path, config(**{key: value}))


def test_accumulation_binds_where_microbatches_compete(tmp_path):
    one, two = (config(select__scope="microbatch", train__accumulation=n) for n in (1, 2))
    claim.bind(tmp_path, one, "train")
    (tmp_path / "checkpoints" / "steps" / "2").mkdir(parents=True)
    with pytest.raises(InputError, match="accumulation"):
        claim.begin(tmp_path, two)


def test_the_mesh_binds_where_shards_compete(tmp_path):
    claim.bind(tmp_path, config(select__scope="shard"), "train")
    (tmp_path / "checkpoints" / "steps" / "2").mkdir(parents=True)
    with pytest.raises(InputError, match="mesh"):
        claim.begin(tmp_path, config(select__scope="shard", mesh__fsdp=2))
