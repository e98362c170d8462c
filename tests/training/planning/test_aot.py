"""Programs for TPUs that are not there: named, compiled, refused. The compiler is libtpu's."""

import importlib.util
import math
import re

import jax
import pytest

from rho1_jax.config import default_config, source
from rho1_jax.errors import InputError
from rho1_jax.models import llama, presets
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.training.planning import aot, around, cost, slices

has_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -r requirements-dev.txt brings it",
)
SMALL = LlamaConfig(
    vocab_size=1024, width=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, ffn_width=512,
    tied_head=False,
)  # fmt: skip
WIDE = LlamaConfig(
    vocab_size=1024, width=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=128, ffn_width=512,
    window=128,
)  # fmt: skip
SEQ_LEN = 256


def config(preset, rows, *, fsdp=4, tensor=1, sequence=1, **changes):
    c = default_config()
    c.model.update(preset=preset, dtype="bfloat16", ref_dtype="bfloat16", remat="full")
    c.tokenizer.source = "init"
    c.data.seq_len = SEQ_LEN
    c.data.corpus.web = c.data.clean.good = source("files:*.txt")
    c.mesh.update(data=1, fsdp=fsdp, tensor=tensor, sequence=sequence)
    c.train.batch_size = rows
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "small", SMALL)
    monkeypatch.setitem(presets.PRESETS, "wide", WIDE)


@pytest.fixture
def compiled_text(monkeypatch):
    """The programs compiled so far."""
    texts, read = [], cost.read
    monkeypatch.setattr(cost, "read", lambda hlo: texts.append(hlo) or read(hlo))
    return texts


@pytest.mark.tpu_compiler
@has_compiler
def test_selection_gathers_no_scores(compiled_text):
    plan = aot.compile_step(config("small", 8), "v5e-4")
    n = 8 * SEQ_LEN
    assert (plan.n_chips, plan.tokens) == (4, n)
    assert plan.arguments < plan.peak < plan.chip.memory * aot.GIB
    forward_and_again, backward = 2 * 2, 3 + 4  # products of the attention kernels
    product = 2 * n * SEQ_LEN * SMALL.n_heads * SMALL.head_dim
    assert plan.kernel_flops == SMALL.n_layers * (forward_and_again + backward) * product
    assert "tpu_custom_call" in compiled_text[0]
    assert plan.program.cycles > 0
    assert plan.program.endless == 0
    lines = compiled_text[0].splitlines()
    sent = [line for line in lines if re.search(r" all-gather(-start)?\(", line)]
    assert sent
    whole = rf"(f32|u32|pred)\[({n}|8,{SEQ_LEN}|1,{n}|{n},1)\]"
    assert not [line for line in sent if re.search(whole, line.split("all-gather")[0])]


@pytest.mark.tpu_compiler
@has_compiler
def test_a_live_reference_on_a_tensor_mesh_with_a_window(compiled_text):
    plan = aot.compile_step(config("wide", 4, fsdp=2, tensor=2, **{"score.cached": False}), "v6e-4")
    assert plan.kernel_flops > 0
    forward = 4 * SEQ_LEN * llama.flops_per_token(WIDE, SEQ_LEN)
    assert plan.useful_flops == 4 * forward
    assert "tpu_custom_call" in compiled_text[0]
    assert "all-reduce" in plan.program.traffic
    assert "of 31.25 GiB" in aot.report(plan)


@pytest.mark.tpu_compiler
@has_compiler
def test_of_a_long_row_devices_gather_keys_and_values_alone(compiled_text):
    seq_len, long = 8192, {"data.seq_len": 8192, "loss_chunk_tokens": 2048}
    one = aot.compile_step(config("small", 1, fsdp=1, **long), "v5e-1")
    four = aot.compile_step(config("small", 1, fsdp=1, sequence=4, **long), "v5e-4")
    assert four.temporaries < one.temporaries / 3
    assert four.kernel_flops == one.kernel_flops
    kinds = r"(?:all-gather|all-to-all|collective-permute)(?:-start)?"
    moved = re.findall(rf"= (.*) {kinds}\(", compiled_text[1])
    shapes = [shape.split(",") for kind in moved for shape in re.findall(r"\[([\d,]+)\]", kind)]
    largest = max(math.prod(map(int, shape)) for shape in shapes)
    assert largest == seq_len * SMALL.n_kv_heads * SMALL.head_dim < seq_len * SMALL.width


@pytest.mark.tpu_compiler
@has_compiler
def test_what_does_not_fit_is_one_sentence():
    too_many = config("small", 2**17, fsdp=1, loss_chunk_tokens=2**20)
    with pytest.raises(aot.DoesNotFit, match=r"needs [\d.]+[GT]iB of 15.75GiB a chip; try"):
        aot.compile_step(too_many, "v5e-1")


@pytest.fixture
def two_programs(monkeypatch):
    """Of those around the step, for speed."""
    programs = around.programs

    def two(*args):
        return {name: p for name, p in programs(*args).items() if name in ("save", "heldout")}

    monkeypatch.setattr(around, "programs", two)


