"""`fastkl score`: the numbers are the models' own, a killed run continues to the byte, and mistakes name their line."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from toy import STOP, VOCAB, toy_model

from fastkl.cli import main
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.score_files import command, read
from fastkl.score_files.command import ScoreConfig, Scorer, record_of, score_file
from fastkl.score_files.progress import ScoreView
from fastkl.score_files.read import read_windows, sampling_of
from fastkl.score_files.write import to_line
from fastkl.scoring import backbone

BOS = 21


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """policy/ and reference/: models with a context of 64 tokens, whose words are w0, w1, ... and whose tokenizer puts
    w21 before every text and knows chats."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single=f"w{BOS} $A", special_tokens=[(f"w{BOS}", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", eos_token=f"w{STOP}")
    tokenizer.chat_template = "{% for m in messages %}w20 {{ m.content }} {% endfor %}w19"
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("policy", "reference")):
        toy_model(seed).float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Models are loaded once for the file."""
    patch = pytest.MonkeyPatch()
    patch.setattr(command.models, "load_model", cache(command.models.load_model))
    yield
    patch.undo()


@pytest.fixture
def run(models, tmp_path, capsys):
    """Writes lines (objects, or text as it is) and scores them; returns (exit code, records, standard error)."""

    def run_(lines: list, *options: str, reference: bool = True) -> tuple[int, list[dict], str]:
        path = tmp_path / "in.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        references = ("--reference", str(models / "reference")) if reference else ()
        dtype = ("--dtype", "float32")  # "auto" is bfloat16 on processors that are fast at it
        code = main(["score", "--model", str(models / "policy"), *references, str(path), *dtype, *options])
        output, found = tmp_path / "in.scores.jsonl", []
        if output.exists():
            found = [json.loads(line) for line in output.read_text().splitlines()[1:]]
            output.unlink()
        return code, found, capsys.readouterr().err

    return run_


def own_log_probs(name: Path, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log p(v) before each token of the completion, [T, V] in float64: the model's own forward, nothing of fastkl's."""
    from transformers import AutoModelForCausalLM

    model = _double(name, AutoModelForCausalLM)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


@cache
def _double(name: Path, kind: type) -> torch.nn.Module:
    return kind.from_pretrained(name, dtype=torch.float32).double().eval()


