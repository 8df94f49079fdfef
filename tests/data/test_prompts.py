"""Prompts: every source gives the same rows, what cannot be read is explained, the order is reproducible."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter

import pytest

from fastkl.data import chat
from fastkl.data.prompts import PromptSource, load_prompts
from fastkl.errors import UserError
from fastkl.types import Prompt

CHAT = [{"role": "user", "content": "tell a story"}]
ROWS = [
    {"prompt": "one day", "level": 1},
    {"prompt": "two", "level": None},
    {"prompt": "a day", "level": 3},
]


@pytest.fixture(scope="module")
def tokenizer():
    """Words to ids, <s> in front of every text; a chat template that brings its own <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<unk>", "one", "two", "a", "day", "tell", "story", "user", "assistant", ":"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ '<s> ' }}{% for m in messages %}{{ m.role + ' : ' + m.content }}"
        "{% if not loop.last %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' assistant :' }}{% endif %}"
    )
    return tokenizer


def load(source, tokenizer, max_prompt_tokens: int = 100) -> list[Prompt]:
    return load_prompts(str(source), tokenizer, max_prompt_tokens=max_prompt_tokens)


def jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_is_one_prompt_with_the_tokenizers_special_tokens(tokenizer):
    for source in ("one day", "text:one day"):
        assert load(source, tokenizer) == [Prompt((0, 2, 5), "one day", "one day", 1, {})]


@pytest.mark.parametrize(
    "text", ["and/or not", "Is it 3/4?", "x" * 5000, "\x00", "a. b", "1/2 / 3", "Once upon a time"]
)
def test_texts_that_are_no_paths_stay_texts(tokenizer, text):
    assert load(text, tokenizer, 10)[0].text == text


def test_jsonl_gives_prompts_columns_and_line_numbers(tokenizer, tmp_path):
    path = jsonl(tmp_path / "p.jsonl")
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))  # empty lines count, and are skipped
    prompts = load(path, tokenizer)
    assert [p.text for p in prompts] == ["one day", "two", "a day"]
    assert [p.token_ids for p in prompts] == [(0, 2, 5), (0, 3), (0, 4, 5)]
    assert [p.row for p in prompts] == [2, 4, 6]
    assert [p.columns for p in prompts] == [{"level": 1}, {"level": None}, {"level": 3}]


def test_every_kind_of_data_set_gives_the_same_prompts(tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "saved-dict")
    for kind in ("parquet", "csv", "json"):
        (tmp_path / f"{kind}-folder").mkdir()
        getattr(data, f"to_{kind}")(tmp_path / f"{kind}-folder" / f"p.{kind}")
    (tmp_path / "jsonl-folder").mkdir()
    jsonl(tmp_path / "jsonl-folder" / "p.jsonl")
    for name in (
        *("saved", "saved-dict", "parquet-folder", "csv-folder", "json-folder", "jsonl-folder"),
        *("parquet-folder/p.parquet", "csv-folder/p.csv", "json-folder/p.json"),
    ):
        prompts = load(tmp_path / name, tokenizer)
        assert [p.text for p in prompts] == [row["prompt"] for row in ROWS], name
        assert [p.columns for p in prompts] == [{"level": row["level"]} for row in ROWS], name
        assert [p.row for p in prompts] == [1, 2, 3], name


def test_a_byte_order_mark_is_passed_over_and_na_in_a_table_is_a_text(tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "one"}\n{"prompt": "two"}\n')
    assert [p.text for p in load(tmp_path / "p.jsonl", tokenizer)] == ["one", "two"]
    (tmp_path / "p.csv").write_text("prompt,level\nNA,1\nNone,\nnull,3\nnan,4\n")
    prompts = load(tmp_path / "p.csv", tokenizer)
    assert [p.text for p in prompts] == ["NA", "None", "null", "nan"]
    assert [p.columns["level"] for p in prompts] == [1, None, 3, 4]


@pytest.mark.parametrize("prompt", ["one \ud800", [{"role": "user", "content": "\udfff"}]])
def test_half_of_a_character_is_refused_with_its_line(tokenizer, tmp_path, prompt):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"prompt": prompt}))
    with pytest.raises(UserError, match="line 2 of .* holds half of a surrogate pair"):
        load(tmp_path / "p.jsonl", tokenizer)
    with pytest.raises(UserError, match="the text holds half of a surrogate pair"):
        load("text:one \udcff", tokenizer)  # what Python makes of a byte that is no UTF-8 on the command line


