"""The same weights in transformers and here give the same logits, losses, files and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.models import llama, tokenizer
from rho1_jax.models.formats import convert, huggingface, load
from rho1_jax.models.generation import generate
from rho1_jax.slm import losses

torch = pytest.importorskip("torch", reason="PyTorch is the other side of the comparison")
transformers = pytest.importorskip("transformers", reason="its models are the reference")
torch.set_num_threads(1)  # its threads wait for each other longer than they work here

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 32,  # the rope scalings are tried far past it
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# name -> architecture, and what is special about it.
CASES = {
    "llama-1": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "linear": ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama3": ("Llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "yarn": ("Llama", {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2}}),
    "yarn, mscale": (
        "Qwen2",
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


def theirs_of(case: str):
    """A model with weights large enough that a wrong rotation, bias or mask shows."""
    name, special = CASES[case]
    special = {"rope_theta": 500.0, **special}
    config = getattr(transformers, f"{name}Config")(**SHAPE | special)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 264, (2, 140))  # more than a block of attention


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train(["some text to learn from, 12 times"] * 3, 264)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_files(case, tokens, tok, tmp_path):
    """Their folder read here, and ours written and read there: logits equal, weights bitwise."""
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path / "theirs")
    params, config = huggingface.load(tmp_path / "theirs")

    with torch.no_grad():
        batch = torch.tensor(tokens)
        out = theirs(batch, labels=batch)
    expected = out.logits.numpy()
    assert np.std(expected) > 0.5

    @jax.jit
    def ours(params, tokens):
        hidden, head = llama.apply(params, tokens, config=config.computed())
        loss, _ = losses.token_losses(hidden[:, :-1], head, tokens[:, 1:], chunk_tokens=10_000)
        return jnp.einsum("bsd,vd->bsv", hidden, head), loss.mean()

    logits, loss = ours(params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, out.loss.item(), atol=1e-5, rtol=0)

    folder = tmp_path / "ours"
    convert.export(folder, params, config, tok, card="")
    again, same = huggingface.load(folder)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(reopened) is type(theirs)
    assert reopened.dtype == torch.float32
    for name, p in theirs.state_dict().items():
        torch.testing.assert_close(reopened.state_dict()[name], p, rtol=0, atol=0)
    with torch.no_grad():
        np.testing.assert_array_equal(reopened(batch).logits.numpy(), expected)


@pytest.mark.parametrize("case", ["llama-1", "dynamic", "mistral", "smollm3"])
def test_documents_of_a_packed_row_are_each_alone_to_transformers(case, tmp_path):
    """Loss and entropy of every target, the separators between documents too, and the gradient."""
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path / "weights")
    params, config = huggingface.load(tmp_path / "weights")
    rng = np.random.default_rng(2)
    texts = [[0, *rng.integers(1, 264, n), 0] for n in (40, 3, 95, 1)]
    row = jnp.array([[0, *(token for text in texts for token in text[1:])]])
    config = config.computed(separator=0)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(params):
        apply = functools.partial(llama.apply, config=config)
        views = losses.next_token_losses(apply, params, row, chunk_tokens=10_000, entropy=True)
        return views[0].mean(), views

    (_, (loss, entropy)), grads = ours(params)
    expected, uncertain = [], []
    for text in texts:
        ids = torch.tensor([text])
        logits = theirs(ids[:, :-1]).logits[0]
        expected.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        uncertain.append(torch.distributions.Categorical(logits=logits).entropy())
    torch.cat(expected).mean().backward()
    np.testing.assert_allclose(loss[0], torch.cat(expected).detach(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(entropy[0], torch.cat(uncertain).detach(), atol=1e-5, rtol=0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected_grads, _ = huggingface.load(tmp_path / "gradients")
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected_grads)) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected_grads)


@pytest.mark.parametrize("case", ["mistral", "qwen3", "smollm3", "yarn"])
def test_greedy_tokens_of_ragged_prompts(case, tmp_path):
    """As transformers continues each prompt by itself, past the window and the trained length."""
    theirs = theirs_of(case)
    theirs.save_pretrained(tmp_path)
    params, config = huggingface.load(tmp_path)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 264, n).tolist() for n in (3, 25, 11)]
    new = generate.generate(params, config.computed(), prompts, max_new_tokens=21)
    for prompt, ours in zip(prompts, new, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=21, do_sample=False, eos_token_id=None
        )
        assert ours == expected[0, len(prompt) :].tolist()


def sentencepiece_tokenizer(folder):
    """A small SentencePiece BPE model with byte fallback, like Llama's."""
    import sentencepiece

    text = ["Once upon a time there was a model, which read 12 pages of text."] * 40
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "m"), vocab_size=300,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return tokenizer.load(folder / "m.model")


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_auto_tokenizer_opens_the_exported_one(kind, tok, tmp_path):
    ours = tok if kind == "json" else sentencepiece_tokenizer(tmp_path)
    config = llama.LlamaConfig(
        vocab_size=ours.vocab_size, width=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8,
        ffn_width=8,
    )  # fmt: skip
    folder = tmp_path / "out"
    convert.export(folder, llama.init(config, jax.random.key(0)), config, ours, card="")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("some text, 12 times", " once  upon a time\n\n\tthere", "naïve 字 🙂 <|x|>", ""):
        ids = theirs(text).input_ids
        assert ids == ours.encode([text])[0].ids.tolist()
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.separator_id


def test_bfloat16_export_is_bitwise_for_bfloat16_weights(tok, tmp_path):
    theirs = theirs_of("qwen2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    params, config = huggingface.load(tmp_path / "theirs")
    assert params["embed"].dtype == jnp.float32
    convert.export(tmp_path / "ours", params, config, tok, card="", dtype="bfloat16")
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    for name, p in theirs.state_dict().items():
        assert reopened.state_dict()[name].dtype == torch.bfloat16
        torch.testing.assert_close(reopened.state_dict()[name], p, rtol=0, atol=0)


PROMPTS = (
    "The capital of France is", "Once upon a time", "Water boils at", "def fibonacci(n):",
    "The derivative of x^2 is", "In 1969,", "My favourite food", "A triangle has", "Dear Sir,",
    "The opposite of hot is", "Photosynthesis is", "import numpy as np\n", "Q: What is 7 times 8?",
    "The largest planet", "She opened the door and", "To make bread, you need", "E = mc^2 means",
    "The Roman Empire", "Machine learning", "If it rains tomorrow,",
)  # fmt: skip


@pytest.mark.real_data
@pytest.mark.slow
def test_smollm2_continues_twenty_prompts_like_transformers(smollm2_gguf):
    """Both read the same GGUF file; 64 greedy tokens each, ours in one ragged batch."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    params, config, tok = load.load(smollm2_gguf)
    prompts = [encoded.ids.tolist() for encoded in tok.encode(PROMPTS)]
    new = generate.generate(params, config.computed(), prompts, max_new_tokens=64)
    for prompt, ours in zip(prompts, new, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
        assert ours == expected[0, len(prompt) :].tolist()
