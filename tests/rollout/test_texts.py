"""What a completion adds to its prompt's text, for tokenizers of every kind: spaces and split characters included."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastkl.data.prompts import as_beginning
from fastkl.rollout.requests import decoded_after
from fastkl.scoring.models import stop_token_ids


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words begin with a low line, as Llama-2's do; the decoder drops the space of the first one. Bytes stand alone."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581Once",
        "\u2581an",
        "\u2581apple",
        "s",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def ids(tokenizer, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokens))


def test_the_first_space_of_a_sentencepiece_completion_is_kept():
    tokenizer = sentencepiece_like()
    prompt, completion = ids(tokenizer, "<s>", "\u2581Once"), ids(tokenizer, "\u2581an", "\u2581apple", "</s>")
    assert tokenizer.decode(completion, skip_special_tokens=True) == "an apple", "the control: alone it loses the space"
    assert decoded_after(prompt, completion, tokenizer) == " an apple"
    assert decoded_after(prompt, ids(tokenizer, "s"), tokenizer) == "s"
    assert decoded_after(ids(tokenizer, "\u2581an") * 50, completion, tokenizer) == " an apple"


@pytest.mark.parametrize("make", [sentencepiece_like, byte_level])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_is_split_across_the_border_is_whole_in_the_completion(make, cut):
    """Its bytes in the prompt show nothing there, so prompt and completion together are the text."""
    tokenizer, seal = make(), "\N{SEAL}"
    pieces = [f"<0x{b:02X}>" for b in seal.encode()] if make is sentencepiece_like else tokenizer.tokenize(seal)
    assert len(pieces) == 4
    start = ids(tokenizer, "\u2581Once") if make is sentencepiece_like else tokenizer("Once").input_ids
    encoded = ids(tokenizer, *pieces)
    assert decoded_after(start + encoded[:cut], encoded[cut:], tokenizer) == seal


def test_text_equals_what_the_completion_is_alone_where_tokens_are_bytes():
    tokenizer = byte_level()
    text = " a plain text,\n and more"
    assert decoded_after(tokenizer("Once").input_ids, tokenizer(text).input_ids, tokenizer) == text


def test_the_tokenizers_own_end_of_text_ends_a_completion(tmp_path):
    from transformers import LlamaConfig

    tokenizer = sentencepiece_like()
    assert stop_token_ids(LlamaConfig(eos_token_id=9), str(tmp_path), tokenizer) == (2, 9)
    assert stop_token_ids(LlamaConfig(eos_token_id=2), str(tmp_path), tokenizer) == (2,)


def test_a_prompt_keeps_no_end_of_text_that_the_tokenizer_added_and_no_second_beginning():
    tokenizer = sentencepiece_like()
    begin, end, word = ids(tokenizer, "<s>", "</s>", "\u2581Once")
    assert list(as_beginning([begin, word, end], "Once", tokenizer)) == [begin, word]
    assert list(as_beginning([begin, word, end], "Once</s>", tokenizer)) == [begin, word, end], "it is in the text"
    assert list(as_beginning([begin, begin, word], "<s>Once", tokenizer)) == [begin, word]
    assert list(as_beginning([begin, word], "Once", tokenizer)) == [begin, word]
