"""Tokenize texts with the prefix of their role or after a query, and truncate them on request."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, pre_tokenizers

from shared_engine.documents import Role
from shared_engine.errors import CheckpointError, ImageTooLargeError, InputTooLongError
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import TokenizerConfig, read, refuse
from shared_engine.options import Truncate

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles

TokenIds = NDArray[np.int32]

TEXTS_PER_CALL, CHARACTERS_PER_CALL = 256, 2**19
"""Limits of one call of the library, which holds some 70 bytes per character."""
_CHARACTERS_PER_TOKEN = 16
"""Characters of a very long text that are tokenized per token of the limit; more if too few."""
_MARGIN = 512
"""Tokens next to a cut that may differ from those of the whole text."""
_MAX_WORD = 128
"""Characters that are searched for white space next to a cut."""
_SPACE = re.compile(r"\s")
_GUARD = "\u200c"
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern of Mistral's words. Source: `_patch_mistral_regex` in transformers'
`tokenization_utils_tokenizers.py`."""


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Raise a panic of the library as a RuntimeError; it is no Exception and would end a worker."""
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizers library panicked: {exc}") from None


def create_tokenizer(folder: Path, content: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Some conversions of Mistral's tokenizers split words as Llama's; if tokenizer_config.json sets
    `fix_mistral_regex`, they are split as Mistral's, as in transformers.
    """
    made = Tokenizer.from_str(content)
    if read(folder / "tokenizer_config.json", TokenizerConfig).fix_mistral_regex:
        words = pre_tokenizers.Split(Regex(_TEKKEN_SPLIT), "isolated")
        characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    return made


