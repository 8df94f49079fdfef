"""checkpoint.json, what a checkpoint says of itself: read, and held against its checksum.

Loads nothing heavy, since the command line asks it for a run's settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkl.errors import UserError

FORMAT = 2

MANIFEST = "checkpoint.json"

KEYS = {"step": int, "files": dict, "config": dict}  # what every manifest has

REMEDY = "delete that folder to continue from the one before it, or start a new run with another --output"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, without its checksum. UserError where it is none of fastkl's, or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not all(isinstance(manifest[name], kind) for name, kind in KEYS.items()):
            raise TypeError
        known = manifest["format"] in (1, FORMAT)  # 1: without a checksum
        intact = manifest["format"] == 1 or manifest.pop("checksum") == checksum(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as failure:
        message = f"resume: {str(folder)!r} is not a checkpoint of fastkl (no readable {MANIFEST}); {REMEDY}."
        raise UserError(message) from failure
    if not known:
        raise UserError(f"resume: {str(folder)!r} has checkpoint format {manifest['format']}, not {FORMAT}; {REMEDY}.")
    if not intact:
        raise UserError(f"resume: the checkpoint file {str(folder / MANIFEST)!r} is damaged; {REMEDY}.")
    return manifest


def checksum(manifest: Mapping[str, Any]) -> str:
    """Of everything in the manifest but the checksum itself."""
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