def test_data_set_without_train_split_is_explained(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"dev": data, "test": data}).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match="no split 'train' .it has dev, test"):
        load(tmp_path / "d", tokenizer)


def test_hub_names_reach_the_hub_and_failure_is_one_line(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def offline(name, **options):
        asked.append((name, options))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for source in ("some/data.set-1", "hub:some/data.set-1"):
        with pytest.raises(UserError, match="'some/data.set-1' could not be loaded .no route to host"):
            load(source, tokenizer)
    assert asked == [("some/data.set-1", {})] * 2


def test_chats_are_rendered_by_the_template_with_one_bos(tokenizer, tmp_path):
    spoken = [*CHAT, {"role": "assistant", "content": "one day"}]
    prompts = load(jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}, {"prompt": "two"}, {"prompt": spoken}]), tokenizer)
    assert prompts[0].text == "<s> user : tell a story assistant :"
    assert prompts[0].token_ids == (0, 8, 10, 6, 4, 7, 9, 10)
    assert prompts[0].raw == CHAT
    assert prompts[1].token_ids == (0, 3)
    assert prompts[2].text == "<s> user : tell a story assistant : one day"


SPINS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_chat_template_gets_its_time_and_its_length(tokenizer, tmp_path, monkeypatch):
    """It comes with the model: nested loops would run for minutes, a product of texts would fill the memory."""
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}])
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(tokenizer, "chat_template", SPINS)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"template has not rendered line 1 of .* in 0.5 s; mend"):
        load(path, tokenizer)
    assert time.monotonic() - start < 10
    deadline = time.monotonic() + 30
    while any("work" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the template still runs"
        time.sleep(0.05)
    monkeypatch.setattr(chat, "MAX_SECONDS", 60.0)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ 'a' * 20000000 }}")
    with pytest.raises(UserError, match="makes 20,000,000 characters of line 1 of .*, more than 10,000,000"):
        load(path, tokenizer)


def test_chats_need_a_chat_template(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="line 1 of .* no chat template"):
        load(jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}]), tokenizer)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no prompts"]),
        ("\n \n", ["holds no prompts"]),
        ('{"prompt": "one"}\n{"prompt": "tw\n', ["line 2 of", "is not JSON"]),
        ('{"prompt": "one"}\n\n{"text": "two"}\n', ["line 3 of", "no column 'prompt' (its columns: 'text')"]),
        ('["one"]\n', ["line 1 of", "is not a JSON object"]),
        ('{"prompt": 3}\n', ["line 1 of", "neither a text nor a list of messages"]),
        ('{"prompt": null}\n', ["line 1 of", "neither a text nor"]),
        ('{"prompt": []}\n', ["line 1 of", "neither a text nor"]),
        ('{"prompt": [{"role": "user"}]}\n', ["line 1 of", "neither a text nor"]),
        ('{"prompt": "one", "completions": 1}\n', ["line 1 of", "column 'completions'", "rename"]),
        ('{"prompt": "two"}\n{"prompt": "one day one day"}\n', ["line 2 of", "has 5 tokens", "room for 4", "shorten"]),
        ("[" * 100_000, ["line 1 of", "is not JSON"]),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tokenizer, tmp_path, content, words):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError) as refused:
        load(tmp_path / "p.jsonl", tokenizer, max_prompt_tokens=4)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)


def test_prompt_as_long_as_the_room_fits(tokenizer):
    assert load("one day one", tokenizer, max_prompt_tokens=4)[0].token_ids == (0, 2, 5, 2)


def test_prompt_without_a_token_is_refused(tokenizer, monkeypatch, tmp_path):
    assert load("text:", tokenizer)[0].token_ids == (0,)

    def without_bos(texts, add_special_tokens):
        return {"input_ids": [tokenizer.convert_tokens_to_ids(text.split()) for text in texts]}

    with pytest.raises(UserError, match="line 2 of .* is empty"):
        load(jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}, {"prompt": " "}]), without_bos)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.jsonl", ["there is no file", "text:missing.jsonl"]),
        ("./missing", ["there is no file"]),
        ("empty-folder", ["holds no data set", "text:empty-folder"]),
        ("notes.txt", ["of no known kind", "text:notes.txt"]),
        ("latin.jsonl", ["is not UTF-8"]),
        ("broken.parquet", ["could not be loaded"]),
    ],
)
def test_a_path_that_gives_no_prompts_is_explained(tokenizer, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "notes.txt").write_text("one")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError) as refused:
        load(name, tokenizer)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def numbered(count: int) -> list[Prompt]:
    return [Prompt((i,), str(i), str(i), i) for i in range(count)]