class TextTokenizer:
    """The tokenizer of a checkpoint, tokenizer.json. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read tokenizer.json.

        Raises:
            CheckpointError: the file is missing, invalid, or has ids outside the vocabulary.
        """
        path = checkpoint.folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{checkpoint.folder} has no tokenizer.json")
        self.limit = checkpoint.max_tokens
        self.limit_with_image = checkpoint.max_tokens_with_image
        self._bos = checkpoint.config.bos_token_id or 0
        self._prompts, self._scoring = checkpoint.prompts, checkpoint.scoring
        self._vision = checkpoint.vision
        self._guards_text = self._vision is not None and self._vision.guards_text
        names = list(self._vision.names) if self._vision else []
        try:
            content = path.read_text(encoding="utf-8")
            if names and not self._guards_text:
                content, names = _hide_tokens(content, names)
            with _panics_as_errors():
                self._tokenizer = create_tokenizer(checkpoint.folder, content)
                self._encode_prompts()
        except CheckpointError:
            raise
        except Exception as exc:  # the library raises a bare Exception
            raise CheckpointError(f"{path} cannot be read: {exc}") from exc
        if dropout := getattr(self._tokenizer.model, "dropout", None):
            refuse(path, "model.dropout", dropout, "null, as ids would be random")
        self._image_tokens = [self._tokenizer.token_to_id(name) for name in names]
        vocabulary = self._tokenizer.get_vocab().values()
        self.size = 1 + max([*vocabulary, *itertools.chain(*self._kept.values())], default=-1)
        self._check_ids(path, max(checkpoint.config.vocab_size, len(vocabulary)))

    def _encode_prompts(self) -> None:
        tokenizer = self._tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self._guards_text
        # Kept by truncation: BOS and prefix, without the last space, which joins the text.
        self._kept = {
            role: tokenizer.encode(prompt.rstrip()).ids for role, prompt in self._prompts.items()
        }
        self._before_image = tokenizer.encode(self._prompts.get("document", "")).ids
        # After these characters, the tokenizer removes the guard of NVIDIA's processor, which keeps
        # special tokens out of texts. One that a user wrote must stay.
        self._guarded = [
            character
            for character in ("[<" if self._guards_text else "")
            if self._ids_of(character) == self._ids_of(character + _GUARD)
        ]

    def _check_ids(self, path: Path, rows: int) -> None:
        if self.size > rows:
            raise CheckpointError(
                f"{path} has a token with id {self.size - 1}; expected ids below {rows}, the "
                "number of tokens or vocab_size of config.json"
            )
        if (vision := self._vision) is None:
            return
        ids = dict(zip(vision.names, self._image_tokens, strict=True))
        if None in ids.values() or ids[vision.context_name] != vision.context_token:
            raise CheckpointError(
                f"{path} has {', '.join(ids)} as {', '.join(map(str, ids.values()))}; expected "
                f"three ids, that of {vision.context_name} {vision.context_token}, as in "
                "config.json"
            )

    @_panics_as_errors()
    def encode(
        self, texts: Sequence[str], role: Role, truncate: Truncate
    ) -> list[TokenIds | InputTooLongError]:
        """Return the ids of each text with BOS and prefix: at most `limit` ids, or an error.

        The prefix is added even if the text begins with the same word. Without prefix and BOS, an
        empty text becomes one BOS. Over the limit, "END" drops tokens from the end of the text and
        "START" from its beginning, as at a NIM, and keeps BOS and prefix; "NONE" returns an error
        in place of the ids.
        """
        return self._encode_all(self._prompts[role], self._kept[role], texts, truncate)

    @_panics_as_errors()
    def check_query(self, query: str) -> None:
        """Refuse a query that leaves no space for a document.

        Raises:
            InputTooLongError: it does.
        """
        assert self._scoring is not None
        rest = query + self._scoring.before_document
        ((ids, is_whole),) = self._encode(self._scoring.before_query, [rest], self.limit, "NONE")
        tokens = len(ids)
        if tokens >= self.limit:
            over = "" if is_whole else "over "
            raise InputTooLongError(
                f"the query has {over}{tokens} tokens with its prompt; expected less than "
                f"{self.limit}, the limit of query and document together; use a shorter query",
                tokens=tokens,
                limit=self.limit,
            )

    @_panics_as_errors()
    def encode_pairs(
        self, query: str, texts: Sequence[str], truncate: Truncate
    ) -> list[TokenIds | InputTooLongError]:
        """Return the ids of each text after a query, with BOS: at most `limit` ids, or an error.

        Query and text are tokenized as one string, because words may join where they meet. Unlike
        NVIDIA's code, which deletes the first `<image>` in a prompt, all of both stays text.
        """
        return self._encode_all(self._prompt_of(query), [], texts, truncate)

    @_panics_as_errors()
    def encode_with_image(
        self, image: Tiles, text: str, truncate: Truncate, query: str | None = None
    ) -> TokenIds:
        """Return the ids of a prepared image with a text, at most `limit_with_image`.

        They are the prefix of a document, the tokens of the image, a space, the prompt of the query
        if there is one, and the text, which may be empty. Only the text is cut.

        Raises:
            ImageTooLargeError: the image alone exceeds the limit.
            InputTooLongError: image and text exceed the limit, and `truncate` is "NONE"; or image
                and query leave no space for a text.
        """
        assert self._vision is not None
        limit = self.limit_with_image
        start = [*self._before_image, *self._vision.lay_out(image, self._image_tokens)]
        if len(start) > limit:
            raise ImageTooLargeError(
                f"has an image of {len(start)} tokens; the limit is {limit}; use "
                f"{self._vision.smaller} or a larger max_tokens",
            )
        before, free = " ", limit - len(start)
        if query is not None:
            before += self._prompt_of(query)
            tokens = len(self._tokenizer.encode(before, add_special_tokens=False).ids)
            if tokens >= free:
                raise InputTooLongError(
                    f"has an image of {len(start)} tokens for a query of {tokens}; expected less "
                    f"than {limit} together; use {self._vision.smaller} or a shorter query",
                    tokens=len(start) + tokens,
                    limit=limit,
                )
        ((words, is_whole),) = self._encode(before, [text], free, truncate, special=False)
        ids = np.concatenate([np.array(start, np.int32), words])
        if len(ids) <= limit:
            return ids
        cut = _cut(ids, len(start), limit, truncate, is_whole)
        if isinstance(cut, InputTooLongError):
            raise cut
        return cut

    def _prompt_of(self, query: str) -> str:
        assert self._scoring is not None
        return f"{self._scoring.before_query}{query}{self._scoring.before_document}"

    def _encode_all(
        self, prompt: str, kept: list[int], texts: Sequence[str], truncate: Truncate
    ) -> list[TokenIds | InputTooLongError]:
        """Return the ids of each text after a prompt; see `encode`.

        Args:
            kept: The ids of the prompt, which "START" keeps.
        """
        out: list[TokenIds | InputTooLongError] = []
        for batch in self._split(texts):
            for ids, is_whole in self._encode(prompt, batch, self.limit, truncate):
                if len(ids) > self.limit:
                    count = _count_equal(kept[: self.limit], ids.tolist())
                    out.append(_cut(ids, count, self.limit, truncate, is_whole))
                else:
                    out.append(ids if len(ids) else np.array([self._bos], np.int32))
        return out

    def _split(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Yield the texts in batches for one call of the library each."""
        longest = _CHARACTERS_PER_TOKEN * (self.limit + _MARGIN) + _MAX_WORD
        batch: list[str] = []
        characters = 0
        for text in texts:
            length = min(len(text), longest)
            is_full = len(batch) == TEXTS_PER_CALL or characters + length > CHARACTERS_PER_CALL
            if batch and is_full:
                yield batch
                batch, characters = [], 0
            batch.append(text)
            characters += length
        if batch:
            yield batch

    def _encode(
        self,
        before: str,
        texts: Sequence[str],
        limit: int,
        truncate: Truncate,
        special: bool = True,
    ) -> Iterator[tuple[TokenIds, bool]]:
        """Yield the ids of each text after `before`, and whether they are of the whole text.

        Of a very long text they are enough for `_cut`.
        """
        enough = limit + _MARGIN
        characters = _CHARACTERS_PER_TOKEN * enough
        parts = [shorten(text, characters, truncate) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(
            [self._join(before, part) for part in parts], add_special_tokens=special
        )
        for text, first, encoding in zip(texts, parts, encodings, strict=True):
            part, ids, length = first, encoding.ids, characters
            while part is not text and len(ids) < enough:
                length = length * max(2, 1 + enough // (len(ids) + 1))
                part = shorten(text, length, truncate)
                ids = self._tokenizer.encode(
                    self._join(before, part), add_special_tokens=special
                ).ids
            yield np.array(ids, np.int32), part is text

    def _join(self, before: str, text: str) -> str:
        for character in self._guarded:
            text = text.replace(character, character + _GUARD)
        return (before + text).rstrip() if self._guards_text else before + text

    def _ids_of(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _count_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of ids in which the beginnings of two sequences are equal."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


def shorten(text: str, length: int, truncate: Truncate) -> str:
    """Return the beginning of a very long text, or its end for "START", cut at white space.

    The part has at least `length` characters. Its tokens are those of the whole text, except up to
    `_MARGIN` tokens next to the cut. With "START", a run of one character or of digits across the
    cut may be split into other tokens than in the whole text.
    """
    if len(text) <= length + _MAX_WORD:
        return text
    if truncate == "START":
        begin = len(text) - length
        space = _SPACE.search(text, begin - _MAX_WORD, begin)
        return text[space.start() if space else begin :]
    space = _SPACE.search(text, length, length + _MAX_WORD)
    return text[: space.start() if space else length]


def _cut(
    ids: TokenIds, kept: int, limit: int, truncate: Truncate, is_whole: bool
) -> TokenIds | InputTooLongError:
    """Return `limit` of the ids with the first `kept`, or for "NONE" an error."""
    if truncate == "END":
        return ids[:limit]
    if truncate == "START":
        return np.concatenate([ids[:kept], ids[len(ids) - (limit - kept) :]])
    tokens = len(ids) if is_whole else len(ids) - _MARGIN
    return InputTooLongError(
        f"has {'' if is_whole else 'over '}{tokens} tokens; the limit is {limit}; split it, or use "
        'truncate="END" to cut it off there',
        tokens=tokens,
        limit=limit,
    )


def _hide_tokens(content: str, names: list[str]) -> tuple[str, list[str]]:
    """Return a tokenizer.json with random names for some tokens, and these names.

    Then `<IMG_CONTEXT>` in a text is ordinary text and cannot move an image.
    """
    parsed = json.loads(content)
    hidden = {name: f"{name}{secrets.token_hex(16)}" for name in names}
    for token in parsed.get("added_tokens") or ():
        token["content"] = hidden.get(token["content"], token["content"])
    return json.dumps(parsed), list(hidden.values())
