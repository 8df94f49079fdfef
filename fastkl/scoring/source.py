"""Where a model is: a name in, a folder or a hub id out. Needs neither torch nor transformers, so that a wrong name is
answered at once."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from fastkl.errors import UserError


def resolve_model(name: str, revision: str = "") -> str:
    """The folder or hub id to load: "storyteller" is the embedded model. UserError if a folder lacks what is needed.

    With a revision of a hub id: the folder in the local cache that holds it, configuration and tokenizer for now.
    """
    if (folder := local_model(name, revision)) is not None:
        return folder
    check_hub(name)
    return snapshot(name, revision, weights=False) if revision else name


def local_model(name: str, revision: str = "") -> str | None:
    """The folder of a model on this machine, checked; None for what may be a hub id. UserError for anything else."""
    if revision and (name == "storyteller" or Path(name).expanduser().exists()):
        raise UserError(f"revision: {name!r} is not on the hub, and has no {revision!r}; leave it out.")
    if name == "storyteller":
        from fastkl.storyteller import model_path

        return str(model_path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"model: the folder {name!r} holds no config.json; name a Hugging Face model folder.")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"model: the folder {name!r} holds no .safetensors weights; save it with save_pretrained.")
        return str(folder)
    looks_like_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and " " not in name
    if not looks_like_hub_id or folder.exists():
        raise UserError(
            f"model: there is no model folder {name!r}; name an existing folder, a hub id, or 'storyteller'."
        )
    return None


def snapshot(name: str, revision: str, *, weights: bool) -> str:
    """The folder in the local cache that holds this revision of a hub id, with its weights if asked for."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as failure:  # the library raises many types
        raise UserError(
            f"revision: {name!r} has no {revision!r}, or it cannot be fetched ({first_line(failure)}); name a branch, "
            "a tag or a commit."
        ) from failure


def check_hub(name: str) -> None:
    """UserError, within two seconds, where the hub cannot be reached and the model is not in the local cache.

    A cached model is loaded without asking the hub then, which would retry for half a minute; a note says so, since it
    holds for all that this process loads from now on.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or getproxies():
        return  # the library fails at once, or goes through the proxy
    address = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=2).close()
    except OSError as failure:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise UserError(
                f"model: {name!r} is no folder, and the hub cannot be reached ({failure}); name a folder, or check the "
                "network."
            ) from failure
        constants.HF_HUB_OFFLINE = True
        print(
            f"fastkl: the hub cannot be reached ({failure}); {name!r} is loaded from the local cache, and from now on "
            "this process asks the hub for nothing.",
            file=sys.stderr,
        )


def first_line(failure: BaseException) -> str:
    """The first line of an exception's message, for one-line errors."""
    text = str(failure).strip() or type(failure).__name__
    return text.splitlines()[0][:200]
