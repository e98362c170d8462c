"""report.html: sentences and tables that say what the files say, and no more."""

import json
import re

import numpy as np
import pytest

from rho1_jax.analysis import report
from rho1_jax.errors import InputError

HEADER = (
    "step,tokens,seconds,loss,loss_selected,loss_unselected,ref_loss,ref_loss_selected,"
    "ref_loss_unselected,selected_share,precision,useful_share,grad_norm,learning_rate,"
    "tokens_per_second,matmul_utilization"
)
SLM_ROWS = [
    "10,1000,5,5,6,3,4,3,5,0.6,0.8,0.5,1,0.001,200,0.3",
    "30,4000,20,4.5,5,3,4,3,5,0.2,0.8,0.5,1,0.001,200,0.3",
]
CLM_ROWS = ["10,1000,5,5,5,,,,,1,,,1,0.001,200,0.3", "30,4000,20,4.5,4.5,,,,,1,,,1,0.001,200,0.3"]


def measured(**losses):
    return {d: {"loss": x, "bits_per_byte": x / 2, "tokens": 100} for d, x in losses.items()}


SAID = "of each global batch, the 60% of tokens with the highest excess loss entered the loss"
EVAL = {
    "initial": measured(math=4.2, web=4.1),
    "reference": measured(math=3.1, web=5.0),
    "policy": measured(math=3.8, web=4.3),
    "selection": {"score": "excess", "said": SAID},
    "precision": {
        "excess": {"precision": 0.834, "useful_share": 0.55},
        "random": {"precision": 0.551, "useful_share": 0.55},
    },
}


def make_run(folder, *, rows=SLM_ROWS, **files):
    (folder / "metrics.csv").write_text("\n".join([HEADER, *rows, ""]))
    for name, value in files.items():
        suffix = "csv" if isinstance(value, str) else "json"
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{name}.{suffix}").write_text(text)
    return folder


def page_of(folder, passages=(), histogram=None) -> str:
    return report.write(folder, passages=passages, histogram=histogram).read_text()


