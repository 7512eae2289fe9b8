"""Model families of the class ``DeepseekV3ForCausalLM``, one row of data each.

What is computed follows from the numbers in ``config.json``; a row says what cannot be read there: under which
``model_type`` the family comes, how its tokenizer splits text, which parsers of vLLM read what it writes.

Sources: ``config.json``, ``tokenizer_config.json`` and ``tokenization_*.py`` of the releases; vLLM's registry.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURE = "DeepseekV3ForCausalLM"
MODEL_TYPE = "deepseek_v3"  # under which servers know the class without code from the folder

# Splitting pattern of Moonlight's and Kimi-K2's tokenization_*.py (``TikTokenTokenizer.pat_str``), by alternatives.
MOONSHOT_PATTERN = (
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)


@dataclass(frozen=True)
class Tiktoken:
    """How a family's ``tiktoken.model`` becomes a tokenizer; its Python code says so and is never run.

    Args:
        code: names of the modules that ``auto_map`` of tokenizer_config.json names.
        pattern: alternatives of the pattern that splits text into words.
        reserved: special tokens after the last rank that the models' embeddings have rows for.
        beyond: how many more the code numbers. Such a one is a token where tokenizer_config.json names it.
        reserved_name: of a special token that tokenizer_config.json does not name.
    """

    code: tuple[str, ...]
    pattern: tuple[str, ...]
    reserved: int
    beyond: int = 0
    reserved_name: str = "<|reserved_token_{}|>"


@dataclass(frozen=True)
class Parsers:
    """vLLM's parsers of a release.

    Args:
        reasoning, tools: their names; empty where it has none.
        variable: of the chat template, by which releases of one family are told apart; empty: all others.
    """

    reasoning: str = ""
    tools: str = ""
    variable: str = ""


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        name: as messages name it.
        model_types: what ``config.json`` may say.
        token: a control token of its tokenizers, by which a served folder is known.
        tiktoken: where its releases ship ``tiktoken.model``; None where they ship ``tokenizer.json``.
        parsers: by release, the first that fits; none where vLLM has none.
    """

    name: str
    model_types: tuple[str, ...]
    token: str
    tiktoken: Tiktoken | None = None
    parsers: tuple[Parsers, ...] = ()


_MOONSHOT = Tiktoken(("tokenization_moonshot", "tokenization_kimi"), MOONSHOT_PATTERN, reserved=256, beyond=2)
_V31 = Parsers("deepseek_v3", "deepseek_v31", variable="thinking")  # a request decides whether it thinks
DEEPSEEK = Family(
    "DeepSeek-V3", ("deepseek_v3",), "<｜tool▁calls▁begin｜>", parsers=(_V31, Parsers("deepseek_r1", "deepseek_v3"))
)
KIMI = Family(
    "Kimi-K2", ("kimi_k2",), "<|tool_calls_section_begin|>", _MOONSHOT, parsers=(Parsers("kimi_k2", "kimi_k2"),)
)
MOONLIGHT = Family("Moonlight", ("deepseek_v3",), "<|im_middle|>", _MOONSHOT)  # Kimi-K2 has this token as well
GIGACHAT = Family("GigaChat3", ("deepseek_v3",), "<|role_sep|>", parsers=(Parsers(tools="gigachat3"),))
FAMILIES = (DEEPSEEK, KIMI, MOONLIGHT, GIGACHAT)

# Families that share much with this class and are not trained, and what is missing.
REFUSED = {
    "deepseek_v32": "DeepSeek-V3.2 adds sparse attention (an indexer per layer), which training does not compute",
    "deepseek_v4": "DeepSeek-V4 has hyper-connections and compressed attention, another model than V3's",
    "kimi_k25": "Kimi-K2.5 holds the text model inside KimiK25ForConditionalGeneration beside a vision tower",
    "glm_moe_dsa": "GLM-5 adds sparse attention (an indexer per layer), which training does not compute",
}


def model_types() -> tuple[str, ...]:
    """Every ``model_type`` that is accepted, each once."""
    return tuple(dict.fromkeys(name for family in FAMILIES for name in family.model_types))


def why_refused(published: Mapping[str, Any]) -> str:
    """What is missing for a model that is known and not trained; empty for others."""
    kind = published.get("model_type")
    return REFUSED.get(kind, "") if isinstance(kind, str) else ""


def parsers_of(tokens: Collection[str], template: str) -> Parsers:
    """vLLM's parsers of a folder with these control tokens and this chat template; of none where no row has them."""
    family = next((family for family in FAMILIES if family.token in tokens), None)
    rows = family.parsers if family else ()
    return next((one for one in rows if not one.variable or one.variable in _words(template)), Parsers())


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def tiktoken_of(tokenizer_config: Mapping[str, Any]) -> Tiktoken | None:
    """How the ``tiktoken.model`` beside a ``tokenizer_config.json`` is read; None where no row knows its code."""
    named = tokenizer_config.get("auto_map")
    found = named.get("AutoTokenizer") if isinstance(named, Mapping) else None
    classes = found if isinstance(found, list) else [found]
    modules = {one.rpartition(".")[0].rpartition("--")[2] for one in classes if isinstance(one, str)}
    rows = (family.tiktoken for family in FAMILIES if family.tiktoken)
    return next((row for row in rows if modules & set(row.code)), None)
