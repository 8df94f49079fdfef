"""Sharded weights are read piece by piece: what a process has in memory, and what comes out."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from cases import slow
from several_processes import run_in
from toy import toy_model

from fastkl.scoring import models
from fastkl.scoring.shard import shard
from fastkl.scoring.unread import META, WeightFiles, fill, first_rows, is_unread

CPU = torch.device("cpu")


def saved(folder: Path, files: int = 1, dtype: torch.dtype = torch.float32, **options) -> str:
    """A random model's folder, its weights in about so many files."""
    model = toy_model(0, dtype=dtype, **options)
    model.generation_config.update(do_sample=True, temperature=0.5)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // files + 64)
    return str(folder)


@pytest.mark.parametrize("files", [*slow(1), 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [*slow(torch.float32), torch.bfloat16])
def test_a_model_that_is_filled_is_the_model_that_is_loaded(files, tied, dtype, tmp_path):
    source = saved(tmp_path, files, dtype, tie_word_embeddings=tied)
    one, other = models.load_model(source, CPU), models.load_model(source, META)
    assert is_unread(other) and not any(buffer.is_meta for buffer in other.buffers())
    first = [parameter.detach().flatten()[:20] for parameter in one.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(first, first_rows(other, source, 20), strict=True))
    fill(other, source, CPU)
    assert not is_unread(other)
    for ours, theirs in (
        (one.named_parameters(), other.named_parameters()),
        (one.named_buffers(), other.named_buffers()),
    ):
        pairs = list(zip(ours, theirs, strict=True))
        assert pairs
        for (name, value), (same, found) in pairs:
            assert name == same and value.dtype == found.dtype and torch.equal(value, found)
    assert (other.get_output_embeddings().weight is other.get_input_embeddings().weight) == tied
    ids = torch.arange(9)[None]
    assert torch.equal(one(ids).logits, other(ids).logits) and not other.training
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    assert one.config.to_dict() == other.config.to_dict()


def test_what_is_not_in_the_files_by_its_own_name_is_left_to_transformers(tmp_path):
    from safetensors.torch import load_file, save_file

    source = saved(tmp_path, dtype=torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    assert WeightFiles.of(source).file_of.keys() == weights.keys()
    moved = {name.removeprefix("model."): value for name, value in weights.items()}  # that of the model inside
    save_file(moved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = models.load_model(source, META)
    assert not is_unread(found)
    assert torch.equal(found.model.norm.weight, weights["model.norm.weight"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    from fastkl.errors import UserError

    with pytest.raises(UserError, match="lacks"):  # as for one process
        models.load_model(source, META)


def peak_bytes() -> int:
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def growth(load) -> tuple[int, object]:
    """By how many bytes the largest resident size of this process exceeds what it has now, while `load` runs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = peak_bytes()
    loaded = load()
    return peak_bytes() - before, loaded


def both_ways(tiny: str, source: str) -> tuple[int, int, int, list[str]]:
    """Bytes: of the weights in float32, of the growth with pieces, and of that of a whole load; the names of what
    differs between the two. A tiny model goes first, for which everything is imported."""
    from fastkl.distributed.start import launched
    from fastkl.scoring.pieces import whole
    from fastkl.scoring.scored_model import ScoredModel

    world = launched()

    def pieces(source):
        found = ScoredModel(models.load_model(source, META))
        shard(found, CPU, (world.size,))
        fill(found.model, source, CPU)
        return found

    pieces(tiny), models.load_model(tiny, CPU)
    small, found = growth(lambda: pieces(source))
    large, one = growth(lambda: models.load_model(source, CPU))
    with torch.no_grad():
        own = {name: whole(value) for name, value in found.model.named_parameters()}
    own |= dict(found.model.named_buffers())
    theirs = dict(one.named_parameters()) | dict(one.named_buffers())
    differing = [n for n in own.keys() | theirs if not torch.equal(own[n], theirs[n])]
    size = sum(p.numel() * 4 for p in found.model.parameters())
    return size, small, large, differing


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_no_process_holds_a_whole_model_while_its_pieces_are_read(tied, tmp_path):
    """About 120 MB in float32, from files in bfloat16."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8192}
    source = saved(tmp_path / "model", 2, torch.bfloat16, tie_word_embeddings=tied, **sizes)
    found = run_in(2, tmp_path / "processes", both_ways, saved(tmp_path / "tiny"), source)
    for size, small, large, differing in found:
        print(f"{size / 1e6:.0f} MB of weights: {small / 1e6:.0f} MB with pieces, {large / 1e6:.0f} MB whole")
        assert 100e6 < size < 200e6 and differing == []
        assert small < 0.75 * size < large