def prose(page: str) -> str:
    """What a reader reads, tags and style removed."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page[page.index("<main>") :]))


@pytest.fixture
def whole_run(tmp_path):
    heldout = "step,tokens,domain,loss,bits_per_byte\n0,0,math,4.2,2\n30,4000,math,3.8,1.9\n"
    environment = {"versions": {"jax": "0.10.2"}, "devices": ["CPU", "CPU"], "host": "a <machine>"}
    config = {"seed": 0, "data": {"spec": "</script><script>"}}
    make_run(tmp_path, heldout=heldout, eval=EVAL, config=config, environment=environment)
    loss = np.array([1.0, 2.0, 3.0], np.float32)
    passage = {
        "title": "Row <0>",
        "pieces": ["<script>", " b", "\n"],
        "loss": loss,
        "ref_loss": loss / 2,
        "score": loss / 2,
        "selected": np.array([False, True, True]),
    }
    scores = np.linspace(-2.0, 2.0, 200)
    histogram = {"scores": scores, "threshold": 0.5, "useful": scores > 0}
    return page_of(tmp_path, [passage], histogram)


def test_a_whole_run_is_one_page_that_fetches_nothing(whole_run, assert_self_contained):
    assert_self_contained(whole_run)
    assert whole_run.count("<svg") == 4
    assert whole_run.count("<script>") == 1
    names = re.findall(r"<h2>(.*?)</h2>", whole_run)
    assert names[:3] == ["Training", "Held-out loss", "What is selected"]


def test_the_headline_says_what_was_run_and_what_came_of_it(whole_run):
    text = prose(whole_run)
    assert "of each global batch, the 60% of tokens with the highest excess loss entered" in text
    assert (
        "held-out loss, in nats per token, is lower than the initial model's on math "
        "(3.800 against 4.200), and higher on web (4.300 against 4.100); "
        "it is lower than the reference's on web, and higher on math."
    ) in text.replace("&#39;", "'")
    assert "steps 30 training tokens 4k" in re.sub(r"\s+", " ", text)
    # 1000 tokens at 60 % and 3000 at 20 %
    assert "of them selected 30.0%" in re.sub(r"\s+", " ", text)
    assert "training time 20s" in re.sub(r"\s+", " ", text)


def test_the_headline_says_what_was_selected_of_each_domain(tmp_path):
    rows = [f"{row},{share}" for row, share in zip(SLM_ROWS, ("0.5", "0.1"), strict=True)]
    folder = make_run(tmp_path, rows=rows)
    text = (folder / "metrics.csv").read_text().replace(HEADER, f"{HEADER},selected_share/web")
    (folder / "metrics.csv").write_text(text)
    assert "selected of web 20.0%" in prose(page_of(folder))  # of 1000 tokens and of 3000


def test_the_table_holds_every_number(whole_run):
    rows = re.findall(r"<tr><th>(math|web)</th>(.*?)</tr>", whole_run)
    cells = {domain: re.findall(r">([\d.–]+)</td>", row) for domain, row in rows}
    assert cells["math"] == ["4.200", "3.100", "3.800", "2.100", "1.550", "1.900"]
    assert cells["web"] == ["4.100", "5.000", "4.300", "2.050", "2.500", "2.150"]


def test_passages_settings_and_scores_are_shown(whole_run, tokens_of):
    found = tokens_of(whole_run)
    assert [("on" in classes) for _, classes, _ in found] == [False, True, True]
    text = prose(whole_run)
    assert "38% of them reach the threshold" in text  # 75 of 200
    assert "versions jax 0.10.2" in text
    assert "devices CPU, CPU" in text
    assert "a &lt;machine&gt;" in text
    assert "Row &lt;0&gt;" in text
    assert "Blue: the score of this run." in text


def test_missing_parts_are_left_out_with_a_sentence(tmp_path, assert_self_contained):
    page = page_of(make_run(tmp_path))
    assert_self_contained(page)
    assert page.count("<svg") == 1
    text = prose(page).replace("&#39;", "'")
    for sentence in (
        "How tokens were selected is not recorded in the run's folder.",
        "Held-out losses were not measured.",
        "The scores of single tokens were not recorded in this run.",
        "Which tokens are worth learning is not known for this corpus.",
        "No passages were given.",
        "The environment was not recorded.",
        "The configuration was not recorded.",
    ):
        assert sentence in text


def test_a_causal_run_shows_one_panel_and_no_reference(tmp_path):
    evals = {
        "initial": measured(math=4.2),
        "policy": measured(math=3.8),
        "selection": {"score": "all", "said": "every token entered the loss"},
    }
    page = page_of(make_run(tmp_path, rows=CLM_ROWS, eval=evals))
    text = prose(page)
    assert "Causal language modeling: every token entered the loss." in text
    assert "The loss of a reference model was not recorded." in text
    assert "all tokens" in page
    assert "unselected tokens" not in page
    assert "the reference" not in text
    assert re.findall(r"<th>(initial|reference|policy)</th>", page) == ["initial", "policy"] * 2


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("every token entered the loss", "Causal language modeling: every token entered the loss."),
        (
            "all tokens entered the loss, the unselected with weight <0.5>",
            "Selective language modeling: all tokens entered the loss, the unselected with weight "
            "&lt;0.5&gt;.",
        ),
    ],
)
def test_what_entered_the_loss_is_printed_as_it_is_recorded(tmp_path, said, sentence):
    evals = {"selection": {"score": "excess", "ratio": 1.0, "said": said}}
    assert sentence in prose(page_of(make_run(tmp_path, eval=evals)))


@pytest.mark.parametrize(
    ("evals", "sentence"),
    [
        ({"policy": measured(a=3.0)}, "loss, in nats per token, is 3.000 on a."),
        (
            {"policy": measured(a=3.0), "reference": measured(a=3.0004)},
            "is equal to the reference's on a (3.000 against 3.000).",
        ),
        (
            {"policy": measured(a=3.0, b=np.nan), "initial": measured(a=4.0, b=4.0)},
            "is lower than the initial model's on a (3.000 against 4.000).",
        ),
        ({"policy": measured(a=3.0), "initial": measured(b=4.0)}, "is 3.000 on a."),
        (
            {"policy": measured(a=3.0, b=5.0, c=1.0), "initial": measured(a=3.0, b=4.0, c=2.0)},
            "is lower than the initial model's on c (1.000 against 2.000), and equal on a "
            "(3.000 against 3.000), and higher on b (5.000 against 4.000).",
        ),
    ],
)
def test_the_result_claims_no_more_than_the_numbers(tmp_path, evals, sentence):
    page = page_of(make_run(tmp_path, eval=evals))
    assert sentence in prose(page).replace("&#39;", "'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: run the train stage"),
        ("", "has no column step, tokens, loss"),
        ("step,tokens\n1,2\n", "has no column loss"),
        (HEADER + "\n", "holds no rows"),
        ("step,tokens,loss\n1,2,3\n2,4\n", "line 3: the number of cells"),
        ("step,tokens,loss\n1,2,3,4\n", "line 2: the number of cells"),
        ("step,tokens,loss\n1,2,3\n2,many,3\n", "line 3: tokens is 'many', not a number"),
        ("step,tokens,loss\n1,,3\n", "line 2: tokens is not a number"),
        (b"\xff\xfe\x00", "is not a CSV file"),
        (b"step,tokens,loss\n1,2,\x00\n", "metrics.csv"),
    ],
)
def test_a_broken_metrics_file_is_named(tmp_path, content, message):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "metrics.csv").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        page_of(tmp_path)
    assert "metrics.csv" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("heldout.csv", "tokens,loss\n1,2\n", "no column domain"),
        ("heldout.csv", "tokens,domain,loss\n1,math,low\n", "loss is 'low'"),
        ("eval.json", "{", "is damaged"),
        ("eval.json", "[1]", "is damaged"),
        ("eval.json", '{"policy": {"math": {"loss": 3}}}', "policy.math.bits_per_byte"),
        ("eval.json", '{"precision": {"excess": {"precision": 1}}}', "excess.useful_share"),
        ("config.json", "seed = 1", "is damaged"),
        ("environment.json", "null", "is damaged"),
    ],
)
def test_other_broken_files_are_named(tmp_path, name, content, message):
    make_run(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        page_of(tmp_path)
    assert name in str(caught.value)


def test_the_page_goes_where_it_is_asked_to(tmp_path):
    make_run(tmp_path)
    out = tmp_path / "pages" / "a.html"
    assert report.write(tmp_path, passages=[], histogram=None, out=out) == out
    assert out.exists()
    assert not (tmp_path / "report.html").exists()
    assert report.write(str(tmp_path), passages=[], histogram=None) == tmp_path / "report.html"


def test_a_diverged_run_still_has_a_report(tmp_path):
    page = page_of(make_run(tmp_path, rows=["1,1000,5,nan,nan,nan,4,3,5,0.6,,,nan,0.001,200,0.3"]))
    assert page.count("<svg") == 1


def test_benchmarks_stand_on_the_page_where_they_were_run(tmp_path):
    tasks = {"gsm8k": {"n": 1319, "prompts": "ab", "correct": [0.362, 0.0132], "bpb": [1.25, None]}}
    text = prose(page_of(make_run(tmp_path, eval=EVAL | {"tasks": tasks})))
    assert "Benchmarks" in text
    assert "gsm8k (1,319) correct 0.362 0.013 bpb 1.250 –" in text
    assert "Benchmarks" not in prose(page_of(make_run(tmp_path, eval=EVAL)))
