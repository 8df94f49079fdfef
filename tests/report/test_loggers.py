"""The run log: what reaches the files, what a resumed run drops, and what happens when the disk or a tracker fails."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastkl.errors import UserError
from fastkl.report import loggers
from fastkl.report.loggers import RunLog, check_report_to, drop_later_steps


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample(text: str = "a big bear") -> dict[str, Any]:
    return {"prompt": "Once upon a time", "completion": text, "reward": 1.0, "kl": 0.25}


def log_steps(folder: Path, steps: range, report_to: tuple[str, ...] = (), resume_step: int | None = None) -> None:
    with RunLog(folder, report_to, {"kl_coef": 0.5}, resume_step) as log:
        for step in steps:
            log.log({"step": step, "reward/raw": step / 4}, [sample(f"story {step}"), sample()])


def test_every_step_is_on_disk_before_log_returns(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "run", (), {}, None)
    log.log({"step": 1, "reward/raw": 0.5}, [sample("first"), sample("second")])
    assert read_lines(tmp_path / "new" / "run" / "metrics.jsonl") == [{"step": 1, "reward/raw": 0.5}]
    samples = read_lines(tmp_path / "new" / "run" / "samples.jsonl")
    assert [(row["step"], row["completion"]) for row in samples] == [(1, "first"), (1, "second")]


def test_lines_are_strict_json_with_null_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with RunLog(tmp_path, (), {}, None) as log:
        log.log({"step": 1, "loss": math.nan, "kl/mean": -math.inf, "lr": 1e-4}, [sample("né\n\ud800 \U0001f43b")])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "kl/mean": None, "lr": 1e-4}
    assert read_lines(tmp_path / "samples.jsonl")[0]["completion"] == "né\n? \U0001f43b"


def test_resume_keeps_exactly_the_steps_up_to_the_checkpoint(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/ra')  # killed while writing
    log_steps(tmp_path, range(5, 7), resume_step=4)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_lines(tmp_path / "samples.jsonl")] == sorted([1, 2, 3, 4, 5, 6] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_half_written_line_goes_even_if_its_step_is_early_enough(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # complete JSON, but no end of line: a longer line was on its way
    drop_later_steps(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_digests_are_those_of_the_lines_across_a_resume_and_of_no_others(tmp_path: Path) -> None:
    def digests(folder: Path, steps: range, resume_step: int | None) -> dict[str, str]:
        with RunLog(folder, (), {}, resume_step) as log:
            for step in steps:
                log.log({"step": step, "reward/raw": step / 4}, [sample(f"story {step}")])
            return log.digests()

    whole = digests(tmp_path / "whole", range(1, 7), None)
    assert whole == {
        name: hashlib.blake2b((tmp_path / "whole" / name).read_bytes(), digest_size=16).hexdigest()
        for name in ("metrics.jsonl", "samples.jsonl")
    }
    claimed = digests(tmp_path / "parts", range(1, 5), None)
    with (tmp_path / "parts" / "samples.jsonl").open("a") as file:
        file.write('{"step": 5, "comp')  # later lines, whole or not, are dropped
    assert digests(tmp_path / "parts", range(0), 4) == claimed
    assert digests(tmp_path / "parts", range(5, 7), 4) == whole
    path = tmp_path / "parts" / "samples.jsonl"
    path.write_text(path.read_text().replace("story 2", "story 3"))
    changed = digests(tmp_path / "parts", range(0), 4)
    assert changed["metrics.jsonl"] == claimed["metrics.jsonl"]
    assert changed["samples.jsonl"] != claimed["samples.jsonl"]


def test_a_new_run_refuses_a_folder_that_holds_one(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 3))
    with pytest.raises(UserError, match="--resume"):
        RunLog(tmp_path, (), {}, None)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


class FullDisk:
    """Stands for a file on a full disk: half of the bytes arrive, then the write fails."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab", buffering=0)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_reported_once_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[str] = []
    log = RunLog(tmp_path, ("tensorboard",), {}, None, report_problem=problems.append)
    log.log({"step": 1}, [sample()])
    with monkeypatch.context() as patch:
        patch.setattr(loggers.Path, "open", lambda path, mode: FullDisk(_real(path)))
        for step in (2, 3, 4):
            log.log({"step": step}, [sample()])
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1]  # whole lines only
    assert len(problems) == 2 and all("No space left" in problem for problem in problems)  # one for each file
    log.log({"step": 5}, [sample()])
    log.close()
    for name in ("metrics", "samples"):
        assert [row["step"] for row in read_lines(tmp_path / f"{name}.jsonl")] == [1, 2, 3, 4, 5]
    assert problems[2:] == [
        "logging to metrics.jsonl works again.",
        "logging to samples.jsonl works again.",
    ]


class _real(type(Path())):  # type: ignore[misc]
    """A path whose `open` is the system's, whatever the test has put on Path."""

    open = Path.open


