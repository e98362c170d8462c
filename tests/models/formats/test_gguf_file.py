import dataclasses

import gguf
import jax
import numpy as np
import pytest

from rho1_jax.errors import InputError
from rho1_jax.models import llama, rotary
from rho1_jax.models.formats import gguf_file, weights
from rho1_jax.models.rotary import RopeScaling, yarn_attention_factor

CONFIG = llama.Architecture(
    vocab_size=24,
    width=12,
    n_layers=2,
    n_heads=3,
    n_kv_heads=1,
    head_dim=8,
    ffn_width=20,
    rope_theta=50_000.0,
    norm_eps=1e-6,
    window=7,
)
NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"} | {
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head in the order 0, h, 1, h+1, ... (h = head_dim / 2), one by one."""
    out = np.empty_like(rows)
    for head in range(0, len(rows), head_dim):
        for i in range(head_dim // 2):
            out[head + 2 * i] = rows[head + i]
            out[head + 2 * i + 1] = rows[head + head_dim // 2 + i]
    return out


def write(path, params, config, *, architecture="llama", drop=(), replace=None, keys=(), kinds=()):
    """The parameters as a GGUF file, by hand. `keys` are metadata, `kinds` quantised tensors."""
    c, writer = config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.ffn_width)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    if c.window is not None:
        writer.add_sliding_window(c.window)
    for key, value in keys:
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{architecture}.{key}", value)
    tensors = {"token_embd": params["embed"], "output_norm": params["final_norm"]}
    if "head" in params:
        tensors["output"] = params["head"]
    reordered = ("q", "k", "q_bias", "k_bias") if architecture in ("llama", "smollm3") else ()
    for ours, arrays in params["layers"].items():
        for i, array in enumerate(arrays):
            rows = interleaved(array.T, c.head_dim) if ours in reordered else array.T
            tensors[f"blk.{i}.{NAMES[ours]}"] = rows
    for name, array in (tensors | (replace or {})).items():
        if name in drop:
            continue
        full = name if name.endswith(".bias") else f"{name}.weight"
        kind = dict(kinds).get(name)
        if array.dtype != np.uint8:  # else these are blocks already
            array = np.ascontiguousarray(array, np.float32)
        if kind is not None and array.dtype != np.uint8:
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(full, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), weights.shapes(config))


@pytest.fixture(scope="module")
def params():
    return random_params(dataclasses.replace(CONFIG, tied_head=False))


@pytest.mark.parametrize(
    ("architecture", "special"),
    [
        ("qwen2", {"qkv_bias": True}),
        ("llama", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "tied_head": False}),
        ("smollm3", {"n_layers": 5, "nope_layers": (3,)}),
    ],
)
def test_other_architectures(architecture, special, tmp_path):
    config = dataclasses.replace(CONFIG, **special)
    expected = random_params(config)
    path = write(tmp_path / "m.gguf", expected, config, architecture=architecture)
    loaded, shape = gguf_file.load(path)
    assert shape == config
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


LINEAR = RopeScaling("linear", 4.0, 2048)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
        ({"rope.scale_linear": 4.0}, LINEAR),
        ({"rope.scale_linear": 1.0, "rope.dimension_count": 8}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 512},
            RopeScaling("yarn", 4.0, 512, high=32.0, attention_factor=yarn_attention_factor(4.0)),
        ),
    ],
)  # fmt: skip
def test_stretched_positions(params, keys, scaling, tmp_path):
    path = write(tmp_path / "m.gguf", params, CONFIG, keys=keys.items())
    assert gguf_file.load(path)[1].rope_scaling == scaling


def test_llama3_factors_become_its_scaling(tmp_path):
    scaling = RopeScaling("llama3", 8.0, 8192)
    config = dataclasses.replace(CONFIG, head_dim=32, rope_theta=500_000.0)
    factors = rotary.frequencies(32, 5e5, None) / rotary.frequencies(32, 5e5, scaling)
    assert 1 < np.sort(factors)[8] < 8  # a plane on the ramp
    params = random_params(config)
    path = write(tmp_path / "m.gguf", params, config, replace={"rope_freqs": factors})
    assert gguf_file.load(path)[1].rope_scaling == scaling
    factors[3] = 2.0
    path = write(tmp_path / "n.gguf", params, config, replace={"rope_freqs": factors})
    with pytest.raises(InputError, match="that are not Llama 3's"):
        gguf_file.load(path)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q4_0", 0.3), ("Q4_1", 0.2), ("Q5_0", 0.15),
     ("Q5_1", 0.1)],
)  # fmt: skip
def test_quantised_tensors(kind, error, tmp_path):
    config = dataclasses.replace(CONFIG, width=32)
    params = random_params(config)
    kinds = dict.fromkeys(("token_embd", "blk.1.ffn_gate"), gguf.GGMLQuantizationType[kind])
    loaded, _ = gguf_file.load(write(tmp_path / "m.gguf", params, config, kinds=kinds.items()))
    for ours, theirs in (
        (loaded["embed"], params["embed"]),
        (loaded["layers"]["gate"][1], params["layers"]["gate"][1]),
    ):
        assert 0 < np.abs(ours - theirs).max() < error
    np.testing.assert_array_equal(loaded["layers"]["up"], params["layers"]["up"])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read_in_their_order(kind, tmp_path):
    """The package cannot write them: blocks of known bytes, of scale 1 (float16 0x3c00)."""
    config = dataclasses.replace(CONFIG, width=256, n_heads=2)
    params = random_params(config)
    quant = gguf.GGMLQuantizationType[kind]
    _, n_bytes = gguf.GGML_QUANT_SIZES[quant]
    blocks = np.random.default_rng(0).integers(0, 60, (24, n_bytes), dtype=np.uint8)
    path = tmp_path / "m.gguf"
    write(path, params, config, kinds=[("token_embd", quant)], replace={"token_embd": blocks})
    loaded, _ = gguf_file.load(path)
    expected = gguf.quants.dequantize(blocks, quant)
    np.testing.assert_array_equal(loaded["embed"], expected)
    assert np.isfinite(expected).all()
    assert np.std(expected) > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_comes_back_as_tree_and_shape(params, tied, tmp_path):
    config = dataclasses.replace(CONFIG, tied_head=tied)
    expected = {k: v for k, v in params.items() if not (tied and k == "head")}
    loaded, shape = gguf_file.load(write(tmp_path / "m.gguf", expected, config))
    assert shape == config
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'"),
        ({"drop": ["blk.1.ffn_up"]}, r"no tensor 'blk\.1\.ffn_up\.weight'"),
        (
            {"replace": {"blk.0.attn_k": np.zeros((7, 12))}},
            r"'blk\.0\.attn_k\.weight' is \(7, 12\) where its metadata asks for \(8, 12\)",
        ),
        ({"keys": [("rope.scaling.type", "longrope")]}, "RoPE scaling of the kind 'longrope'"),
        ({"keys": [("rope.dimension_count", 4)]}, "dimension_count is 4 where heads are 8 wide"),
        ({"keys": [("expert_count", 8)]}, r"llama\.expert_count=8 is not supported"),
        (
            {"replace": {"blk.1.attn_output.bias": np.ones(12)}},
            r"'blk\.1\.attn_output\.bias' has no place",
        ),
    ],
)
def test_other_models_are_refused_in_one_sentence(params, change, message, tmp_path):
    path = write(tmp_path / "m.gguf", params, CONFIG, **change)
    with pytest.raises(InputError, match=message) as error:
        gguf_file.load(path)
    assert str(path) in str(error.value)


def test_damaged_files_are_refused(params, tmp_path):
    whole = write(tmp_path / "m.gguf", params, CONFIG).read_bytes()
    cut = tmp_path / "cut.gguf"
    for n in (0, 3, 30, 500, len(whole) // 2, len(whole) - 64):
        cut.write_bytes(whole[:n])
        with pytest.raises(InputError, match="not a whole GGUF file"):
            gguf_file.load(cut)
    cut.write_bytes(b"PK" + whole[2:])
    with pytest.raises(InputError, match="not a whole GGUF file"):
        gguf_file.load(cut)
    with pytest.raises(InputError, match="There is no file"):
        gguf_file.load(tmp_path / "absent.gguf")


@pytest.mark.real_data
@pytest.mark.slow
def test_smollm2_reads_english_only_with_its_heads_in_order(smollm2_gguf):
    """2.97 nats per token as it should be, 4.97 with q and k left in GGUF's order."""
    from rho1_jax.models import presets, tokenizer

    params, config = gguf_file.load(smollm2_gguf)
    assert config == presets.get("smollm2-135m")
    text = (
        "Four score and seven years ago our fathers brought forth on this continent, a new "
        "nation, conceived in Liberty, and dedicated to the proposition that all men are created "
        "equal."
    )
    ids = tokenizer.load(smollm2_gguf).encode([text])[0].ids

    @jax.jit
    def loss(params):
        hidden, head = llama.apply(params, ids[None, :-1], config=config.computed())
        log_p = jax.nn.log_softmax(hidden[0] @ head.T)
        return -log_p[np.arange(len(ids) - 1), ids[1:]].mean()

    def in_file_order(stack):
        return np.stack([interleaved(layer.T, config.head_dim).T for layer in stack])

    layers = params["layers"]
    wrong = {name: in_file_order(layers[name]) for name in ("q", "k")}
    assert loss(params) < 3.0
    assert loss(params | {"layers": layers | wrong}) > 4.5


@pytest.mark.real_data
@pytest.mark.slow
def test_smollm2_agrees_with_transformers(smollm2_gguf):
    """Weights bit for bit; logits, of up to 35, to the float32 of thirty layers.

    On these tokens transformers is 0.5e-4 and we are 1.7e-4 from its own float64 logits.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is the other side of the comparison")
    transformers = pytest.importorskip("transformers", reason="its model is the reference")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    params, config = gguf_file.load(smollm2_gguf)
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    modules = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "down": "mlp.down_proj"}
    for i in range(config.n_layers):
        for ours, name in modules.items():
            expected = weights[f"model.layers.{i}.{name}.weight"].T
            np.testing.assert_array_equal(params["layers"][ours][i], expected)
    np.testing.assert_array_equal(params["embed"], weights["model.embed_tokens.weight"])

    tokens = np.array([[504, 3575, 282, 260, 1235, 314, 216, 34, 32, 17, 198, 198, 3]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    hidden, head = jax.jit(lambda p, t: llama.apply(p, t, config=config.computed()))(params, tokens)
    error = np.abs(np.asarray(hidden @ head.T) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()