def check_full(record: dict, models: Path, prompt: list[int], completion: list[int], temperature: float = 1.0) -> None:
    p, q = (own_log_probs(models / name, prompt, completion, temperature) for name in ("policy", "reference"))
    picked = torch.arange(len(completion)), torch.tensor(completion)
    expected = {
        "policy_logprobs": p[picked],
        "ref_logprobs": q[picked],
        "entropy": -(p.exp() * p).sum(1),
        "kl": (p.exp() * (p - q)).sum(1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(record[name]).double(), values, rtol=0, atol=2e-5, msg=name)
        assert math.isclose(record["sums"][name], math.fsum(record[name]), rel_tol=1e-8, abs_tol=1e-8)
    assert record["token_ids"] == completion and record["num_tokens"] == len(completion)


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_text_and_token_ids_score_as_the_models_own_logits_do(run, models):
    lines = [
        {"prompt": "w1 w2 w3", "completion": "w4 w5 w6 w22", "id": "first", "reward": 3.5},
        {"prompt": [1, 2, 3], "completion": [4, 5, 6, 7, 8, 9, 10], "id": 7},
        {"prompt": "w1", "prompt_token_ids": [9, 9], "completion": "w5", "token_ids": [4]},
        {"prompt": "w1 w2", "sampled_token_ids": [4, 5], "sampling": {"temperature": 0.5, "seed": 3, "n": 8}},
    ]
    code, records, error = run(lines)
    assert code == 0 and "4 lines, 14 tokens" in error
    check_full(records[0], models, [BOS, 1, 2, 3], [4, 5, 6, 22])  # special tokens before the prompt only
    check_full(records[1], models, [1, 2, 3], [4, 5, 6, 7, 8, 9, 10])
    check_full(records[2], models, [9, 9], [4])
    check_full(records[3], models, [BOS, 1, 2], [4, 5], temperature=0.5)
    assert [(r["line"], r.get("id")) for r in records] == [(1, "first"), (2, 7), (3, None), (4, None)]
    assert not any("support" in name for r in records for name in r)


def test_bfloat16_is_checked_before_it_scores_and_differs_by_its_rounding(run, models, monkeypatch):
    checked, choose = [], backbone.choose_layout
    monkeypatch.setattr(
        backbone,
        "choose_layout",
        lambda model, batch, dtype, **rest: checked.append(dtype) or choose(model, batch, dtype, **rest),
    )
    line = {"prompt": [1, 2, 3], "completion": [4, 5, 6, 7, 8, 9, 10]}
    exact, rounded = run([line])[1][0], run([line], "--dtype", "bfloat16")[1][0]
    assert checked[-2:] == [torch.bfloat16] * 2  # policy and reference; in float32 earlier tests may have seen them
    for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
        gap = (torch.tensor(rounded[name]) - torch.tensor(exact[name])).abs().max()
        assert 0 < gap < 0.1, name


def test_storyteller_end_to_end_with_its_own_tokenizer(tmp_path, capsys):
    from transformers import AutoTokenizer

    from fastkl.storyteller import model_path

    (tmp_path / "s.jsonl").write_text('{"prompt": "Once upon a time", "completion": ", a brave bear ran."}\n' * 3)
    path = str(tmp_path / "s.jsonl")
    assert main(["score", "--model", "storyteller", path, "--output", "-", "--dtype", "float32"]) == 0
    header, *records = map(json.loads, capsys.readouterr().out.splitlines())
    assert header["settings"]["model"] == "storyteller" and len(records) == 3
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    prompt = tokenizer("Once upon a time").input_ids
    completion = tokenizer(", a brave bear ran.", add_special_tokens=False).input_ids
    p = own_log_probs(model_path(), prompt, completion)
    for record in records:
        assert record["token_ids"] == completion and "kl" not in record and "ref_logprobs" not in record
        ours = torch.tensor(record["policy_logprobs"]).double()
        torch.testing.assert_close(ours, p[range(len(completion)), completion], rtol=0, atol=1e-4)


SAMPLINGS = [
    {"top_k": 3},
    {"top_p": 0.6, "temperature": 0.8},
    {"min_p": 0.2},
    {"min_tokens": 2},
    {"min_tokens": 3, "stop_token_ids": [6]},
    {"banned_token_ids": [4, 5]},
    {"allowed_token_ids": [3, 4, 5, 6, 7, 8, 22]},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.01, "min_tokens": 1, "banned_token_ids": [7], "temperature": 1.5},
    {"top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 9, "logprobs": 0},
]


def allowed_ids(log_p: list[float], position: int, target: int | None, sampling: dict) -> list[int]:
    """What the sampler could draw, one id at a time: bans, then min_p, top_k, top_p, each of what the last one left."""
    stops = {STOP, *sampling.get("stop_token_ids", ())}
    kept = {v for v in range(VOCAB) if v not in sampling.get("banned_token_ids", ())}
    kept &= set(sampling.get("allowed_token_ids") or range(VOCAB))
    kept -= stops if position < sampling.get("min_tokens", 0) else set()
    best = max(log_p[v] for v in kept)
    kept = {v for v in kept if math.exp(log_p[v] - best) >= sampling.get("min_p", 0.0)}
    ranked = sorted(kept, key=lambda v: -log_p[v])
    if sampling.get("top_k", 0) > 0:
        ranked = ranked[: sampling["top_k"]]
    mass, total, nucleus = 0.0, sum(math.exp(log_p[v]) for v in ranked), []
    for v in ranked:
        if mass / total < sampling.get("top_p", 1.0):
            nucleus.append(v)
        mass += math.exp(log_p[v])
    return sorted({*nucleus, *([] if target is None else [target])})


def test_supports_are_those_of_the_sampler_and_may_differ_from_line_to_line(run, models):
    """All lines have one length, so that one forward scores them all."""
    completion = [4, 7, 22, 6, 5]
    lines = [{"prompt": [1, 2, 3], "completion": completion, "sampling": sampling} for sampling in SAMPLINGS]
    code, records, err = run(lines)
    assert code == 0
    for record, sampling in zip(records, SAMPLINGS, strict=True):
        temperature = sampling.get("temperature", 1.0)
        check_full(record, models, [1, 2, 3], completion, temperature)
        p, q = (own_log_probs(models / name, [1, 2, 3], completion, temperature) for name in ("policy", "reference"))
        if sampling is SAMPLINGS[-1]:  # nothing is left out
            assert "policy_logprobs_support" not in record
            continue
        for t, target in enumerate(completion):
            kept = allowed_ids(p[t].tolist(), t, target, sampling)
            p_s, q_s = (x[t, kept].log_softmax(0) for x in (p, q))
            place = kept.index(target)
            assert record["policy_logprobs_support"][t] == pytest.approx(float(p_s[place]), abs=2e-5), (sampling, t)
            assert record["ref_logprobs_support"][t] == pytest.approx(float(q_s[place]), abs=2e-5), (sampling, t)
            kl = float((p_s.exp() * (p_s - q_s)).sum())
            assert record["kl_support"][t] == pytest.approx(kl, abs=2e-5), (sampling, t)
            alone = allowed_ids(p[t].tolist(), t, None, sampling)
            assert record["outside_support"][t] == float(target not in alone), (sampling, t)
    outside = sum(record["sums"].get("outside_support", 0) for record in records)
    assert 0 < outside < 40 and f"outside_support: {outside:.0f} of the tokens" in err


def test_an_infinite_score_is_null_in_its_list_and_in_the_sum():
    job = SimpleNamespace(mask=None, completion=(4, 5), number=3, id=None)
    line = record_of(job, {"kl": [0.25, math.inf], "policy_logprobs": [-0.5, -1.0]})
    assert line["kl"] == [0.25, None] and line["sums"] == {"kl": None, "policy_logprobs": -1.5}
    assert b"null" in to_line(line)


def test_options_settings_lines_and_lines_override_one_another(run, models):
    """As the doctor's files have it: settings hold for the lines below them."""
    line = {"prompt": [1, 2, 3], "token_ids": [4, 7, 5], "logprobs": [0, 0, 0], "step": 1}
    lines = [
        line,
        {"settings": {"top_k": 3, "eos_token_ids": [4], "temperature": None}},
        line,
        {"settings": {"min_tokens": 1}},
        line,
        line | {"sampling": {"top_k": 0, "min_tokens": 0, "temperature": 2.0}},
    ]
    _, records, _ = run(lines, "--top_p=0.5")
    samplings = [
        {"top_p": 0.5},
        {"top_p": 0.5, "top_k": 3},
        {"top_p": 0.5, "top_k": 3, "min_tokens": 1, "stop_token_ids": [4]},
        {"top_p": 0.5, "temperature": 2.0},
    ]
    assert [r["line"] for r in records] == [1, 3, 5, 6]
    for record, sampling in zip(records, samplings, strict=True):
        p = own_log_probs(models / "policy", [1, 2, 3], [4, 7, 5], sampling.get("temperature", 1.0))
        kept = [allowed_ids(p[t].tolist(), t, y, sampling) for t, y in enumerate([4, 7, 5])]
        expected = [float(p[t, y] - p[t, kept[t]].logsumexp(0)) for t, y in enumerate([4, 7, 5])]
        assert record["policy_logprobs_support"] == pytest.approx(expected, abs=2e-5)


def test_settings_in_a_line_are_that_lines_own_and_the_line_is_scored(run):
    line = {"prompt": [1, 2, 3], "token_ids": [4, 7, 5], "logprobs": [0, 0, 0]}
    own = {"temperature": 0.5, "top_k": 3}
    _, records, _ = run([line | {"settings": own}, line, line | {"sampling": own}])
    scores = [(r["line"], r["policy_logprobs"], "policy_logprobs_support" in r) for r in records]
    assert [number for number, *_ in scores] == [1, 2, 3]
    assert scores[0][1:] == scores[2][1:] != scores[1][1:] and [kept for *_, kept in scores] == [True, False, True]


def test_masked_tokens_count_nowhere(run):
    whole, masked = run([
        {"prompt": [1], "completion": [4, 5, 6, 7]},
        {"prompt": [1], "completion": [4, 5, 6, 7], "mask": [1, 0, 0, True]},
    ])[1]  # fmt: skip
    for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
        a, _, _, d = whole[name]
        assert masked[name] == pytest.approx([a, 0, 0, d], abs=1e-6)
        assert masked["sums"][name] == pytest.approx(a + d, abs=1e-6)


def test_chats_go_through_the_template_without_further_special_tokens(run, models):
    chat = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
    ]
    code, records, _ = run([{"prompt": chat, "completion": "w5 w6"}])
    assert code == 0
    check_full(records[0], models, [20, 1, 2, 20, 3, 20, 4, 19], [5, 6])


