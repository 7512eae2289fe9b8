"""``auto``: vLLM's parsers are those of the served folder's family, told by its tokens and template."""

import pytest
from unit.data import gigachat, moonshot, releases
from unit.data.helpers import TOKENIZER

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import parsers, settings, vllm_commands

AUTO = {"reasoning_parser": "auto", "tool_call_parser": "auto"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    return {
        "R1": releases.base(folder / "r1", releases.R1),
        "V3": releases.base(folder / "v3", "{{ messages }}"),
        "V3.1": releases.base(folder / "v31", releases.V31),
        "Kimi-K2-Thinking": moonshot.folder(folder / "k", moonshot.KIMI_TEMPLATE, names=moonshot.KIMI_NAMES),
        "Moonlight": moonshot.folder(folder / "m"),
        "GigaChat3": gigachat.folder(folder / "g"),
    }


@pytest.mark.parametrize(
    ("release", "reasoning", "tools"),
    [
        ("R1", "deepseek_r1", "deepseek_v3"),
        ("V3", None, "deepseek_v3"),
        ("V3.1", "deepseek_v3", "deepseek_v31"),
        ("Kimi-K2-Thinking", "kimi_k2", "kimi_k2"),
        ("GigaChat3", None, "gigachat3"),
    ],
)
def test_parsers_are_those_of_the_release(folders, release, reasoning, tools):
    found = parsers.settled(settings.parse(AUTO), folders[release])
    assert (found.reasoning_parser, found.tool_call_parser) == (reasoning, tools)


def test_a_family_without_parser_of_calls_is_refused_where_one_is_asked_for(folders):
    assert parsers.settled(settings.parse({"reasoning_parser": "auto"}), folders["Moonlight"]).reasoning_parser is None
    with pytest.raises(BadInputError, match="tool_call_parser: auto: no row"):
        parsers.settled(settings.parse(AUTO), folders["Moonlight"])


def test_parsers_that_have_names_are_left_alone():
    named = settings.parse({"reasoning_parser": "deepseek_r1", "tool_call_parser": "hermes"})
    assert parsers.settled(named, TOKENIZER / "missing") == named


def test_a_parser_of_calls_comes_with_the_flag_that_uses_it():
    place = vllm_commands.Place(0, 1, "a", "lo", "a")
    command = vllm_commands.serve_command(
        "vllm", "m", settings.parse({"tool_call_parser": "kimi_k2"}), place, host="a", port=1, master_port=2, rpc_port=3
    )
    assert "--tool-call-parser kimi_k2 --enable-auto-tool-choice" in " ".join(command)


def test_the_same_by_hand_as_well_is_refused():
    given = {"tool_call_parser": "kimi_k2", "engine_args": {"tool_call_parser": "hermes"}}
    with pytest.raises(BadInputError, match=r"is decided by serve\.tool_call_parser"):
        settings.parse(given)
