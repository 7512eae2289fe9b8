"""A tokenizer that keeps control tokens and typed text apart."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .. import json_files
from ..errors import BadInputError
from .base_template import ChatTemplate, read_chat_template, token_name
from .chat_templates import ASSISTANT, BASE, END, TEMPLATES, USER, Piece
from .messages import THINK_CLOSE, THINK_OPEN
from .tokenizer_files import RANKS, fingerprint, tokenizer_text, vocabulary_file
from .words import WordEncoder, word_encoder

TAG = re.compile(r"<[^<>\s]+>")  # the shape of all of DeepSeek's added tokens


@dataclass(frozen=True)
class Segment:
    """Token ids of consecutive pieces that share one fate.

    Args:
        ids: token ids, int32.
        generated: whether the model writes them when serving.
        part: as in ``Piece``.
        whole: whether ``ids`` are the text's; else only their number is right, as the least that the text can have.
    """

    ids: NDArray[np.int32]
    generated: bool
    part: str
    whole: bool = True


@dataclass(frozen=True)
class Encoder:
    """Token ids for pieces of a template.

    Args:
        control: id of every added token (control tokens and thinking tags).
        words: encoder of text that knows no added tokens; None for tokenizers it is not made for.
        description: content of tokenizer.json.
        bos_token_id, eos_token_id: from tokenizer_config.json.
        vocab_size: largest id + 1; the model's embedding is at least this long.
        fingerprint: of tokenizer.json.
        folder: where the tokenizer lies.
        longest: bytes of the longest text that one token can stand for.
    """

    control: dict[str, int]
    words: WordEncoder | None
    description: dict[str, Any]
    bos_token_id: int
    eos_token_id: int
    vocab_size: int
    fingerprint: str
    folder: Path
    longest: int

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template beside the tokenizer, which servers use; None where there is none."""
        return read_chat_template(self.folder)

    @functools.cached_property
    def _control_ids(self) -> dict[str, NDArray[np.int32]]:
        return {name: np.array([number], np.int32) for name, number in self.control.items()}

    @functools.cached_property
    def text(self) -> Tokenizer:
        """The tokenizer without added tokens: no text, whatever it says, becomes one of them. Made where needed."""
        return Tokenizer.from_str(json.dumps(self.description | {"added_tokens": [], "post_processor": None}))

    def join(self, pieces: list[Piece]) -> list[Piece]:
        """Turn thinking tags that this tokenizer has no token for into text, and join neighbouring text.

        Text is encoded between control tokens as a whole, so that ids equal those of the rendered string.
        """
        joined: list[Piece] = []
        for piece in pieces:
            if piece.control and piece.text not in self.control:
                piece = Piece(piece.text, generated=piece.generated, part="answer" if piece.generated else "")
            last = joined[-1] if joined else None
            if last and not (last.control or piece.control) and last.generated == piece.generated:
                joined[-1] = Piece(last.text + piece.text, generated=piece.generated, part=piece.part)
            else:
                joined.append(piece)
        return joined

    def encode(self, messages: list[list[Piece]], limit: int = 1 << 40, *, cut: bool = False) -> list[list[Segment]]:
        """Encode many messages at once: text in one batch, control tokens by name.

        Args:
            limit: tokens. A text whose bytes tell that it has more is not encoded: its ids are as many zeros as it must
                have tokens at least.
            cut: encode the start of such a text instead, more than ``limit`` tokens of it.
        """
        joined = [self.join(pieces) for pieces in messages]
        ids, short = {}, set()
        for text in {p.text for pieces in joined for p in pieces if not p.control}:
            least = self.least_tokens(text) if not cut and len(text) > limit else 0
            if least > limit:
                ids[text] = np.zeros(least, np.int32)
            else:
                short.add(text)
        counted = set(ids)
        most = 2 * limit * self.longest  # characters; what follows cannot change the first ``limit`` tokens
        starts = {text: text[:most] for text in short if len(text) > most}
        found = self._texts({starts.get(text, text) for text in short})
        ids |= {text: found[starts.get(text, text)] for text in short}
        control = self._control_ids
        return [
            [
                Segment(control[p.text], p.generated, "")
                if p.control
                else Segment(ids[p.text], p.generated, p.part, p.text not in counted)
                for p in pieces
            ]
            for pieces in joined
        ]

    def least_tokens(self, text: str) -> int:
        """The least number of tokens that a text can have, by its bytes."""
        return -(-len(text.encode("utf-8", "surrogatepass")) // self.longest)

    def _texts(self, texts: set[str]) -> dict[str, NDArray[np.int32]]:
        ids = {}
        if self.words:
            found = ((text, self.words.encode(text)) for text in texts)
            ids = {text: encoded for text, encoded in found if encoded is not None}
        others = [text for text in texts if text not in ids]
        encoded = self.text.encode_batch_fast(others, add_special_tokens=False) if others else []
        return ids | {text: np.array(one.ids, np.int32) for text, one in zip(others, encoded, strict=True)}

    def mentions_control(self, text: str) -> str:
        """The first control token that text spells, which a tokenizer left to itself would have obeyed, or nothing."""
        if "<" in text and (spelled := next((tag for tag in TAG.findall(text) if tag in self.control), "")):
            return spelled
        found = self._other_names.search(text) if self._other_names else None
        return found[0] if found else ""

    @functools.cached_property
    def _other_names(self) -> re.Pattern[str] | None:
        """Control tokens of another shape than ``TAG``, such as ``[EOS]``."""
        names = [re.escape(name) for name in self.control if name and not TAG.fullmatch(name)]
        return re.compile("|".join(names)) if names else None


def load_encoder(folder: Path, template: str) -> Encoder:
    """Read ``tokenizer.json`` and ``tokenizer_config.json`` of a folder, once per process.

    Raises:
        BadInputError: a file is missing or broken, or the tokenizer lacks a token that the template needs (``auto``:
            that all need).
    """
    encoder, bos, eos = _load(Path(folder))
    if template == BASE:
        return encoder
    needed = [bos, eos, USER, ASSISTANT]
    if template in TEMPLATES and TEMPLATES[template].prompt_decides_thinking:
        needed += [THINK_OPEN, THINK_CLOSE]  # they separate prompt from answer and must not melt into text
    missing = [name for name in needed if name not in encoder.control]
    if missing or eos != END:
        raise BadInputError(
            f"the tokenizer in {folder} does not fit template {template}: "
            + (f"no token {', '.join(missing)}" if missing else f"its eos_token is {eos}, not {END}"),
            "use a DeepSeek tokenizer, or data.template: base, which renders with the base's own chat template",
        )
    return encoder


@functools.lru_cache(maxsize=2)
def _load(folder: Path) -> tuple[Encoder, str, str]:
    try:
        text = tokenizer_text(folder)
        whole = Tokenizer.from_str(text)
        config = json_files.load(folder / "tokenizer_config.json")
        description = json.loads(text)
        words = word_encoder(whole, description)
    except OSError as error:
        raise BadInputError(
            f"no tokenizer in {folder}: {error.strerror}: {Path(error.filename).name}",
            "--tokenizer names a folder with tokenizer.json or tiktoken.model and tokenizer_config.json, as the base's",
        ) from None
    except BadInputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BadInputError(f"the tokenizer in {folder} cannot be read: {error}", "copy its files again") from None
    # The library's ids, not the file's: it numbers added tokens anew where the file leaves gaps.
    control = {token.content: number for number, token in whole.get_added_tokens_decoder().items()}
    bos, eos = (token_name(config, name) for name in ("bos_token", "eos_token"))
    size = (
        max(whole.get_vocab_size(with_added_tokens=False), *(number + 1 for number in control.values()))
        if control
        else 0
    )
    vocabulary = (description.get("model") or {}).get("vocab") or ()
    byte_level = words or vocabulary_file(folder).name == RANKS  # one character a byte
    bytes_of = len if byte_level else lambda token: len(str(token).encode())
    longest = max(map(bytes_of, vocabulary), default=1)
    encoder = Encoder(
        control,
        words,
        description,
        control.get(bos, -1),
        control.get(eos, -1),
        size,
        fingerprint(folder),
        folder,
        longest,
    )
    return encoder, bos, eos