def test_a_folder_that_vanishes_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    log = RunLog(folder, (), {}, None)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    log.log({"step": 1}, [sample()])
    log.log({"step": 2}, [])
    assert capsys.readouterr().err.count("Training goes on") == 2


def test_an_unusable_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunLog(tmp_path / "file" / "run", (), {}, None)


def test_tensorboard_holds_scalars_and_text_and_hides_dropped_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path, range(1, 6), ("tensorboard",))
    log_steps(tmp_path, range(4, 7), ("tensorboard",), resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("reward/raw")]
    assert scalars == [(step, step / 4) for step in range(1, 7)]
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")}
    assert sorted(texts) == [1, 2, 3, 4, 5, 6]
    assert "| Once upon a time | story 6 | 1.000 | 0.250 |" in texts[6]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # makes `import name` raise ImportError
    with pytest.raises(UserError, match=f"pip install {name}"):
        check_report_to([name])
    with pytest.raises(UserError, match="choose from tensorboard, wandb, trackio"):
        check_report_to(["mlflow"])


class FakeTracker(ModuleType):
    """W&B's and trackio's calls, as a record. `init` takes exactly the keywords that both real ones have in common."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0
        self.broken = False

    def init(self, *, project: str, name: str, config: dict, resume: str, **more: Any) -> FakeTracker:
        assert set(more) <= ({"id", "dir"} if self.__name__ == "wandb" else set())
        self.inits.append({"project": project, "name": name, "config": config, "resume": resume, **more})
        return self

    def Table(self, *, columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data

    def log(self, data: dict[str, Any], step: int) -> None:
        if self.broken:
            raise ConnectionError("gone")
        self.logged.append((data, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_metrics_a_table_and_the_same_run_on_resume(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    folder = tmp_path / "alliteration"
    log_steps(folder, range(1, 3), (name,))
    log_steps(folder, range(3, 4), (name,), resume_step=2)
    first, second = fake.inits
    assert (first["project"], first["name"], first["config"]) == ("fastkl", "alliteration", {"kl_coef": 0.5})
    assert (first["resume"], second["resume"]) == ("never", "allow")
    assert first.get("id") == second.get("id") and (name == "trackio" or len(first["id"]) == 12)
    assert [step for _, step in fake.logged] == [1, 2, 3]
    data = fake.logged[0][0]
    assert data["reward/raw"] == 0.25
    columns, rows = data["samples"]
    assert columns == ["prompt", "completion", "reward", "kl"]
    assert rows[0] == ["Once upon a time", "story 1", 1.0, 0.25]
    assert fake.finished == 2


def test_trackers_get_completions_of_several_prompts_with_roles_answers_and_each_reward(tmp_path, monkeypatch) -> None:
    fake = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    samples = [
        {
            "prompt": f"<|im_start|>user\n{b}<|im_end|>",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {b}?"}],
            "columns": {"answer": b, "parts": [b, math.nan]},
            "completion": f"{b}, sample {k}",
            "reward": 1.0 * b,
            "rewards": {"correct": 1.0 * b, "format": None},
            "extra": {"parsed": f"<{b}>"},
            "kl": 0.5,
        }
        for b in range(4)
        for k in range(6)
    ]
    with RunLog(tmp_path, ("wandb",), {}, None) as log:
        log.log({"step": 1}, samples)
    columns, rows = fake.logged[0][0]["samples"]
    names = ["prompt", "completion", "answer", "parts", "reward", "reward/correct", "reward/format", "parsed", "kl"]
    assert columns == names and len(rows) == loggers.TEXT_SAMPLES == 8
    assert [row[1] for row in rows] == [f"{b}, sample {k}" for b in range(4) for k in (0, 3)]
    last = ["system: Be brief.\n\nuser: What is 3?", "3, sample 3", 3, "[3, null]", 3.0, 3.0, None, "<3>", 0.5]
    assert rows[-1] == last


def test_whatever_a_data_set_holds_becomes_json(tmp_path: Path) -> None:
    import datetime

    columns = {"day": datetime.date(2026, 1, 2), "deep": {"x": [math.inf, (1, b"\x00")]}, 3: None}
    with RunLog(tmp_path, (), {}, None) as log:
        log.log({"step": 1}, [sample() | {"columns": columns}])
    (row,) = read_lines(tmp_path / "samples.jsonl")
    assert row["columns"] == {"day": "2026-01-02", "deep": {"x": [None, [1, "b'\\x00'"]]}, "3": None}


def test_a_tracker_that_breaks_is_dropped_and_the_files_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    problems: list[str] = []
    with RunLog(tmp_path, ("wandb",), {}, None, report_problem=problems.append) as log:
        fake.broken = True
        for step in (1, 2, 3):
            log.log({"step": step}, [sample()])
    assert problems == ["cannot log to wandb: gone. Training goes on."]
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_tracker_that_does_not_start_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker("wandb")
    monkeypatch.setattr(fake, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no API key")))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match="wandb did not start .no API key"):
        RunLog(tmp_path, ("wandb",), {}, None)