def taken(source: PromptSource, count: int) -> list[int]:
    return [prompt.row for prompt in source.take(count)]


def test_every_epoch_is_a_new_shuffle_of_all_prompts():
    source = PromptSource(numbered(20), seed=0)
    first, second = taken(source, 20), taken(source, 20)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20)) != first
    assert taken(PromptSource(numbered(20), seed=0), 20) == first
    assert taken(PromptSource(numbered(20), seed=1), 20) != first


def test_shuffles_are_uniform():
    orders = Counter(tuple(taken(PromptSource(numbered(3), seed=seed), 3)) for seed in range(6000))
    expected, error = 1000, (6000 * 1 / 6 * 5 / 6) ** 0.5
    assert len(orders) == 6 and all(abs(count - expected) < 4 * error for count in orders.values()), orders


def test_takes_cross_the_end_of_an_epoch_and_repeat_a_single_prompt():
    source, at_once = PromptSource(numbered(5), seed=3), taken(PromptSource(numbered(5), seed=3), 15)
    assert [taken(source, 3) for _ in range(5)] == [at_once[start : start + 3] for start in range(0, 15, 3)]
    assert taken(PromptSource(numbered(1), seed=3), 4) == [0, 0, 0, 0]


@pytest.mark.parametrize("before", [0, 3, 5, 13])
def test_saved_position_continues_the_same_order(before):
    source, resumed = PromptSource(numbered(5), seed=3), PromptSource(numbered(5), seed=3)
    source.take(before)
    resumed.load_state(json.loads(json.dumps(source.state())))
    assert [taken(source, 4) for _ in range(3)] == [taken(resumed, 4) for _ in range(3)]


def test_a_position_in_other_prompts_is_refused():
    source = PromptSource(numbered(5), seed=3)
    with pytest.raises(UserError, match="there were 4 when the run was saved and are 5 now"):
        source.load_state(PromptSource(numbered(4), seed=3).state())


# ------------------------------------------------------------------------------------------------------ system prompts

SYSTEM = {"role": "system", "content": "be brief"}


def with_system(source, tokenizer, text="be brief") -> list[Prompt]:
    return load_prompts(str(source), tokenizer, max_prompt_tokens=100, system_prompt=text)


def test_system_prompt_begins_every_prompt_that_has_none_and_makes_messages_of_texts(tokenizer, tmp_path):
    own = [{"role": "system", "content": "one"}, *CHAT]
    prompts = with_system(jsonl(tmp_path / "p.jsonl", [{"prompt": p} for p in ("two", CHAT, own)]), tokenizer)
    user = {"role": "user", "content": "two"}
    assert [p.raw for p in prompts] == [[SYSTEM, user], [SYSTEM, *CHAT], own]
    assert prompts[0].text == "<s> system : be brief user : two assistant :"
    assert prompts[2].text == "<s> system : one user : tell a story assistant :"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('System role not supported') }}", "refuses it .System role not supported."),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves it out"),
    ],
)
def test_system_prompt_that_the_template_cannot_take_is_refused(tokenizer, monkeypatch, template, words):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=f"^system_prompt: the model's .*{words}.*put the instruction into the prompts"):
        with_system("two", tokenizer)


def test_gym_questions_are_one_user_message_where_there_is_a_template(tokenizer, monkeypatch):
    pytest.importorskip("reasoning_gym")
    source = "gym:chain_sum?size=2&seed=1"
    chats = load(source, tokenizer)
    question = chats[0].columns["question"]
    assert chats[0].raw == [{"role": "user", "content": question}]
    assert with_system(source, tokenizer)[0].raw == [SYSTEM, {"role": "user", "content": question}]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert [p.raw for p in load(source, tokenizer)] == [p.columns["question"] for p in chats]
