"""Several processes on this machine are one run: same numbers, same end, nobody left behind."""

import json
import re
import signal

import jax
import numpy as np
import pytest

from rho1_jax.training.checkpoint import load_model
from tests import launcher


def arguments(texts, workdir, *more):
    return (
        "--config=tests/tiny_config.py", f"--config.data.root={texts}", f"--workdir={workdir}",
        "--config.mesh.fsdp=2", *more,
    )  # fmt: skip


def numbers(rows):
    return [[float(x) if x else 0.0 for k, x in row.items() if k != "domain"] for row in rows]


@pytest.mark.slow
def test_processes_equal_devices_also_when_one_is_killed_and_others_resume(texts, tmp_path):
    """Four devices of one process; of two, of which one is killed; and of four, which go on."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    (alone,) = launcher.ended(launcher.start(1, *arguments(texts, straight), n_devices=4))
    assert alone.status == 0, alone.err

    two = launcher.start(2, *arguments(texts, broken), n_devices=2)
    four_steps = broken / "checkpoints" / "steps" / "4"
    launcher.signal_when(two, 1, signal.SIGKILL, four_steps.exists)
    first, killed = launcher.ended(two)
    assert killed.status == -signal.SIGKILL
    assert first.status not in (0, -signal.SIGKILL)
    assert first.err.strip()  # it ended too, and says something
    assert not killed.out.replace("[Gloo]", "").count("loss")  # only the first host speaks

    four = launcher.ended(launcher.start(4, *arguments(texts, broken)))
    assert [e.status for e in four] == [0] * 4, four
    assert re.search(r"train: resumes at step \d", four[0].out)

    for folder in (".", "reference"):
        for name in ("metrics.csv", "heldout.csv"):
            ours, theirs = (launcher.table(w / folder / name) for w in (broken, straight))
            np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=1e-5, atol=1e-5)
    losses = [json.loads((w / "eval.json").read_text())["policy"] for w in (broken, straight)]
    assert losses[0]["noisy"]["loss"] == pytest.approx(losses[1]["noisy"]["loss"], abs=1e-5)
    samples = [np.load(w / "samples.npz") for w in (broken, straight)]
    np.testing.assert_array_equal(samples[0]["selected"], samples[1]["selected"])
    scores = [np.load(w / "scores" / "noisy" / "ref_loss.npy") for w in (broken, straight)]
    np.testing.assert_allclose(*scores, rtol=2e-3)  # one float16 from the next
    params = [load_model(w)[0] for w in (broken, straight)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *params)
    assert json.loads((broken / "environment.json").read_text())["hosts"] == 2


@pytest.mark.nightly  # tests/training/test_parity.py cuts rows over devices of one process
def test_hosts_share_long_rows(texts, tmp_path):
    """Rows cut over two hosts, and two parts of the batch: what two devices of one process do."""
    options = (
        "--stages=prepare,train", "--config.select.score=loss", "--config.train.steps=3",
        "--config.train.batch_size=4", "--config.train.accumulation=2",
        "--config.score.batch_size=2",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (alone,) = launcher.ended(launcher.start(1, *arguments(texts, whole, *options), n_devices=2))
    assert alone.status == 0, alone.err
    args = arguments(texts, cut, *options, "--config.mesh.sequence=2")
    four = launcher.ended(launcher.start(4, *args))
    assert [e.status for e in four] == [0] * 4, four
    for name in ("metrics.csv", "heldout.csv"):
        ours, theirs = (numbers(launcher.table(folder / name)) for folder in (cut, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_first_of_several_hosts_runs_the_benchmarks(texts, tmp_path):
    """On its own devices, with the parameters that lay over all: the numbers of one process."""
    asks = "Answer true or false, question: is {} true?\n\nAnswer format: true/false"
    items = [{"instruction": asks.format(what), "answer": "true"} for what in ("one", "two")]
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    options = (
        "--stages=prepare,train,evaluate", "--config.select.score=loss", "--config.train.steps=2",
        "--config.eval.tasks=('boolq',)", f"--config.eval.data_dir={tmp_path}",
    )  # fmt: skip
    found = []
    for name, n_processes, n_devices in (("one", 1, 2), ("two", 2, 1)):
        folder = tmp_path / name
        started = launcher.start(
            n_processes, *arguments(texts, folder, *options), n_devices=n_devices
        )
        ended = launcher.ended(started, timeout=600)
        assert [e.status for e in ended] == [0] * n_processes, ended
        found.append(json.loads((folder / "eval.json").read_text())["tasks"]["boolq"])
    one, two = found
    assert one.keys() == two.keys()
    assert two["n"] == 2
    for name, value in one.items():
        if isinstance(value, list):
            assert two[name][0] == pytest.approx(value[0], abs=1e-4), name


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(texts, tmp_path):
    args = arguments(
        texts, tmp_path, "--config.select.score=all", "--config.train.steps=2000",
        "--config.eval.every=5000", "--config.checkpoint.every=5000",
    )  # fmt: skip
    log = tmp_path / "metrics.csv"
    two = launcher.start(2, *args)
    launcher.signal_when(two, 1, signal.SIGTERM, lambda: log.exists() and "\n3," in log.read_text())
    first, second = launcher.ended(two)
    assert [first.status, second.status] == [128 + signal.SIGTERM] * 2, (first, second)
    saved = re.search(r"host 0: Interrupted: saved at step (\d+) of 2000", first.err).group(1)
    assert "Interrupted" not in second.err
    assert (tmp_path / "checkpoints" / "steps" / saved).exists()
    assert launcher.table(log)[-1]["step"] == saved


def test_bad_input_on_one_host_ends_all(texts, tmp_path):
    """Here: the hosts were started with different configs."""
    port = launcher.free_port()
    both = [
        launcher.start(
            1, *arguments(texts, tmp_path, f"--config.seed={i}"), f"--process_id={i}",
            f"--coordinator=127.0.0.1:{port}", "--num_processes=2",
        )[0]
        for i in range(2)
    ]  # fmt: skip
    first, second = launcher.ended(both, timeout=60)
    assert (first.status, second.status) == (2, 2)
    assert first.err.splitlines()[-1] == "host 0: stopped, because host 1 failed"
    assert "host 1:" in second.err
    assert "config.seed (0, 1) differ" in second.err


def test_half_a_cluster_is_one_sentence(texts, tmp_path):
    args = arguments(texts, tmp_path, "--num_processes=2", "--process_id=1")
    (alone,) = launcher.ended(launcher.start(1, *args))
    assert alone.status == 2
    assert alone.err.strip().count("\n") == 0, alone.err
    assert "give all of --coordinator=HOST:PORT" in alone.err
