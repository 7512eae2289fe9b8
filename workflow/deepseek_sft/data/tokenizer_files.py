"""The tokenizer of a model folder as ``tokenizer.json``: as it lies there, or made from ``tiktoken.model``.

Moonlight and Kimi-K2 ship ranks (a line each: base64 of a token's bytes, its id) and Python code that holds the
splitting pattern. The pattern stands in the family's row, so that no code of a model folder is ever run; where the code
lies beside the ranks it is looked at whether it holds that pattern.

Merges of ``tokenizer.json`` are all pairs of tokens that make a token, by the rank of what they make: what tiktoken
merges. ``check_against_library`` holds the two against each other on the very vocabulary.
"""

import ast
import base64
import binascii
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .. import files, json_files
from ..errors import BadInputError
from ..families import rows
from .words import BYTE_CHARACTERS

WHOLE, RANKS, CONFIG = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"
PROBES = (
    "I'll say: don't! It'S the 3rd of 12345 'RE\r\n\r\n\tx  =  y;   \n   ",
    "中文English混合，日本語のテスト。한국어 문장 テスト12",
    "Привет, мир! Γειά σου Ǆ ǅ ǆ שלום عربي ١٢٣٤ हिन्दी ไทย",
    "🙂👩‍👩‍👧 e\u0301 ſ'ſ ß ﬁ \u00a0\u2028\u3000 \ue000 𠮷野家 \U000e0001",
    "<|im_end|><｜User｜>[BOS] [EOS]</s>",
)


def vocabulary_file(folder: Path) -> Path:
    """The file that holds a folder's vocabulary; ``tokenizer.json`` where it has none."""
    return folder / (RANKS if not (folder / WHOLE).exists() and (folder / RANKS).exists() else WHOLE)


def tokenizer_text(folder: Path) -> str:
    """Content of a folder's ``tokenizer.json``, read or made.

    Raises:
        OSError: it has neither file, or one cannot be read.
        BadInputError: ``tiktoken.model`` is damaged, or of a tokenizer that no family's row knows.
    """
    path = vocabulary_file(folder)
    if path.name == WHOLE:
        return path.read_text(encoding="utf-8")
    return _made(path, path.stat().st_mtime_ns, (folder / CONFIG).stat().st_mtime_ns)


def control_tokens(folder: Path) -> set[str]:
    """Names of the control tokens of a folder's ``tokenizer.json``, read or made.

    Raises:
        As ``tokenizer_text``; also ValueError: it is no JSON object.
    """
    added = json_files.parse(tokenizer_text(folder)).get("added_tokens") or []
    return {token["content"] for token in added}


def fingerprint(folder: Path) -> str:
    """Of ``tokenizer.json``, read or made: the same for a model folder and for the one that is served."""
    path = vocabulary_file(folder)
    if path.name == WHOLE:
        return files.fingerprint_file(path, full=True)
    return f"sha256:{hashlib.sha256(tokenizer_text(folder).encode()).hexdigest()}"


