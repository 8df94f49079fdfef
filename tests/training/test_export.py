"""`fastkl export`: a model folder that loads, without the trainer's state; whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkl import TrainConfig, train
from fastkl.cli import main
from fastkl.scoring.models import load_model, load_tokenizer
from fastkl.scoring.source import resolve_model
from fastkl.training.checkpoint import RandomState, save_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with checkpoints of steps 2 and 4, whose weights differ."""
    folder = tmp_path_factory.mktemp("run")
    source = resolve_model("storyteller")
    model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in (2, 4):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1 + step / 10)
        save_checkpoint(
            folder / "checkpoints", step, policy=model, tokenizer=tokenizer, optimizer=optimizer, state={},
            random=RandomState.now(), config={"model": "storyteller", "kl_coef": 0.2}, keep=0,
        )  # fmt: skip
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize(("options", "step"), [([], 4), (["--step", "2"], 2), (["--step", "best"], 2)])
def test_an_exported_folder_loads_as_the_checkpoints_model_and_tokenizer(run, tmp_path, capsys, options, step) -> None:
    best = run / "checkpoints" / "best"
    if not best.exists():
        best.symlink_to("step-2")
    output = tmp_path / "models" / "mine"
    assert main(["export", str(run), *options, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    ours, theirs = weights(output), weights(run / "checkpoints" / f"step-{step}")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = "Once upon a time there was a bear."
    assert (
        AutoTokenizer.from_pretrained(output)(text)["input_ids"]
        == load_tokenizer(resolve_model("storyteller"))(text)["input_ids"]
    )
    names = {path.name for path in output.iterdir()}
    assert not names & {"trainer.safetensors", "checkpoint.json", "reference.safetensors"}
    card = (output / "README.md").read_text()
    assert f"the model after step {step}." in card and "* kl_coef: `0.2`" in card
    assert [path.name for path in output.parent.iterdir()] == ["mine"], "nothing else is left"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "there"], "'there' exists already"),
        (["--output", "new", "--step", "3"], "has no checkpoint '3'; it has 2, 4"),
        (["--output", "file/new"], "'file/new' cannot be written (Not a directory)"),
        (["--output", "new", "--step", "-1"], "has no checkpoint '-1'"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("file").write_text("")
    assert main(["export", str(run), *words]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["file", "there"]


def test_a_folder_without_a_run_and_a_damaged_checkpoint_are_refused(run, tmp_path, capsys) -> None:
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "new")]) == 2
    assert "holds no checkpoint; name the --output folder of a training run" in capsys.readouterr().err
    weights = run / "checkpoints" / "step-2" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        assert main(["export", str(run), "--step", "2", "--output", str(tmp_path / "new")]) == 2
    finally:
        weights.write_bytes(before)
    assert "is missing or damaged" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_half_of_a_model(run, tmp_path, capsys, monkeypatch) -> None:
    def fail(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("fastkl.training.export.shutil.copyfile", fail)
    assert main(["export", str(run), "--output", str(tmp_path / "new")]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_does_not_answer_costs_one_line_and_keeps_the_model(run, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    output = tmp_path / "new"
    assert main(["export", str(run), "--output", str(output), "--push-to-hub", "me/mine"]) == 2
    message = capsys.readouterr().err
    assert "push_to_hub: 'me/mine' could not be uploaded (" in message and message.count("\n") == 1
    assert f"`hf upload me/mine {output}` tries again" in message
    assert (output / "model.safetensors").is_file()


def test_the_model_is_uploaded_only_when_asked_and_to_a_private_repository(run, tmp_path, monkeypatch) -> None:
    calls: list[tuple[str, object]] = []

    class Hub:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, name: str, **options: object) -> str:
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main(["export", str(run), "--output", str(tmp_path / "one")]) == 0 and calls == []
    assert main(["export", str(run), "--output", str(tmp_path / "two"), "--push-to-hub", "me/mine"]) == 0
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert calls[1] == ("me/mine", sorted(path.name for path in (tmp_path / "two").iterdir()))


@pytest.fixture(scope="module")
def run_with_adapters(tmp_path_factory) -> Path:
    """A run of two steps that has trained adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    train(
        TrainConfig(
            lora_rank=4, lora_alpha=8, lr=1e-2, steps=2, prompts_per_step=1, num_samples=4, max_new_tokens=8,
            generator="transformers", dtype="float32", report_to=(), save_every=0, output=str(folder / "run"),
        )
    )  # fmt: skip
    return folder / "run"


@pytest.mark.slow
def test_adapters_are_exported_as_peft_loads_them_and_merged_they_are_a_model_that_scores_alike(
    run_with_adapters, tmp_path
):
    """Against PEFT's own loading and merging."""
    source = resolve_model("storyteller")
    assert main(["export", str(run_with_adapters), "--output", str(tmp_path / "adapters")]) == 0
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(load_model(source, torch.device("cpu")), tmp_path / "adapters")
    expected = adapted.merge_and_unload().state_dict()
    assert main(["export", str(run_with_adapters), "--merge", "--output", str(tmp_path / "merged")]) == 0
    assert not list((tmp_path / "merged").glob("adapter*"))
    found, base = weights(tmp_path / "merged"), weights(Path(source))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        # rounded once to the storyteller's float16; a last bit may flip between two orders of the float32 sum
        torch.testing.assert_close(weight, expected[name].half().float(), rtol=2**-10, atol=1e-7)
    assert sum(not torch.equal(found[name], base[name]) for name in found) > 10
    AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_a_run_without_adapters_has_nothing_to_merge(run, tmp_path, capsys):
    assert main(["export", str(run), "--merge", "--output", str(tmp_path / "out")]) == 2
    assert "has no adapters to merge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_goes_by_the_index_loads_the_model_and_nothing_of_the_trainer(run):
    """vLLM takes every .safetensors file of a folder for weights, unless an index names those that are."""
    loader = pytest.importorskip("vllm.model_executor.model_loader.weight_utils")
    folder = run / "checkpoints" / "step-4"
    files = sorted(map(str, folder.glob("*.safetensors")))
    assert [Path(file).name for file in files] == ["model.safetensors", "trainer.safetensors"]
    chosen = loader.filter_duplicate_safetensors_files(files, str(folder), "model.safetensors.index.json")
    assert [Path(file).name for file in chosen] == ["model.safetensors"]
