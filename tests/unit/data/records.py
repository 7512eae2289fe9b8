"""One typical record of every public format, with what it must become."""

from typing import Any

from unit.data.helpers import answer, assistant, called, system, tool, user

TAGGED = "<|begin_of_thought|>\n\nR\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nA\n\n<|end_of_solution|>"
ASKS_FOR_TAGS = "Put the thought between <|begin_of_thought|> and <|end_of_thought|>."
THOUGHT = "<think>\nR\n</think>\n\nA"
ONE_TURN = [user("Q"), answer("R", "A")]
OPENR1 = {
    "problem": "Q", "solution": "S", "answer": "4", "problem_type": "Algebra", "question_type": "math-word-problem",
    "source": "olympiads", "uuid": "u-1", "is_reasoning_complete": [False, True, True],
    "generations": ["<think>\ncut", "<think>\nW\n</think>\n\nwrong", THOUGHT],
    "correctness_math_verify": [False, False, True], "correctness_llama": None, "finish_reasons": None,
    "correctness_count": 1, "messages": [user("Q"), assistant("<think>\nW\n</think>\n\nwrong")],
}  # fmt: skip

# name → (record, format that auto chooses, messages)
RECORDS: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "openai": ({"messages": [user("Q"), assistant("A", reasoning_content="R")]}, "openai", ONE_TURN),
    "openai-tools": (
        {"messages": [user("Q"), called("f"), tool("4", tool_call_id="f"), assistant("A", reasoning="R")]},
        "openai",
        [
            user("Q"),
            {
                "role": "assistant", "content": "", "loss": True,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": "f"}'}}],
            },
            tool("4"),
            answer("R", "A"),
        ],
    ),
    "sharegpt": (
        {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": THOUGHT}]},
        "sharegpt",
        [system("S"), *ONE_TURN],
    ),
    "sharegpt-tools": (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": "f"}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "A"},
            ]
        },
        "sharegpt",
        [
            user("Q"),
            {
                "role": "assistant", "content": "", "loss": True,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": "f"}'}}],
            },
            tool("4"),
            assistant("A", loss=True),
        ],
    ),
    "alpaca": ({"instruction": "Q", "input": "", "output": THOUGHT}, "alpaca", ONE_TURN),
    "OpenThoughts-114k": (
        {
            "system": ASKS_FOR_TAGS,
            "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": TAGGED}],
        },
        "thought-tags",
        ONE_TURN,
    ),
    "OpenThoughts-114k, raw columns": (
        {"problem": "Q", "deepseek_reasoning": "R", "deepseek_solution": "A", "domain": "math", "source": "x"},
        "openthoughts-columns",
        ONE_TURN,
    ),
    "Bespoke-Stratos-17k": (
        {"system": "S", "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": TAGGED}]},
        "thought-tags",
        [system("S"), *ONE_TURN],
    ),
    "OpenR1-Math-220k": (OPENR1, "openr1-math", ONE_TURN),
    "s1K": (
        {
            "question": "Q", "solution": "S", "cot_type": "math", "source_type": "x", "metadata": "{}", "cot": None,
            "thinking_trajectories": ["R"], "attempt": "A",
        },
        "s1k",
        ONE_TURN,
    ),
    "s1K-1.1": (
        {
            "question": "Q", "solution": "S", "cot_type": "math", "metadata": "{}",
            "gemini_thinking_trajectory": "G", "gemini_attempt": "g", "gemini_grade": "No",
            "deepseek_thinking_trajectory": "R", "deepseek_attempt": "A", "deepseek_grade": "Yes",
        },
        "s1k-1.1",
        ONE_TURN,
    ),
    "Chinese-DeepSeek-R1-Distill-110k": (
        {"input": "Q", "reasoning_content": "\nR", "content": "\nA", "repo_name": "x", "score": 10},
        "chinese-r1-distill",
        ONE_TURN,
    ),
    "Chinese-DeepSeek-R1-Distill-110k-SFT": (
        {"instruction": "Q", "input": "", "output": THOUGHT, "repo_name": "x", "score": 10},
        "alpaca",
        ONE_TURN,
    ),
    "AM-DeepSeek-R1-Distilled-1.4M": (
        {
            "messages": [
                {**user("Q"), "info": {"source": "x", "think_content": None, "answer_content": None}},
                assistant("<think>R</think><answer>A</answer>", info={"think_content": "R", "answer_content": "A"}),
            ]
        },
        "am-r1-distilled",
        ONE_TURN,
    ),
}  # fmt: skip
