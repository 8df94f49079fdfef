"""The doctor: each cause is planted in rollouts of a known toy policy and is named; healthy ones are left alone."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
import torch

from fastkl.audit.alarm import KlAlarm, Moments, is_negative, mean_and_error
from fastkl.audit.doctor import diagnose, diagnose_rollouts, read_rollouts
from fastkl.audit.rollout_checks import Gaps, Rollout, size_bin
from fastkl.audit.thresholds import NOISE
from fastkl.cli import main
from fastkl.errors import UserError

VOCAB, LENGTH, END, NUM = 12, 8, 11, 400


def rollouts(**options) -> list[dict]:
    """What is drawn below, once for each choice of options; the caller may change it."""
    return json.loads(drawn(**options))


@cache
def drawn(*, drift=0.6, top_k=0, min_tokens=0, engine_noise=0.0, engine_bias=None, dropout=0.0, steps=4, seed=0) -> str:
    """Completions drawn from softmax rows (one per position) and scored naively: over the whole vocabulary. As JSON."""
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float, *shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64, generator=g)

    ref = noise(1.0, LENGTH, VOCAB)
    move = noise(drift, LENGTH, VOCAB)
    move[:, END] += 3.0 * (min_tokens > 0)
    step = 1 + torch.arange(NUM) * steps // NUM
    policy = ref + move * ((step - 1) / max(1, steps - 1))[:, None, None]  # f64 [NUM, LENGTH, VOCAB]
    engine = policy + noise(engine_noise, NUM, LENGTH, VOCAB)
    if engine_bias is not None:
        engine = ref + (engine - ref) * engine_bias
    if top_k:
        engine = engine.masked_fill(engine < engine.topk(top_k).values[..., -1:], -torch.inf)
    engine[:, :min_tokens, END] = -torch.inf
    drawn = torch.multinomial(engine.softmax(-1).flatten(0, 1), 1, generator=g).view(NUM, LENGTH, 1)
    seen = policy + noise(dropout, NUM, LENGTH, VOCAB), ref + noise(dropout, NUM, LENGTH, VOCAB), engine
    columns = [drawn[..., 0], *(table.log_softmax(-1).gather(-1, drawn)[..., 0] for table in seen)]
    rows = []
    for at, (token_ids, *logprobs) in zip(step.tolist(), zip(*(x.tolist() for x in columns), strict=True), strict=True):
        length = token_ids.index(END) + 1 if END in token_ids else LENGTH
        names = ("token_ids", "logprobs", "ref_logprobs", "sampler_logprobs")
        row = {name: x[:length] for name, x in zip(names, (token_ids, *logprobs), strict=True)}
        rows.append(row | {"step": at, "finish_reason": "stop" if row["token_ids"][-1] == END else "length"})
    return json.dumps(rows)


def padded(rows: list[dict]) -> list[dict]:
    for row in rows:
        for _ in range(LENGTH - len(row["logprobs"])):
            row["token_ids"].append(0)
            row["sampler_logprobs"].append(-1.0)
            row["logprobs"].append(-1.0)
            row["ref_logprobs"].append(-0.5 if row["step"] > 1 else -1.0)
    return rows


def half_scored(rows: list[dict]) -> list[dict]:
    for row in rows:
        row["mask"] = [int(row["finish_reason"] == "stop")] * len(row["logprobs"])
    return rows


def reencoded(rows: list[dict]) -> list[dict]:
    for row in rows[::7]:
        row["sampled_token_ids"] = [y + 1 for y in row["token_ids"]]
    return rows


PLANTED = {
    "truncated sampling is not accounted for": lambda: rollouts(top_k=4),
    "a banned end-of-sequence is not accounted for": lambda: rollouts(min_tokens=4),
    "padding is scored": lambda: padded(rollouts()),
    "truncated rows are half scored": lambda: half_scored(rollouts()),
    "completions were re-encoded by the tokenizer": lambda: reencoded(rollouts()),
    "dropout is on": lambda: rollouts(dropout=0.3),
    "the engine samples from stale weights": lambda: rollouts(drift=0.8, engine_bias=0.3),
    "logits are rounded to bfloat16 on one side": lambda: rollouts(engine_noise=0.02),
}


def audit(tmp_path, rows: list[dict], **settings):
    path = tmp_path / "rollouts.jsonl"
    lines = [{"settings": {"eos_token_ids": [END]} | settings}, *rows]
    path.write_text("\n".join(map(json.dumps, lines)))
    return diagnose(path)


@pytest.mark.parametrize("cause", PLANTED)
def test_every_planted_cause_is_named_with_evidence_and_remedy(cause, tmp_path):
    found = audit(tmp_path, PLANTED[cause]()).findings
    assert cause in {finding.cause for finding in found if finding.certainty == "shown"}
    assert all(finding.evidence and finding.remedy for finding in found)
    if cause != "dropout is on":  # dropout also makes sampler and trainer differ
        assert [finding.cause for finding in found] == [cause]


def test_healthy_rollouts_have_no_finding_and_no_negative_estimate(tmp_path):
    diagnosis = audit(tmp_path, rollouts())
    assert not diagnosis.findings
    assert not diagnosis.negative
    assert diagnosis.mean > 0
    assert diagnosis.num_completions == NUM


@pytest.mark.parametrize("cause", ["a banned end-of-sequence is not accounted for", "padding is scored"])
def test_the_estimate_is_significantly_negative_where_the_cause_makes_it_so(cause, tmp_path):
    assert audit(tmp_path, PLANTED[cause]()).negative


def test_without_the_samplers_logprobs_settings_that_truncate_are_possible_causes(tmp_path):
    rows = rollouts(top_k=4)
    for row in rows:
        del row["sampler_logprobs"]
    (found,) = audit(tmp_path, rows, top_k=4, top_p=1.0, min_p=0.0).findings
    assert found.certainty == "possible"
    assert "top_k" in found.evidence and "top_p" not in found.evidence


def test_a_window_of_steps_can_be_negative_although_the_whole_is_not():
    g = random.Random(0)
    rows = []
    for step in range(40):
        for _ in range(20):
            k = g.gauss(-1.0 if 10 <= step < 18 else 1.0, 1.0)
            rows.append({"logprobs": [k], "ref_logprobs": [0.0], "step": step})
    diagnosis = diagnose_rollouts("x", (Rollout(**row) for row in rows))
    assert diagnosis.mean > 0
    assert diagnosis.negative


def test_the_alarm_rings_for_a_negative_mean_and_for_nothing_else():
    g = random.Random(0)
    alarm = KlAlarm()
    assert not any(alarm.add([g.gauss(0.0, 3.0) for _ in range(64)]) for _ in range(100))
    rung = [alarm.add([g.gauss(-2.0, 3.0) for _ in range(64)]) for _ in range(8)]
    assert rung[-1] and "below zero" in rung[-1]
    mean, error = mean_and_error([1.0, 3.0])
    assert (mean, error) == (2.0, 1.0)
    assert not is_negative([-1.0])
    assert is_negative([-1.0, -1.1, -0.9])


def test_a_line_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"logprobs": [1], "ref_logprobs": [1]}\n{"logprobs": [1, 2], "ref_logprobs": [1]}\n')
    with pytest.raises(UserError, match="line 2 of .*differ in length"):
        list(read_rollouts(path))


def test_the_command_exits_with_one_for_a_negative_estimate_and_reads_run_folders(tmp_path, capsys):
    samples = [{"step": 1 + i // 20, "reward": 0.0, "kl": -1.0 - 0.01 * i} for i in range(60)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mismatch/mean_abs_logprob": 0.4}\n')
    assert main(["doctor", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "significantly negative" in told and "engine and trainer differ (shown)" in told
    samples = [sample | {"kl": 1.0} for sample in samples]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    assert main(["doctor", str(tmp_path)]) == 0


def test_the_table_of_the_documentation_is_what_the_command_computes(capsys):
    from pathlib import Path

    assert main(["doctor", "--table"]) == 0
    page = (Path(__file__).parents[2] / "docs" / "negative-kl.md").read_text()
    assert capsys.readouterr().out.strip() in page


def healthy_run() -> tuple[dict, list[dict], list[dict]]:
    """config, metrics and samples of a made-up run of 12 steps; top_k and min_tokens replayed, half the texts cut."""
    g = random.Random(0)
    config = {"top_k": 20, "min_tokens": 4, "top_p": 1.0, "min_p": 0.0, "max_new_tokens": 12, "importance": "none"}
    metrics, samples = [], []
    for step in range(1, 13):
        kl = 0.5 * (step - 1)
        rows = []
        for i in range(32):
            tokens = 12 if i % 2 else g.randint(5, 11)
            row = {"step": step, "reward": g.random(), "num_tokens": tokens, "finish_reason": ("stop", "length")[i % 2]}
            rows.append(row | {"lm_cross_entropy": 1 + g.random(), "kl": g.gauss(kl, 1.0) if step > 1 else 0.0})
        total = sum(row["num_tokens"] for row in rows)
        metrics.append(
            {
                "step": step,
                "kl/mean": sum(row["kl"] for row in rows) / 32,
                "kl/support": kl,
                "kl/exact": 1.1 * kl,
                "lm_cross_entropy": sum(row["num_tokens"] * row["lm_cross_entropy"] for row in rows) / total,
                "mismatch/mean_abs_logprob": 1e-6,
                "mismatch/weights_cut": 0.0,
                "groups/skipped": 0,
            }
        )
        samples += rows
    return config, metrics, samples


def audit_run(folder, config: dict, metrics: list[dict], samples: list[dict]):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)) + '\n{"step": 13, "rew')
    return diagnose(folder)


def test_a_healthy_run_is_looked_at_from_every_side_and_nothing_is_found(tmp_path):
    diagnosis = audit_run(tmp_path, *healthy_run())
    assert (diagnosis.findings, diagnosis.negative) == ((), False)
    assert [clear.what for clear in diagnosis.clear] == [
        "estimate against exact KL", "truncated sampling", "banned end of the text", "padding", "truncated rows",
        "policy and reference begin as one model", "generator and trainer",
    ]  # fmt: skip
    told = diagnosis.text()
    assert "In order:" in told and "50% of the completions were cut; they are scored whole" in told


def shifted_estimate(config, metrics, samples):
    for m in metrics:
        m["kl/mean"] -= 1.5


def unreplayed_top_k(config, metrics, samples):
    for m in metrics:
        m |= {"kl/exact": m["kl/support"], "mismatch/mean_abs_logprob": 0.3}


def ended_in_the_ban(config, metrics, samples):
    config["min_tokens"] = 6


def pads_in_the_mean(config, metrics, samples):
    for m in metrics:
        m["lm_cross_entropy"] *= 0.9  # the same nats over more positions


def cut_without_kl(config, metrics, samples):
    for s in samples:
        if s["finish_reason"] == "length":
            s["kl"] = 0.0


def cut_not_scored(config, metrics, samples):
    for s in samples:
        if s["finish_reason"] == "length":
            s["kl"] = None
    for m in metrics:  # the means are over the scored ones
        rows = [s for s in samples if s["step"] == m["step"] and s["kl"] is not None]
        total = sum(s["num_tokens"] for s in rows)
        m["lm_cross_entropy"] = sum(s["num_tokens"] * s["lm_cross_entropy"] for s in rows) / total


def noisy_first_step(config, metrics, samples):
    for s in samples[:32]:
        s["kl"] = 0.4


def growing_gap(config, metrics, samples):
    for m in metrics:
        m["mismatch/mean_abs_logprob"] = 0.05 * (m["step"] - 1)


def constant_gap(config, metrics, samples):
    config["dtype"] = "float32"  # bfloat16 would explain it
    for m in metrics:
        m["mismatch/mean_abs_logprob"] = 0.02


def cut_weights(config, metrics, samples):
    config["importance"] = "sequence"
    metrics[-1]["mismatch/weights_cut"] = 0.2


PLANTED_IN_A_RUN = {
    shifted_estimate: ("the tokens were not drawn from the scored distribution", "shown"),
    unreplayed_top_k: ("truncated sampling is not accounted for", "shown"),
    ended_in_the_ban: ("a banned end-of-sequence is not accounted for", "shown"),
    pads_in_the_mean: ("padding is scored", "shown"),
    cut_without_kl: ("truncated rows are half scored", "shown"),
    cut_not_scored: ("truncated rows are half scored", "shown"),
    noisy_first_step: ("dropout is on", "possible"),
    growing_gap: ("the engine samples from stale weights", "shown"),
    constant_gap: ("engine and trainer differ", "possible"),
    cut_weights: ("the generator is far from the trainer", "possible"),
}


@pytest.mark.parametrize("fault", PLANTED_IN_A_RUN, ids=lambda fault: fault.__name__)
def test_every_fault_planted_in_a_run_folder_is_named(fault, tmp_path):
    config, metrics, samples = healthy_run()
    fault(config, metrics, samples)
    found = {(f.cause, f.certainty) for f in audit_run(tmp_path, config, metrics, samples).findings}
    assert PLANTED_IN_A_RUN[fault] in found
    if fault is unreplayed_top_k:
        found -= {("engine and trainer differ", "shown")}  # which is how it shows there
    assert found == {PLANTED_IN_A_RUN[fault]}, "and no other cause is suspected"


def test_completions_dropped_with_their_reward_are_in_order(tmp_path):
    config, metrics, samples = healthy_run()
    cut_not_scored(config, metrics, samples)
    for s in samples:
        if s["kl"] is None:
            s["reward"] = None
    diagnosis = audit_run(tmp_path, config, metrics, samples)
    assert not diagnosis.findings
    assert any("50% of the completions were cut; they left their groups" in c.evidence for c in diagnosis.clear)


def test_a_damaged_line_of_a_run_is_named_but_not_one_that_is_still_being_written(tmp_path):
    config, metrics, samples = healthy_run()
    audit_run(tmp_path, config, metrics, samples)  # its last line is half written
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 of .*metrics.jsonl.* is damaged"):
        diagnose(tmp_path)


# ------------------------------------------------------------------------------------------- what files really hold

GOOD = {"logprobs": [-1.0, -2.0], "ref_logprobs": [-1.5, -2.0]}

NO_ROLLOUTS = [
    ('{"logprobs": [NaN, -1], "ref_logprobs": [-1, -1]}', r"logprobs\[0\] is nan"),
    ('{"logprobs": [-1], "ref_logprobs": [-Infinity]}', r"ref_logprobs\[0\] is -inf"),
    ('{"logprobs": [1%s], "ref_logprobs": [-1]}' % ("0" * 400), r"logprobs\[0\] is 1000"),
    ('{"logprobs": [%s], "ref_logprobs": [-1]}' % ("9" * 5000), "not JSON"),
    ({"logprobs": [-1e308, -1e308], "ref_logprobs": [-1, -1]}, r"logprobs\[0\] is -1e\+308, not a finite"),
    ({"logprobs": [{"-1": 2}], "ref_logprobs": [[-1]]}, r"logprobs\[0\] is \{'-1': 2\}, not a finite"),
    (GOOD | {"sampler_logprobs": [None, -1.0]}, r"sampler_logprobs\[0\] is None, not a finite number"),
    (GOOD | {"logprobs": None}, "it has no logprobs or old_per_token_logps"),
    ({"logprobs": [], "ref_logprobs": []}, "logprobs is empty"),
    (GOOD | {"logprobs": "ab"}, "logprobs is not a list"),
    (GOOD | {"logprobs": ["-1", "-2"]}, r"logprobs\[0\] is -1, not a finite"),
    (GOOD | {"logprobs": [True, False]}, r"logprobs\[0\] is True"),
    (GOOD | {"mask": []}, "mask is empty"),
    (GOOD | {"mask": [1]}, "differ in length"),
    (GOOD | {"mask": [0, 2]}, r"mask\[1\] is 2, not 0 or 1"),
    (GOOD | {"token_ids": [1.5, 2]}, r"token_ids\[0\] is 1.5, not a whole"),
    (GOOD | {"responses": "a text"}, "responses is not a list"),
    (GOOD | {"step": "1"}, "step is not a whole number"),
    (GOOD | {"finish_reason": 1}, "finish_reason is not a text"),
    (GOOD | {"settings": {"top_p": "0.9"}}, "settings: top_p is not a number"),
    ({"settings": {"eos_token_ids": ["</s>"]}}, r"settings: eos_token_ids\[0\] is </s>, not a whole"),
    ({"settings": 3}, "settings is not an object"),
    ("[1]", "not a JSON object"),
    ("[" * 3000, "not JSON"),
    ('{"logprobs": ', "not JSON"),
]


@pytest.mark.parametrize(("line", "words"), NO_ROLLOUTS, ids=range(len(NO_ROLLOUTS)))
def test_what_is_no_number_or_no_rollout_is_refused_by_line_and_field(line, words, tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", line if isinstance(line, str) else json.dumps(line)]))
    with pytest.raises(UserError, match=f"line 3 of .*{words}"):
        list(read_rollouts(path))
    assert main(["doctor", str(path)]) == 2
    assert "line 3" in capsys.readouterr().err


def test_fewer_than_ten_scored_completions_are_too_few_to_tell(tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    rows = [GOOD | {"logprobs": [-9.0 - 0.01 * i, -2.0]} for i in range(10)]
    for changed, code in ((rows[:9], 3), ([*rows[:9], rows[9] | {"mask": [0, 0]}], 3), (rows, 1)):
        path.write_text("\n".join(map(json.dumps, changed)))
        assert main(["doctor", str(path)]) == code
        assert ("too few scored completions" in capsys.readouterr().out) == (code == 3)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "samples.jsonl").write_text("\n".join([json.dumps({"step": 1, "reward": 0.0, "kl": -5.0})] * 9))
    assert main(["doctor", str(tmp_path)]) == 3


def test_names_of_other_trainers_are_understood(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    names = {
        "trl": "old_per_token_logps ref_per_token_logps sampling_per_token_logps completion_mask completion_ids",
        "verl": "old_log_probs ref_log_prob rollout_log_probs response_mask responses",
        "openrlhf": "action_log_probs base_action_log_probs rollout_log_probs action_mask token_ids",
    }
    lists = [[-1.0, -2.0], [-1.5, -2.0], [-0.5, -1.0], [1, 0], [7, 8]]
    ours = ["logprobs", "ref_logprobs", "sampler_logprobs", "mask", "token_ids"]
    for theirs in names.values():
        path.write_text(json.dumps(dict(zip(theirs.split(), lists, strict=True)) | {"rewards": 1.0, "index": None}))
        (row,) = read_rollouts(path)
        assert [getattr(row, name) for name in ours] == lists


def test_settings_hold_for_the_lines_below_and_those_in_a_row_for_that_row(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    own = GOOD | {"settings": {"top_k": 5, "eos_token_ids": 2}}
    path.write_text("\n".join(map(json.dumps, [GOOD, own, {"settings": {"top_k": 9}}, GOOD, own])))
    found = list(read_rollouts(path))
    assert [row.settings.get("top_k") for row in found] == [None, 5, 9, 5]
    assert found[1].settings["eos_token_ids"] == [2]


def test_one_eos_token_id_is_as_good_as_a_list(tmp_path):
    (finding,) = audit(tmp_path, padded(rollouts()), eos_token_ids=END).findings
    assert finding.cause == "padding is scored"


def raw(rows: list[dict]) -> list[dict]:
    """As an engine records by default: log-probs of all ids, whatever could be drawn."""
    return [row | {"sampler_logprobs": row["logprobs"]} for row in rows]


def test_log_probs_from_before_the_truncation_are_named(tmp_path):
    (finding,) = audit(tmp_path, raw(rollouts(top_k=4)), top_k=4).findings
    assert (finding.cause, finding.certainty) == ("log-probs were recorded before truncation", "shown")
    (finding,) = audit(tmp_path, raw(rollouts(top_k=4, drift=0.0)), top_p=0.9).findings
    assert (finding.cause, finding.certainty) == ("log-probs were recorded before truncation", "possible")


def test_replayed_truncation_is_not_taken_for_one_that_was_ignored(tmp_path):
    rows = rollouts(top_k=4, drift=0.0)
    rows = [row | dict.fromkeys(("logprobs", "ref_logprobs"), row["sampler_logprobs"]) for row in rows]
    assert not audit(tmp_path, rows, top_k=4).findings


def test_separators_of_unicode_and_a_byte_order_mark_are_no_damage(tmp_path):
    config, metrics, samples = healthy_run()
    samples = [s | {"completion": "a\u2028b\u2029c\u0085d"} for s in samples]
    expected = audit_run(tmp_path, config, metrics, samples)
    text = "\n".join(json.dumps(s, ensure_ascii=False) for s in samples)
    (tmp_path / "samples.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert diagnose(tmp_path) == expected
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD | {"text": "a\u2028b"}, ensure_ascii=False).encode())
    assert len(list(read_rollouts(path))) == 1


@pytest.mark.slow
def test_the_audit_of_a_run_holds_no_samples(tmp_path):
    import tracemalloc

    config, metrics, samples = healthy_run()
    peaks = []
    for times in (1, 10):
        audit_run(tmp_path, config, metrics, [s | {"completion": "x" * 500} for s in samples] * times)
        tracemalloc.start()
        diagnose(tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "samples.jsonl").stat().st_size > 2e6
    assert peaks[1] < peaks[0] + 2e5


@pytest.mark.slow
def test_the_audit_of_rollouts_holds_none_of_them(tmp_path):
    """Ten times as many rows, the same memory; and what is planted in them is still found."""
    import tracemalloc

    rows, peaks, path = padded(rollouts(top_k=4)), [], tmp_path / "rollouts.jsonl"
    for times in (1, 10):
        with path.open("w") as file:
            file.write(json.dumps({"settings": {"eos_token_ids": [END]}}) + "\n")
            for _ in range(times):
                file.writelines(json.dumps(row | {"text": "x" * 500}) + "\n" for row in rows)
        tracemalloc.start()
        diagnosis = diagnose(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert diagnosis.num_completions == times * NUM
        assert "padding is scored" in {finding.cause for finding in diagnosis.findings}
    assert path.stat().st_size > 2e6
    assert peaks[1] < peaks[0] + 2e5


def test_gaps_of_parts_are_those_of_the_whole_and_their_sizes_are_known_to_a_bin():
    g = random.Random(0)
    values = [g.choice((-1, 1)) * 10 ** g.uniform(-6, 2) for _ in range(500)]
    parts = [Gaps(), Gaps(), Gaps()]
    for i, value in enumerate(values):
        parts[i % 2].add(value)
    total = parts[0] + parts[1] + parts[2]
    assert (total.count, total.higher, total.lower) == (
        500, sum(v > NOISE for v in values), sum(v < -NOISE for v in values),
    )  # fmt: skip
    assert total.spread == pytest.approx(sum(map(abs, values)) / 500, rel=1e-12)
    assert total.mean == pytest.approx(sum(values) / 500, rel=1e-9)
    assert total.beyond(NOISE) == sum(abs(v) > NOISE for v in values)
    for size in (0.01, 0.3, 5.0):
        at_most, at_least = (sum(abs(v) > size * factor for v in values) for factor in (1.0, 2**0.5))
        assert at_least <= total.beyond(size) <= at_most
    assert [size_bin(x) for x in (0.0, NOISE, 1.01 * NOISE, -1e9, 1e99)] == [0, 0, 1, 31, 31]


def test_odd_numbers_in_a_run_folder_are_no_measurements(tmp_path):
    config, metrics, samples = healthy_run()
    expected = audit_run(tmp_path, config, metrics, samples)
    odd = [samples[0] | {"kl": kl} for kl in (1e308, -1e308, "1", None, True, [1.0])]
    assert audit_run(tmp_path, config, metrics, samples + odd).estimate == expected.estimate


def test_moments_of_parts_are_those_of_the_whole():
    import statistics

    g = random.Random(0)
    parts = [[g.gauss(5.0, 2.0) for _ in range(n)] for n in (0, 1, 7, 30)]
    total = Moments()
    for part in parts:
        moments = Moments()
        for value in part:
            moments.add(value)
        total = total + moments
    values = [value for part in parts for value in part]
    expected = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    assert total.mean_and_error() == pytest.approx(expected, rel=1e-12)
