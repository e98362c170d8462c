"""Datasets of a Hugging Face hub: which files they have, fetched into the hub's cache."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub

from rho1_jax.data.records import reason
from rho1_jax.errors import InputError

VAL_NAMES = frozenset({"val", "valid", "validation", "test"})  # of splits not trained on


def _place(place: str) -> tuple[str, str, str | None]:
    """Repository, folder and revision."""
    place, _, revision = place.partition("@")
    owner, name, *folders = (place.strip("/") + "/").split("/")
    return f"{owner}/{name}".strip("/"), "/".join(folders).strip("/"), revision or None


def require_files(place: str) -> None:
    """InputError unless a hub's dataset has parquet files; nothing is fetched.

    Offline they must have been fetched before.
    """
    repo, folder, revision = _place(place)
    try:
        names = huggingface_hub.HfApi().list_repo_files(
            repo, repo_type="dataset", revision=revision
        )
    except Exception:  # offline, or said better by who fetches it
        files(place)
        return
    if not any(name.startswith(folder) and name.endswith(".parquet") for name in names):
        raise InputError(f"The hub dataset {repo!r} has no parquet files in {folder or '/'}.")


def files(place: str) -> list[tuple[Path, str | None]]:
    """A hub dataset's parquet files, fetched into the hub's cache."""
    repo, folder, revision = _place(place)
    wanted: Any = {
        "revision": revision,
        "allow_patterns": f"{folder}/*.parquet".lstrip("/"),
    }
    try:
        snapshot = huggingface_hub.snapshot_download(repo, repo_type="dataset", **wanted)
    except Exception as error:
        raise InputError(
            f"The hub dataset {repo!r} cannot be fetched ({reason(error)}): check its name, the "
            "network and HF_ENDPOINT, or fetch it elsewhere and set HF_HUB_OFFLINE=1."
        ) from error
    found = sorted(Path(snapshot, folder).rglob("*.parquet"))
    if not found:
        raise InputError(f"The hub dataset {repo!r} has no parquet files in {folder or '/'}.")
    words = [set(re.split(r"[/_.-]", str(file.relative_to(snapshot)).lower())) for file in found]
    splits = ["train" if VAL_NAMES.isdisjoint(some) else "val" for some in words]
    return [(f, s if "val" in splits else None) for f, s in zip(found, splits, strict=True)]
