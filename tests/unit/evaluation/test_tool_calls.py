"""A server with a parser of tool calls is asked with a tool; calls that no client can make fail the check."""

import pytest
from serving_fakes import MODEL, fake_server

from deepseek_sft.evaluation import server_checks
from deepseek_sft.evaluation.api import Api, CheckFailed
from deepseek_sft.settings.smoke_settings import SmokeSettings


def asked(*flaws):
    with fake_server(*flaws) as server:
        api = Api(f"http://127.0.0.1:{server.server_port}", MODEL, 20)
        try:
            prompts = list(server_checks.DEFAULT_PROMPTS)
            context = server_checks.Context(
                api, SmokeSettings(max_tokens=16), None, prompts, tool_call_parser="kimi_k2"
            )
            return server_checks.tool_calls(context)
        finally:
            api.close()


def test_an_answer_without_call_passes():
    assert asked() == "answered without a call"


def test_a_call_of_the_tool_that_was_offered_passes():
    assert asked("calls") == "1 calls"


def test_a_call_whose_arguments_are_no_json_fails():
    with pytest.raises(CheckFailed, match="a call of 'add' with"):
        asked("tool_calls")