@functools.lru_cache(maxsize=2)
def _made(path: Path, _modified: int, _config_modified: int) -> str:
    folder = path.parent
    config = json_files.load(folder / CONFIG)
    row = rows.tiktoken_of(config) if isinstance(config, dict) else None
    if row is None:
        known = ", ".join(dict.fromkeys(name for f in rows.FAMILIES if f.tiktoken for name in f.tiktoken.code))
        raise BadInputError(
            f"{path}: the pattern by which this tokenizer splits text is not known: auto_map of {CONFIG} names none of "
            f"{known}",
            f"put a {WHOLE} of the same tokenizer beside it; code from a model folder is never run",
        )
    check_code(folder, row)
    return json.dumps(description(read_ranks(path), config, row), ensure_ascii=False)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ids.

    The library's own reader keeps a copy by the path in a temporary folder, which outlives a changed file.

    Raises:
        BadInputError: a line is no token and rank, a rank is there twice or missing, a byte has no token.
    """
    files.refuse_pointer(path)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise BadInputError(f"{path}:{number} is no token and rank", "fetch this file again") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise BadInputError(f"{path}: ranks are not 0 to {len(ranks) - 1}, each once", "fetch this file again")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise BadInputError(f"{path} has no token for {len(lacking)} bytes, such as {lacking[0]}", "fetch it again")
    return ranks


def check_code(folder: Path, row: rows.Tiktoken) -> None:
    """
    Raises:
        BadInputError: the tokenizer's code, where it lies in the folder, holds another pattern than the family's row.
    """
    for path in (folder / f"{name}.py" for name in row.code):
        if not path.exists():
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError) as error:
            raise BadInputError(f"{path} cannot be read: {error}", "fetch this file again") from None
        held = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        lacking = [one for one in row.pattern if not any(one in text for text in held)]
        if lacking:
            raise BadInputError(
                f"{path} splits text by another pattern than this family's: it does not hold {lacking[0]}",
                f"put a {WHOLE} of the same tokenizer beside it, or correct the family's row",
            )


def special_tokens(ranks: dict[bytes, int], config: dict[str, Any], row: rows.Tiktoken, path: str) -> dict[str, int]:
    """Name → id of every token after the ranks.

    Raises:
        BadInputError: tokenizer_config.json puts one among the ranks or beyond the reserved ones, or names two alike.
    """
    try:
        named = {int(key): str(value["content"]) for key, value in (config.get("added_tokens_decoder") or {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: added_tokens_decoder cannot be read: {error!r}", "fetch it again") from None
    first, end = len(ranks), len(ranks) + row.reserved
    wrong = [number for number in named if not first <= number < end + row.beyond]
    if wrong:
        raise BadInputError(
            f"{path}: {named[wrong[0]]} has id {wrong[0]}; special tokens of {first} ranks are {first} to "
            f"{end + row.beyond - 1}",
            f"fetch {RANKS} and {CONFIG} of one release",
        )
    numbers = [*range(first, end), *sorted(number for number in named if number >= end)]
    names = {named.get(number, row.reserved_name.format(number)): number for number in numbers}
    if len(names) != len(numbers):
        raise BadInputError(f"{path}: two special tokens of one name", "fetch it again")
    return names


def description(ranks: dict[bytes, int], config: dict[str, Any], row: rows.Tiktoken) -> dict[str, Any]:
    """Content of a ``tokenizer.json`` with the same ids."""
    spelled = {token: "".join([BYTE_CHARACTERS[byte] for byte in token]) for token in ranks}
    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = []
    for token in ordered:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        merges += [
            [spelled[a], spelled[b]] for a, b in sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        ]
    special = special_tokens(ranks, config, row, CONFIG)
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": "|".join(row.pattern)}, "behavior": "Isolated", "invert": False}
    bytes_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **options} for name, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_level]},
        "post_processor": None,
        "decoder": bytes_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is that token, as tiktoken looks it up first
            "vocab": {spelled[token]: ranks[token] for token in ordered},
            "merges": merges,
        },
    }


def check_against_library(folder: Path) -> int:
    """Hold the tokenizer made from ``tiktoken.model`` against the tiktoken library.

    Returns:
        Texts compared: every token that is text, and some of many scripts; 0 where the folder has a ``tokenizer.json``.

    Raises:
        BadInputError: ids differ on one.
    """
    path = vocabulary_file(folder)
    if path.name == WHOLE:
        return 0
    import tiktoken  # of the workflow's environment alone

    made = Tokenizer.from_str(tokenizer_text(folder))
    config = json_files.load(folder / CONFIG)
    row, ranks = rows.tiktoken_of(config), read_ranks(path)
    assert row is not None  # tokenizer_text has asked
    special = special_tokens(ranks, config, row, str(folder / CONFIG))
    library = tiktoken.Encoding(path.name, pat_str="|".join(row.pattern), mergeable_ranks=ranks, special_tokens=special)
    texts = [*PROBES, *special, *filter(None, (token.decode("utf-8", "ignore") for token in ranks))]
    texts += ["".join(texts[start : start + 50]) for start in range(0, len(texts), 50)]
    for text, one in zip(texts, made.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        if one.ids != library.encode(text, allowed_special="all"):
            raise BadInputError(
                f"{path}: the tokenizer made from it gives other ids than the tiktoken library for {text[:60]!r}",
                f"put a {WHOLE} of the same tokenizer beside it, and report this text",
            )
    return len(texts)


def served_config(folder: Path) -> bytes:
    """Content of ``tokenizer_config.json`` for a server that runs no code of a model folder."""
    config = json_files.load(folder / CONFIG)
    kept = {name: value for name, value in config.items() if name not in ("auto_map", "vocab_file", "tokenizer_file")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return json.dumps(kept, ensure_ascii=False, indent=2).encode() + b"\n"