@pytest.mark.tpu_compiler
@has_compiler
@pytest.mark.usefixtures("two_programs")
def test_the_peak_of_a_run_is_of_all_its_programs(compiled_text, monkeypatch):
    c = config("small", 8, **{"score.batch_size": 8})
    found = aot.compile_around(c, "v5e-4")
    (save, sent), (heldout, _) = found["save"], found["heldout"]
    assert save.temporaries < save.arguments  # of the largest array's part
    assert sent.keys() == {"all-reduce"}
    assert "all-gather" not in compiled_text[0]
    parameters = heldout.beside / 2
    assert heldout.total > 3 * parameters  # the moments and the parameters
    nothing = cost.Program(0.0, {}, 0, 0)
    plan = aot.Plan(slices.CHIPS["v5e"], 4, 8, 0, 0, 0, 1, 0.0, 0.0, 0.0, nothing, 0.0)
    said = aot.report_around(found, plan).splitlines()
    assert said[-1] == f"peak of the run     {heldout.total / aot.GIB:.3f} of 15.75 GiB, heldout"

    between = (save.total + heldout.total) / 2
    less = slices.CHIPS["v5e"]._replace(memory=between / aot.GIB)
    monkeypatch.setitem(slices.CHIPS, "v5e", less)
    with pytest.raises(aot.DoesNotFit, match=r"program `heldout`, beside .* try score.batch_size"):
        aot.compile_around(config("small", 8, **{"score.batch_size": 8}), "v5e-4")


@pytest.mark.tpu_compiler
@has_compiler
@pytest.mark.parametrize(
    ("name", "chips"),
    [("v5e-1", 1), ("v5e-8", 8), ("v6e-256", 256), ("v4-8", 4), ("v5p-2", 1), ("v5p-8192", 4096)],
)
def test_slices_by_name(name, chips):
    assert len(slices.devices(name)) == chips


@pytest.mark.tpu_compiler
@has_compiler
def test_a_mesh_lies_along_the_sides_of_the_slice():
    with pytest.raises(InputError, match=r"sides of v5p-2048: .* some of \[8, 8, 16\]"):
        aot.compile_step(config("small", 256, fsdp=256, tensor=4), "v5p-2048")


@pytest.mark.parametrize("name", ["v5e-12", "v5e-512", "v4-1", "v5p-4", "v5p", "v6e-x"])
def test_a_slice_that_cannot_be(name):
    with pytest.raises(InputError, match="powers of two"):
        slices.sides(name)


@pytest.mark.parametrize(
    ("name", "sides"),
    [("v5e-1", [1, 1]), ("v5e-8", [2, 4]), ("v6e-256", [16, 16]), ("v4-8", [2, 2, 1]),
     ("v5p-64", [2, 4, 4]), ("v5p-2048", [8, 8, 16])],
)  # fmt: skip
def test_a_slice_is_as_even_a_torus_as_it_can_be(name, sides):
    assert slices.sides(name) == sides


def test_an_unknown_chip():
    with pytest.raises(InputError, match="chip 'v5x' is not known: did you mean v5"):
        slices.sides("v5x-8")


@pytest.fixture
def at_most(monkeypatch):
    """Lets no more rows fit than it is told; keeps those that were tried."""
    tried = []

    def limit(most):
        def compile_step(config, *_):
            tried.append(config.train.batch_size)
            if tried[-1] > most:
                raise aot.DoesNotFit("too large")
            nothing = cost.Program(0.0, {}, 0, 0)
            return aot.Plan(
                slices.CHIPS["v5e"], 4, tried[-1], 0, 0, 0, 0, 0.0, 0.0, 0.0, nothing, 0.0
            )

        monkeypatch.setattr(aot, "compile_step", compile_step)
        monkeypatch.setattr(slices, "devices", lambda _: jax.devices()[:4])
        return tried

    return limit


@pytest.mark.parametrize(("rows", "most"), [(4, 24), (64, 24), (24, 24), (4, 4)])
def test_the_largest_batch_is_found(at_most, rows, most):
    tried = at_most(most)
    assert aot.largest_batch(config("small", rows), "v5e-4").batch_size == most
    assert len(set(tried)) == len(tried) <= 7


def test_nothing_fits(at_most):
    at_most(3)
    with pytest.raises(aot.DoesNotFit):
        aot.largest_batch(config("small", 32), "v5e-4")


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.45G of 15.75G hbm.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (23.45G) exceeds available HBM (15.75G).",
    ],
)
def test_the_compiler_is_understood(said):
    explained = aot._explained(RuntimeError(said), "batch_size=64", "v5e-16", "less")
    said = "batch_size=64 does not fit v5e-16: needs 23.45GiB of 15.75GiB a chip; try less."
    assert str(explained) == said


def test_other_errors_stay_what_they_are():
    error = RuntimeError("INTERNAL: something else")
    assert aot._explained(error, "it", "v5e-16", "less") is error


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--config=configs/mth.py", "--topology=v5e-4"], "configs/mth.py cannot be read"),
        (["--config=configs/math.py", "--config.train.stps=3"], "mean --config.train.steps?"),
        (["--config=configs/math.py:tinylama", "--topology=v5e-4"], "did you mean tinyllama?"),
        (["--config=configs/math.py"], "--topology is missing"),
        (["--config=configs/math.py", "--topology=v5e-4", "--xla=a"], "a has no value"),
        (["--config=configs/math.py", "--topology=v5e-4", "--bath"], "'--bath' is not known"),
    ],
)
def test_a_bad_command_line_is_one_sentence(line, said, capsys):
    assert aot.main(["aot", *line]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
