"""Names of what is held out, and what of it the smoke test is given."""

HELD_OUT = "held_out.jsonl"  # beside train.jsonl
PROMPTS = 100  # at most
LONGEST_QUESTION = 2000  # bytes of one, so that it fits a context of twice as many tokens with room for an answer
PROMPTS_FILE = "held_out_prompts.jsonl"  # beside train.jsonl
