"""Templates against the original's text and the paper's; the chat template rendered by transformers."""

from types import SimpleNamespace

import pytest

from towerspeech import prompts
from towerspeech.errors import UserError
from towerspeech.tokenizer import CHAT_TEMPLATE, stop_token_ids


def test_templates():
    assert prompts.speech_document("UUU", "Hello.") == "Speech:UUU\nEnglish: Hello."
    assert prompts.parallel_document("de", "Hallo.", "en", "Hello.") == "German: Hallo.\nEnglish: Hello."
    assert prompts.asr("UUU") == "Speech: UUU\nEnglish:"
    assert prompts.mt_0_shot("en", "zh", "Hi") == (
        "Translate the following English source text to Chinese:\nEnglish: Hi\nChinese:"
    )
    examples = [("Eins", "One"), ("Zwei", "Two")]
    assert prompts.mt_few_shot("de", "en", "Drei", examples) == (
        "German text: Eins\nEnglish text: One\nGerman text: Zwei\nEnglish text: Two\nGerman text: Drei\nEnglish text:"
    )
    assert prompts.mt_few_shot("de", "en", "Drei", examples, "\n ") == (
        "German text: Eins\nEnglish text: One\n German text: Zwei\nEnglish text: Two"
        "\n German text: Drei\nEnglish text:"
    )
    assert prompts.cascaded_st("nl", " hi ") == (
        "Translate the following English source text to Dutch Text:  hi \n. Dutch:"
    )
    for template in (prompts.mt_0_shot, prompts.mt_spire):
        with pytest.raises(UserError, match="unknown language"):
            template("en", "xx", "Hi")


def test_spirelms_templates():
    """As they stand in utter-project/SpireLM's instruction-templates/spire-style-template.json."""
    published = {
        "asr": "Speech: {dsu_seq}\nEnglish:",
        "en_de": "Speech: {dsu_seq}\nGerman:",
        "en_zh": "Speech: {dsu_seq}\nChinese:",
        "mt": "Translate the following text from {src_lang} to {tgt_lang}.\n{src_lang}: {example}\n{tgt_lang}:",
    }
    assert prompts.asr("UUU") == published["asr"].format(dsu_seq="UUU")
    for pair in ("en_de", "en_zh"):
        assert prompts.st("UUU", pair[-2:]) == published[pair].format(dsu_seq="UUU")
    slots = {"src_lang": "Korean", "tgt_lang": "English", "example": "x"}
    assert prompts.mt_spire("ko", "en", "x") == published["mt"].format(**slots)


def test_rows_are_texts_or_users_messages():
    assert prompts.prompt_row("original", "1", "Hi", "Ho", task="mt") == {
        "id": "1",
        "instruction": "Hi",
        "output": "Ho",
        "task": "mt",
    }
    for style in ("chat", "spire"):
        row = prompts.prompt_row(style, "1", "Hi", "Ho", task="mt")
        assert row == {"id": "1", "messages": [{"role": "user", "content": "Hi"}], "output": "Ho", "task": "mt"}


def test_chat_template_as_transformers_renders_it():
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello"}]

    def render(given, **options) -> tuple[str, list]:
        text, spans = render_jinja_template([given], chat_template=CHAT_TEMPLATE, **options)
        return text[0], spans[0] if spans else []

    asked, _ = render(messages[:1], add_generation_prompt=True)
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    text, spans = render(messages, return_assistant_tokens_mask=True)
    assert text == f"{asked} Hello<|im_end|>\n"
    assert [text[start:end] for start, end in spans] == [" Hello<|im_end|>"]


def test_stop_rules():
    def tokenizer(eos, **vocabulary):
        return SimpleNamespace(eos_token_id=eos, get_vocab=lambda: vocabulary)

    assert stop_token_ids(tokenizer(2, a=0)) == [2]
    assert stop_token_ids(tokenizer(2, **{"<EOD>": 9, "<|im_end|>": 7})) == [2, 7, 9]
    assert stop_token_ids(tokenizer(None, **{"<|im_end|>": 7})) == [7]
