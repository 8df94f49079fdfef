"""Prompts: every source gives the same rows, what cannot be read is explained, the order is reproducible."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter

import pytest

from fastkl.data import chat
from fastkl.data.prompts import PromptFormat, PromptSource, load_prompts
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_chat_template_gets_its_time_and_its_length(tokenizer, tmp_path, monkeypatch):
    """It comes with the model: nested loops would run for minutes, a product of texts would fill the memory."""
    path, others = jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}]), {*threading.enumerate()}
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(tokenizer, "chat_template", SPINS)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"template has not rendered line 1 of .* in 0.5 s; mend"):
        load(path, tokenizer)
    assert time.monotonic() - start < 10
    deadline = time.monotonic() + 30
    while any("work" in thread.name for thread in {*threading.enumerate()} - others):
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
    return load_prompts(str(source), tokenizer, max_prompt_tokens=100, form=PromptFormat(system_prompt=text))


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


@pytest.mark.slow
def test_gym_questions_are_one_user_message_where_there_is_a_template(tokenizer, monkeypatch):
    pytest.importorskip("reasoning_gym")
    source = "gym:chain_sum?size=2&seed=1"
    chats = load(source, tokenizer)
    question = chats[0].columns["question"]
    assert chats[0].raw == [{"role": "user", "content": question}]
    assert with_system(source, tokenizer)[0].raw == [SYSTEM, {"role": "user", "content": question}]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert [p.raw for p in load(source, tokenizer)] == [p.columns["question"] for p in chats]


# --------------------------------------------------------------------------------------------- data as people have it

ANSWERED = [*CHAT, {"role": "assistant", "content": "one day"}]


def shaped(source, tokenizer, max_prompt_tokens=100, say=print, **form) -> list[Prompt]:
    return load_prompts(str(source), tokenizer, max_prompt_tokens=max_prompt_tokens, form=PromptFormat(**form), say=say)


def test_another_column_is_the_prompt_and_reaches_reward_functions_too(tokenizer, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"question": "two", "answer": 2}])
    (prompt,) = shaped(path, tokenizer, prompt_column="question")
    assert (prompt.text, prompt.columns) == ("two", {"question": "two", "answer": 2})
    with pytest.raises(
        UserError, match=r"no column 'prompt' \(its columns: 'question', 'answer'\)\. Name it with --pro"
    ):
        load(path, tokenizer)
    with pytest.raises(UserError, match="no column 'qestion' .*Did you mean 'question'"):
        shaped(path, tokenizer, prompt_column="qestion")


def test_messages_lose_the_answer_that_ends_them_and_a_prompt_continues_it(tokenizer, tmp_path):
    prompts = load(jsonl(tmp_path / "m.jsonl", [{"messages": m} for m in (ANSWERED, CHAT)]), tokenizer)
    assert [p.raw for p in prompts] == [CHAT, CHAT]
    assert prompts[0].columns == {"messages": ANSWERED}
    rows = [{"messages": ANSWERED, "prompt": "two", "talk": ANSWERED}]
    assert load(jsonl(tmp_path / "p.jsonl", rows), tokenizer)[0].raw == "two"
    assert shaped(tmp_path / "p.jsonl", tokenizer, prompt_column="talk")[0].raw == ANSWERED
    with pytest.raises(UserError, match="line 1 of .* hold nothing but an answer"):
        load(jsonl(tmp_path / "a.jsonl", [{"messages": ANSWERED[1:]}]), tokenizer)


def test_split_and_config_of_a_data_set_are_chosen_by_its_address(tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"prompt": text}]) for name, text in (("train", "one"), ("test", "two"))}
    both = datasets.DatasetDict(parts)
    both.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files" / "train.jsonl", [{"prompt": "one"}])
    jsonl(tmp_path / "files" / "test-00000.jsonl", [{"prompt": "two"}])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or both)
    for name in ("saved", "files"):
        assert [p.text for p in load(f"{tmp_path / name}?split=test", tokenizer)] == ["two"], name
    assert load(tmp_path / "saved", tokenizer)[0].text == "one"
    for source in ("hub:a/b?config=main&split=test", "a/b?split=test"):
        assert load(source, tokenizer)[0].text == "two"
    assert asked == [(("a/b",), {"name": "main"}), (("a/b",), {})]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hub:a/b?splitt=test", ["'a/b' has no option 'splitt'", "Did you mean 'split'"]),
        ("hub:a/b?split=dev", ["has no split 'dev' (it has train, test)", "a/b?split=NAME"]),
        ("files?split=dev", ["no file in 'files' has the split 'dev' in its name (it has train.jsonl)"]),
        ("files?config=main", ["'files' has no option 'config'"]),
        ("files/train.jsonl?split=test", ["is a file, which has no splits"]),
        ("saved?split=dev", ["has no splits; name it without ?split=dev"]),
    ],
)
def test_an_address_that_names_nothing_is_explained(tokenizer, tmp_path, monkeypatch, source, words):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files" / "train.jsonl")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk("saved")
    both = datasets.DatasetDict({"train": data, "test": data})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: both)
    with pytest.raises(UserError) as refused:
        load(source, tokenizer)
    assert all(word in str(refused.value) for word in words), str(refused.value)


THINKS = (
    "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    "{{ 'one' if enable_thinking else 'two' }}{{ ' ' + style if style }}"
)


def test_template_gets_the_keywords_and_the_rows_own_win(tokenizer, tmp_path, monkeypatch):
    from fastkl.data.prompts import template_kwargs

    monkeypatch.setattr(tokenizer, "chat_template", THINKS)
    own = [{}, {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"style": None}}]
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT, **columns} for columns in own])
    kwargs = template_kwargs(["enable_thinking=true", "style=day"])
    assert kwargs == {"enable_thinking": True, "style": "day"}
    texts = [p.text for p in shaped(path, tokenizer, chat_template_kwargs=kwargs)]
    assert texts == [f"tell a story {word} day" for word in ("one", "two", "one")]
    assert load(path, tokenizer)[0].text == "tell a story two"
    bad = jsonl(tmp_path / "b.jsonl", [{"prompt": CHAT, "chat_template_kwargs": {"tokenize": True}}])
    with pytest.raises(
        UserError, match="the 'chat_template_kwargs' in line 1 of .* are no keywords of a chat template"
    ):
        load(bad, tokenizer)


def test_long_prompts_are_dropped_where_that_is_asked_for_and_counted(tokenizer, tmp_path):
    path, said = jsonl(tmp_path / "p.jsonl", [{"prompt": p} for p in ("one", "two two two", "a day", "a a a a")]), []
    kept = shaped(path, tokenizer, max_prompt_tokens=3, long_prompts="drop", say=said.append)
    assert [p.text for p in kept] == ["one", "a day"]
    assert said == [f"prompts: 2 of 4 dropped, of more than 3 tokens; the first is line 2 of {str(path)!r}"]
    with pytest.raises(UserError, match="prompts: none fits; .* room for 1 tokens"):
        shaped(path, tokenizer, max_prompt_tokens=1, long_prompts="drop")
    with pytest.raises(UserError, match="line 2 of .* has 4 tokens.*--long-prompts drop"):
        shaped(path, tokenizer, max_prompt_tokens=3)


def test_without_shuffle_prompts_come_in_their_own_order_in_every_epoch():
    source = PromptSource(numbered(3), seed=5, shuffle=False)
    assert taken(source, 7) == [0, 1, 2, 0, 1, 2, 0]
    resumed = PromptSource(numbered(3), seed=5, shuffle=False)
    resumed.load_state(source.state())
    assert taken(resumed, 3) == [1, 2, 0]