def test_batches_change_nothing_and_numbers_keep_every_bit(run):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 20, (12, 2), generator=generator).tolist()
    lines = [{"prompt": list(range(1, p + 1)), "completion": list(range(c, 0, -1))} for p, c in sizes]
    small, large = (run(lines, "--batch-tokens", n)[1] for n in ("1", "100000"))
    for a, b in zip(small, large, strict=True):
        for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
            assert a[name] == pytest.approx(b[name], abs=2e-6)
            assert [float(f"{x:.9g}") for x in torch.tensor(a[name]).tolist()] == a[name]  # they are float32


# ----------------------------------------------------------------------------------------------- streaming and resuming


def rows(count: int) -> list[dict]:
    return [{"prompt": [1, 2][: 1 + i % 2], "completion": list(range(3, 4 + i % 7))} for i in range(count)]


def written(path: Path, lines: list) -> None:
    path.write_text("".join(json.dumps(line) + "\n" if line else "\n" for line in lines))


def test_the_reader_never_reads_past_one_window_however_long_the_file():
    taken = 0

    def endless(size: int) -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b'{"prompt": "' + b"x" * size + b'"}\n'

    windows = read_windows(endless(100))
    for n in range(1, 200):
        window = next(windows)
        assert len(window.rows) == read.WINDOW_LINES and taken == n * read.WINDOW_LINES
        assert window.rows[-1].number == taken and window.end_bytes - window.start_bytes < 2 * read.WINDOW_BYTES
    long_lines = next(read_windows(endless(read.WINDOW_BYTES // 3)))
    assert len(long_lines.rows) == 3


def test_a_window_is_written_before_the_next_is_read(models, tmp_path, monkeypatch):
    """So what is in memory, and what a kill costs, is one window."""
    monkeypatch.setattr(read, "WINDOW_LINES", 4)
    output, ahead = tmp_path / "out.jsonl", []

    def watched(lines):
        for window in read_windows(lines):
            on_disk = output.read_bytes().count(b"\n") - 1
            ahead.append(window.rows[-1].number - on_disk)
            yield window

    monkeypatch.setattr(command, "read_windows", watched)
    written(tmp_path / "in.jsonl", rows(18))
    score_file(ScoreConfig(str(tmp_path / "in.jsonl"), str(models / "policy"), output=str(output)))
    assert ahead == [4, 4, 4, 4, 2]


@pytest.fixture
def resumable(models, tmp_path, monkeypatch):
    """(input, output, the uninterrupted output's bytes, a function that continues the output)."""
    monkeypatch.setattr(read, "WINDOW_LINES", 4)
    path, output = tmp_path / "in.jsonl", tmp_path / "in.scores.jsonl"
    lines = rows(9)
    lines[2:2] = [None, {"settings": {"top_k": 5}}]
    lines[6] = {"prompt": "w1"}  # without a completion
    written(path, [*lines, {"settings": {"top_k": 9}}])

    def go_on(**changes) -> int:
        names = {"reference": str(models / "reference"), "skip_malformed": True, "batch_tokens": 24} | changes
        return score_file(ScoreConfig(str(path), str(models / "policy"), **names))

    assert go_on() == 9
    return path, output, output.read_bytes(), go_on


@pytest.mark.slow
def test_a_run_killed_at_any_byte_continues_to_the_same_bytes(resumable):
    path, output, whole, go_on = resumable
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    cuts = sorted({*range(0, len(whole), 97), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])})
    scored = {}
    for cut in cuts:
        output.write_bytes(whole[:cut])
        scored[cut] = go_on(resume=True)
        assert output.read_bytes() == whole, cut
    lines_whole = [sum(end <= cut for end in ends) - 1 for cut in cuts]
    expected = [9 if n < 4 else 5 if n < 8 else 1 if n < 9 else 0 for n in lines_whole]
    assert list(scored.values()) == expected  # whole windows are not scored again


def test_an_interrupted_run_leaves_whole_windows_and_a_longer_input_is_continued(resumable, monkeypatch):
    path, output, whole, go_on = resumable
    output.unlink()
    calls = []

    def interrupted(self, jobs, view):
        calls.append(jobs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_jobs(self, jobs, view)

    score_jobs = Scorer.score
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go_on()
    assert output.read_bytes() == b"".join(whole.splitlines(keepends=True)[:5])
    assert go_on(resume=True) == 5
    with path.open("a") as file:
        file.write('{"prompt": [1], "completion": [2]}\n')
    assert go_on(resume=True) == 2  # the last window has become longer: it is scored again
    continued = output.read_bytes()
    output.unlink()
    go_on()
    assert output.read_bytes() == continued


def test_resuming_something_else_is_refused(resumable, models):
    path, output, whole, go_on = resumable
    for changes, words in (
        ({"reference": None}, "reference: None, but"),
        ({"batch_tokens": 25}, "batch_tokens: 25, but"),
        ({"shared": TrainConfig(top_k=7)}, "top_k: 7, but"),
    ):
        with pytest.raises(UserError, match=words):
            go_on(resume=True, **changes)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("\n" + "".join(lines))
    with pytest.raises(UserError, match="where line 2 of the input belongs"):
        go_on(resume=True)
    path.write_text("".join(lines[:3]))
    with pytest.raises(UserError, match="more lines than the input"):
        go_on(resume=True)
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        go_on()
    assert output.read_bytes() == whole
    output.write_text('{"prompt": "something"}\n')
    with pytest.raises(UserError, match="was not written by `fastkl score`"):
        go_on(resume=True)
    with pytest.raises(UserError, match="exists; continue"):
        go_on()


def test_a_file_that_failed_at_its_first_window_is_begun_anew(run, tmp_path):
    output = tmp_path / "other.jsonl"
    for lines, code in ((["nonsense"], 2), (rows(2), 0)):
        assert run(lines, "--output", str(output))[0] == code
    assert output.read_bytes().count(b"\n") == 3


# ------------------------------------------------------------------------------------------------------------ bad input

MALFORMED = [
    ('{"prompt": ', "it is not JSON"),
    ("[1, 2]", "it is not a JSON object"),
    ({"completion": "w1"}, "it has none of 'prompt_token_ids', 'prompt' (its fields: 'completion')"),
    ({"prompt": "w1", "text": "w2"}, "it has none of 'token_ids', 'sampled_token_ids', 'completion'"),
    ({"prompt": {"a": 1}, "completion": "w1"}, "its prompt is not a text, chat messages or token ids"),
    ({"prompt": "w1", "completion": [{"role": "assistant", "content": "w2"}]}, "its completion is not a text or token"),
    ({"prompt": "w1", "completion": [1, 2.5]}, "its completion is not a text or token ids"),
    ('{"prompt": "w1", "completion": "\\ud800"}', "half of a surrogate pair"),
    ({"prompt": [], "completion": "w1"}, "the prompt has no token"),
    ({"prompt": "w1", "completion": " "}, "the completion has no token"),
    ({"prompt": "w1", "completion": "w2 " * 63}, "65 tokens, the model's context has 64"),
    ({"prompt": [1, 23], "completion": "w2"}, "the token id 23 is not in the model's vocabulary, 0 to 22"),
    ({"prompt": "w1", "completion": [-1]}, "the token id -1 is not"),
    ({"prompt": "w1", "completion": "w2 w3", "mask": [1]}, "a 0 or 1 for each of the completion's 2 tokens"),
    ({"prompt": "w1", "completion": "w2", "mask": [2]}, "a 0 or 1 for each of the completion's 1 tokens"),
    ({"prompt": "w1", "completion": "w2", "id": 0.5}, "its id is neither"),
    ({"prompt": "w1", "completion": "w2", "sampling": [1]}, "its sampling is not an object"),
    ({"prompt": "w1", "completion": "w2", "settings": "v2"}, "its settings is not an object"),
    ({"prompt": "w1", "completion": "w2", "sampling": {"repetition_penalty": 1.2}}, "repetition_penalty: 1.2 cannot"),
    ({"prompt": "w1", "completion": "w2", "sampling": {"topk": 5}}, "topk: 5 cannot be scored (nobody has looked"),
    ({"prompt": "w1", "completion": "w2", "sampling": {"temperature": 0}}, "temperature: 0.0 is out of range"),
    ({"prompt": "w1", "completion": "w2", "sampling": {"top_p": "much"}}, "top_p: 'much' is not a number"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_line_ends_the_run_with_its_number(run, line, words):
    code, records, error = run([rows(1)[0], "", line])
    assert (code, records) == (2, [])
    assert error.startswith("fastkl: score: line 3 of ") and words in error and error.count("\n") == 1, error


def test_malformed_lines_are_skipped_on_request_and_stay_in_their_places(run):
    good = rows(len(MALFORMED) + 1)
    mixed = [line for pair in zip(good, [line for line, _ in MALFORMED], strict=False) for line in pair] + good[-1:]
    code, records, error = run(mixed, "--skip-malformed")
    assert code == 0
    assert [r["line"] for r in records] == list(range(1, len(mixed) + 1))
    for record, (_, words) in zip(records[1::2], MALFORMED, strict=True):
        assert set(record) == {"line", "error"} and words in record["error"] and f"line {record['line']} of" in error
    assert f"{len(good):,} lines" in error and f"{len(MALFORMED)} skipped" in error
    alone = run(good)[1]
    for ours, theirs in zip(records[::2], alone, strict=True):
        assert ours["policy_logprobs"] == pytest.approx(theirs["policy_logprobs"], abs=2e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--repetition-penalty", "1.2"], "no option --repetition-penalty. It cannot be scored"),
        (["--temperature", "0"], "temperature: 0.0 is out of range"),
        (["--top-k", "many"], "top_k: 'many' is not a whole number"),
        (["--batch-tokens", "0"], "batch_tokens: 0 is out of range"),
        (["--dtype", "float8"], "dtype: unknown 'float8'"),
        (["--reference", "./nowhere"], "there is no model folder './nowhere'"),
        (["--output", "in.jsonl"], "'in.jsonl' is the input"),
        (["--output", "-", "--resume"], "standard output cannot be continued"),
        (["--output", "folder"], "'folder' cannot be written (Is a directory)"),
    ],
)
def test_wrong_options_are_refused_on_one_line(run, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    code, records, error = run(rows(1), *options)
    assert (code, records) == (2, []) and words in error and error.count("\n") == 1, error


def test_files_that_cannot_be_read_are_refused(models, capsys):
    assert main(["score", "--model", str(models / "policy"), "nowhere.jsonl"]) == 2
    assert "'nowhere.jsonl' cannot be read (No such file or directory)" in capsys.readouterr().err


def test_min_tokens_may_exceed_the_default_length_of_a_training_run():
    sampling = sampling_of({"min_tokens": 500}, TrainConfig(), (STOP,))
    assert (sampling.min_tokens, sampling.stop_token_ids) == (500, (STOP,))


def test_standard_input_goes_to_standard_output(models, capsys, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(b'{"prompt": [1], "completion": [2, 3]}\n')

    monkeypatch.setattr("sys.stdin", Stdin)
    assert main(["score", "--model", str(models / "policy"), "-"]) == 0
    header, record = map(json.loads, capsys.readouterr().out.splitlines())
    assert header["settings"]["reference"] is None and record["token_ids"] == [2, 3]


# ------------------------------------------------------------------------------------------------------------- the view


def test_progress_is_plain_lines_away_from_a_terminal_and_a_bar_on_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("fastkl.score_files.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    text = io.StringIO()
    with ScoreView(1000, Console(file=text)) as view:
        for n in range(1, 5):
            clock[0] += 6
            view.tokens(300, 0)
            view.window(100 * n, 100 * n + 100, 10, malformed=0)
        view.finished("out.jsonl")
    first, second, last = text.getvalue().splitlines()
    assert first == "scoring: 10 lines  50 tokens/s  20 %  1:36 left"
    assert second == "scoring: 30 lines  50 tokens/s  40 %  0:48 left"
    assert last == "40 lines, 1,200 tokens in 0:24 → out.jsonl"

    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    monkeypatch.setattr("fastkl.score_files.progress.can_redraw", lambda console: True)
    with ScoreView(1000, console) as view:
        view.note("skipped line 3")
        clock[0] += 6
        view.tokens(300, 0)
        view.window(0, 500, 10, malformed=1)
    shown = screen.getvalue()
    assert "skipped line 3" in shown and "9 lines  50 tokens/s  50 %  0:06 left" in shown and "━" in shown
