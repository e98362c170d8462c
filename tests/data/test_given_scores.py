"""Scores from elsewhere train the policy that the same scores of our own train."""

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rho1_jax import config as config_lib
from rho1_jax import export_scores, main
from rho1_jax.data import given_scores
from rho1_jax.errors import InputError
from rho1_jax.models.formats import load, weights
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.training import sharding
from tests import tiny_config

FIELDS = ("ref_loss",)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run with scores of its own, what it exported, and its config."""
    folder, config = tmp_path_factory.mktemp("run"), tiny_config.get_config()
    config.data.root = str(tiny_config.write_texts(folder / "text"))
    config.train.steps = 3
    config.score.entropy = True
    main.run(config, folder / "own", ("prepare", "reference", "score", "train"))
    assert export_scores.main(["", str(folder / "own"), str(folder / "given")]) == 0
    return folder, config


@pytest.fixture
def table(scored):
    return pq.read_table(scored[0] / "given" / "data")


def params(run):
    return load.saved_params(run / "checkpoints", weights.on_first_device)


def rows_of(scored):
    folder, config = scored
    ws = Workspace(config, folder / "own", sharding.make_mesh(**config.mesh))
    return ws.train_rows(config.data.corpus)["noisy"], ws.visited_rows["noisy"]


def test_a_policy_of_given_scores_has_the_bits_of_one_of_its_own(scored, capsys):
    folder, config = scored
    given = config.copy_and_resolve_references()
    given.score.update(source=str(folder / "given"), entropy=False)
    run = folder / "given-run"
    main.run(given, run)
    said = capsys.readouterr().out
    assert f"its scores are given, in {folder / 'given'}, skipped" in said
    assert not (run / "reference").exists()
    ours, theirs = params(folder / "own"), params(run)
    assert all(map(np.array_equal, *map(weights_of, (ours, theirs))))
    main.run(given, run)  # bound to the same file: nothing is scored again
    assert "noisy is finished, skipped" in capsys.readouterr().out
    assert (run / "report.html").exists()


def test_the_rows_to_score_are_exported_before_there_are_any_scores(scored, table, tmp_path):
    """By the commands of docs/scores.md: those that training reads, without their scores."""
    folder, config = scored
    plain = config.copy_and_resolve_references()
    plain.select.score = "all"
    plain.score.entropy = False
    main.run(plain, tmp_path / "rows", ("prepare",))
    assert export_scores.main(["", str(tmp_path / "rows"), str(tmp_path / "out")]) == 0
    rows = pq.read_table(tmp_path / "out" / "data")
    assert "ref_loss" not in rows.column_names
    assert all(rows[name].equals(table[name]) for name in ("domain", "row", "input_ids"))


def weights_of(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_other_scores_are_refused_by_a_run_that_has_some(scored, table, tmp_path):
    folder, config = scored
    path = tmp_path / "s.parquet"
    other = config.copy_and_resolve_references()
    other.score.source = str(path)
    pq.write_table(table, path)
    with pytest.raises(InputError, match="other reference: delete the folder"):
        main.run(other, folder / "own", ("score",))


def read(scored, table, path, fields=FIELDS):
    pq.write_table(table, path)
    rows, ids = rows_of(scored)
    found = list(given_scores.read(str(path), fields, "noisy", rows, ids))
    order = np.concatenate([numbers for numbers, _ in found])
    return order, {f: np.concatenate([values[f] for _, values in found]) for f in fields}


def replaced(table, name, values, new=None):
    at = table.column_names.index(name)
    return table.set_column(at, new or name, pa.array(values))


def test_log_probabilities_are_the_losses_negated(scored, table, tmp_path):
    order, losses = read(scored, table, tmp_path / "a.parquet")
    values = [[-x for x in each] for each in table["ref_loss"].to_pylist()]
    renamed = replaced(table, "ref_loss", values, "ref_logprob")
    again, from_logs = read(scored, renamed, tmp_path / "b.parquet")
    np.testing.assert_array_equal(order, again)
    np.testing.assert_array_equal(losses["ref_loss"], from_logs["ref_loss"])
    assert sorted(order) == rows_of(scored)[1].tolist()
    assert losses["ref_loss"].std() > 0


def first_row(table, name, change):
    values = table[name].to_pylist()
    values[0] = change(values[0])
    return replaced(table, name, values)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda t: t.drop_columns("ref_loss"), "has no column ref_loss, only step, domain"),
        (lambda t: t.drop_columns("row"), "has no column row"),
        (lambda t: t.slice(1), r"has no scores of 1 of the \d+ rows of noisy .* such as row"),
        (lambda t: first_row(t, "input_ids", lambda x: [*x[:-1], x[-1] + 1]), "has other tokens"),
        (lambda t: first_row(t, "ref_loss", lambda x: x[:-1]), "has 32 values of ref_loss in row"),
        (lambda t: first_row(t, "ref_loss", lambda x: [*x[:5], None, *x[6:]]),
         "has no ref_loss for token 5 of row"),
        (lambda t: first_row(t, "ref_loss", lambda x: [*x[:5], -2.5, *x[6:]]),
         "makes it -2.5, and it must be a number of nats of 0 or more"),
    ],
)  # fmt: skip
def test_what_is_no_score_of_ours_is_refused(scored, table, tmp_path, changed, message):
    with pytest.raises(InputError, match=message):
        read(scored, changed(table), tmp_path / "s.parquet")


def test_what_is_no_file_of_scores_is_refused(tmp_path):
    with pytest.raises(InputError, match="is neither a Parquet file nor a folder"):
        given_scores.require(str(tmp_path / "nothing"), FIELDS)
    with pytest.raises(InputError, match="is neither a Parquet file nor a folder"):
        given_scores.require(str(tmp_path), FIELDS)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing more")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        given_scores.require(str(tmp_path), FIELDS)


def test_the_digest_is_of_the_bytes_wherever_they_lie(table, tmp_path):
    places = [tmp_path / "a.parquet", tmp_path / "elsewhere.parquet", tmp_path / "other.parquet"]
    for path, part in zip(places, (table, table, table.slice(1)), strict=True):
        pq.write_table(part, path)
    same, moved, other = (given_scores.digest(str(path)) for path in places)
    assert same == moved != other


@pytest.mark.parametrize(
    ("section", "values", "why"),
    [
        ("score", {"cached": False}, "score.cached=False asks a model"),
        ("select", {"ref_ema_decay": 0.9}, "select.ref_ema_decay=0.9 asks a model"),
        ("select", {"distill_weight": 0.5}, "select.distill_weight=0.5 asks a model"),
        (
            "select",
            {"score": "utility", "utility": "relevance"},
            "=relevance asks a model",
        ),
    ],
)
def test_what_only_a_model_can_answer_is_refused(section, values, why):
    config = tiny_config.get_config()
    config.score.source = "scores.parquet"
    config_lib.validate(config)
    config[section].update(values)
    with pytest.raises(InputError, match=why):
        config_lib.validate(config)
