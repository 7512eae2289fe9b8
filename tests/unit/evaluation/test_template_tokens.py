"""Tokens of the served folder's own chat template are found where they stand as text, and nothing else is."""

import pytest
from unit.data import gigachat, moonshot
from unit.data.helpers import TOKENIZER

from deepseek_sft.evaluation import template_tokens
from deepseek_sft.evaluation.api import Reply
from deepseek_sft.evaluation.held_out import leaked_tokens, well_formed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    return {
        "deepseek": TOKENIZER,
        "moonlight": moonshot.folder(folder / "moonlight"),
        "kimi": moonshot.folder(folder / "kimi", moonshot.KIMI_TEMPLATE, names=moonshot.KIMI_NAMES),
        "gigachat": gigachat.folder(folder / "gigachat"),
    }


@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("deepseek", "<｜end▁of▁sentence｜>"),
        ("moonlight", "<|im_end|>"),
        ("kimi", "<|tool_calls_section_begin|>"),
        ("gigachat", "<|message_sep|>"),
    ],
)
def test_a_token_of_the_folders_template_as_text_is_a_leak(folders, family, token):
    tokens = template_tokens.of_folder(folders[family])
    reply = Reply(answer=f"5{token}", finish_reason="stop")
    assert leaked_tokens(reply, None, tokens) == leaked_tokens(reply, None) == [token]
    assert not well_formed(reply, None, tokens)


@pytest.mark.parametrize("text", ["<s>struck</s>", "BERT's [PAD]", "F#: <|> x <| f |> y", "<think>\nx</think>\n\n5"])
def test_what_an_answer_may_speak_of_is_none(folders, text):
    for folder in folders.values():
        assert leaked_tokens(Reply(answer=text), None, template_tokens.of_folder(folder)) == []


def test_a_token_of_another_family_is_text(folders):
    assert leaked_tokens(Reply(answer="<|im_end|>"), None, template_tokens.of_folder(folders["gigachat"])) == []
