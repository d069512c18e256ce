"""Convert records (text, chat messages or token ids) to token ids, with the end-of-text token after each document.

Text is tokenized without special tokens: a string that looks like one (`<s>`) stays text. Ids take 4 bytes each.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models import BaseModel, render_chat
from .packing import Tokens
from .readers import LARGEST_DOCUMENT, TOO_LARGE, Record, kind_name

BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 500_000
"""Most documents, and approximately the most characters, per call of the tokenizer."""
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<EOS_TOKEN>", "<eos>", "</s>")
"""Tokens that end a document in pretraining, by the names that published models give them."""
MESSAGES = "messages"


class BadRow(Exception):
    """A row that cannot be used; the message describes the problem."""


@dataclass(frozen=True)
class Document:
    """One checked record: its text, or token ids that were given."""

    where: str
    text: str = ""
    ids: Tokens | None = None
    chat: bool = False
    """Whether the text was rendered by a chat template, so that special tokens in it are control tokens."""

    @property
    def size(self) -> int:
        """Characters, or tokens where ids are given."""
        return len(self.text) if self.ids is None else len(self.ids)


class Encoder:
    """Checks records and turns them into token ids, with one base's tokenizer."""

    def __init__(self, base: BaseModel, text_key: str) -> None:
        self.base, self.text_key = base, text_key
        self.columns = (text_key, "input_ids", "attention_mask", "labels", MESSAGES)
        """Fields of a record that are used."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return self.base.tokenizer

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the base's embedding."""
        return int(self.base.config.get_text_config().vocab_size)

    @cached_property
    def separator(self) -> list[int]:
        """The end-of-text token, which closes every document; empty for a tokenizer without one."""
        token = end_of_text(self.tokenizer)
        return [] if token is None else [token]

    @cached_property
    def signature(self) -> str:
        """A digest of everything that the ids of a document depend on."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        facts = [content, self.text_key, self.separator, self.vocabulary, repr(tokenizer.chat_template), self._names]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def _names(self) -> list[str]:
        """The special tokens as they are written, the longest first."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*map(str, self.tokenizer.all_special_tokens), *added}, key=lambda name: (-len(name), name))

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Pattern that matches the written form of special tokens."""
        return re.compile("|".join(map(re.escape, self._names))) if self._names else None

    def look_alikes(self, text: str) -> int:
        """How many pieces of a text are written like a special token."""
        return len(self._special.findall(text)) if self._special else 0

    def check(self, record: Record) -> Document:
        """Check a record and convert it to a document.

        Raises:
            BadRow: with the reason why the record cannot be used.
        """
        if record.problem:
            raise BadRow(record.problem)
        values = record.values
        if values.get("input_ids") is not None:
            return Document(record.where, ids=self._given_ids(values))
        found = values.get(self.text_key)
        if isinstance(found, str):
            if len(found) > LARGEST_DOCUMENT:
                raise BadRow(f"its text {TOO_LARGE.format(LARGEST_DOCUMENT)} rows")
            return Document(record.where, _without_lone_surrogates(found))
        if _is_chat(found) or (self.text_key not in values and MESSAGES in values):
            return Document(record.where, self._rendered(found or values[MESSAGES]), chat=True)
        if self.text_key in values:
            raise BadRow(f"{self.text_key!r} must be text; found {kind_name(found)}")
        present = ", ".join(map(str, values)) or "nothing"
        raise BadRow(f"no text under {self.text_key!r} (found {present}); name the field in data.text_key")

    def _given_ids(self, values: dict[str, Any]) -> Tokens:
        """Token ids of a pre-tokenized row without its padding."""
        ids = _whole_numbers("input_ids", values["input_ids"])
        if values.get("attention_mask") is not None:
            ids = _unpadded(ids, _whole_numbers("attention_mask", values["attention_mask"]))
        if values.get("labels") is not None:
            _check_labels(ids, _whole_numbers("labels", values["labels"]))
        limit = min(len(self.tokenizer), self.vocabulary)
        if len(ids) and not (ids.min() >= 0 and ids.max() < limit):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise BadRow(f"input_ids reach {wrong}, outside the base's vocabulary of {limit} tokens")
        return ids.astype(np.int32)

    def _rendered(self, messages: object) -> str:
        """Render a conversation with the tokenizer's chat template."""
        if not _is_chat(messages):
            raise BadRow(f"{MESSAGES} must be a list of objects with role and content; found {kind_name(messages)}")
        if not self.tokenizer.chat_template:
            raise BadRow(
                f"{MESSAGES} need a chat template, which this tokenizer lacks; write the text into {self.text_key!r}"
            )
        contents = [_without_lone_surrogates(each["content"]) for each in messages if isinstance(each["content"], str)]  # type: ignore[attr-defined]
        if self._special and (found := self._special.search("\n".join(contents))):
            raise BadRow(f"{MESSAGES} contain {found[0]!r}, which the chat template would turn into a control token")
        try:
            return render_chat(self.tokenizer, messages)
        except UserError as error:
            raise BadRow(f"{MESSAGES}: {error}") from error

    def encode(self, documents: Iterable[Document]) -> Iterator[Tokens]:
        """Yield the token ids of each document, `[]` for an empty one, in order.

        Raises:
            UserError: if the tokenizer gives ids that the base has no embedding for.
        """
        for batch in _batches(documents):
            encoded = {chat: self._tokenize(batch, chat) for chat in {each.chat for each in batch}}
            for document in batch:
                yield self._closed(document, encoded[document.chat])

    def _tokenize(self, batch: list[Document], chat: bool) -> Iterator[list[int]]:
        texts = [each.text for each in batch if each.ids is None and each.chat == chat]
        if not texts:
            return iter(())
        return iter(self._plain(texts, special=chat))

    def _plain(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Ids of texts, without a prefix; with `special`, special tokens in the texts become control tokens."""
        options = {"add_special_tokens": False, "split_special_tokens": not special, "verbose": False}
        found = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **options)
        return found["input_ids"]  # type: ignore[no-any-return]

    @cached_property
    def _special_ids(self) -> NDArray[np.int64]:
        """Ids of the special tokens, except that of unknown text."""
        ids = self.tokenizer.convert_tokens_to_ids(self._names)
        return np.setdiff1d(
            np.array(ids, np.int64), [-1 if self.tokenizer.unk_token_id is None else self.tokenizer.unk_token_id]
        )

    def _without_special_ids(self, text: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokenize a text in parts, cut within its look-alikes, if the vocabulary contains these (as in Unigram)."""
        cuts = [(match.start() + match.end()) // 2 for match in self._special.finditer(text)] if self._special else []
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        return np.concatenate([np.array(each, np.int64) for each in self._plain(parts)]) if cuts else ids

    def _closed(self, document: Document, encoded: Iterator[list[int]]) -> Tokens:
        """A document's ids, followed by the end-of-text token."""
        given = document.ids
        if given is None:
            ids = np.array(next(encoded), dtype=np.int64)
            if not document.text.strip():
                return np.zeros(0, np.int32)
            if not document.chat and np.isin(ids, self._special_ids).any():
                ids = self._without_special_ids(document.text, ids)
            if document.chat:
                prefix = self.base.prefix
                ids = ids[len(prefix) :] if prefix and tuple(ids[: len(prefix)]) == prefix else ids
            if len(ids) and ids.max() >= self.vocabulary:
                raise UserError(
                    f"{document.where}: the tokenizer gives token {ids.max()}, but the embedding of "
                    f"{self.base.source.model} has {self.vocabulary} rows; the tokenizer belongs to another model, or "
                    "has added tokens that the model lacks"
                )
            given = ids.astype(np.int32)
        if not len(given) or [int(given[-1])] == self.separator:
            return given
        return np.append(given, np.array(self.separator, np.int32))


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a document; None if the tokenizer has none.

    It is `eos_token`, except where that ends a turn of a chat and the tokenizer has another one of `END_OF_TEXT`.
    """
    eos = tokenizer.eos_token
    if eos is None or str(eos) in END_OF_TEXT or not tokenizer.chat_template:
        return tokenizer.eos_token_id  # type: ignore[no-any-return]
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    return next((added[name] for name in END_OF_TEXT if name in added), tokenizer.eos_token_id)


def control_tokens(base: BaseModel) -> list[int]:
    """Return the ids that are not prose: special tokens, the prefix and the end-of-text token."""
    ending = end_of_text(base.tokenizer)
    return [*base.tokenizer.all_special_ids, *base.prefix, *([] if ending is None else [ending])]


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value)
    )


def _without_lone_surrogates(text: str) -> str:
    """The text itself; raises `BadRow` if it holds half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise BadRow(f"its text has a lone surrogate ({found}) at character {error.start + 1}") from error
    return text


def _whole_numbers(name: str, values: Any) -> NDArray[np.int64]:
    """A field of token ids, masks or labels as an array; raises `BadRow` if it is anything else."""
    if not isinstance(values, list):
        raise BadRow(f"{name} must be a list of whole numbers; found {kind_name(values)}")
    wrong = next((at for at, value in enumerate(values) if type(value) is not int), None)
    if wrong is not None:
        value = values[wrong]
        found = f"the number {value}" if isinstance(value, float) else kind_name(value)
        raise BadRow(f"{name} must be a list of whole numbers; found {found} at position {wrong + 1}")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise BadRow(f"{name} must be whole numbers of at most 8 bytes") from error


def _unpadded(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids where the mask is 1; raises `BadRow` if it hides anything but padding at the ends."""
    if len(mask) != len(ids) or not np.isin(mask, (0, 1)).all():
        raise BadRow(f"attention_mask must be {len(ids)} numbers 0 or 1, one for each of input_ids; found {len(mask)}")
    kept = np.flatnonzero(mask)
    if len(kept) and len(kept) != kept[-1] - kept[0] + 1:
        raise BadRow("attention_mask hides tokens in the middle; only padding at the ends is dropped, so split the row")
    return ids[kept]


def _check_labels(ids: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
    """Refuse labels that would train on anything but every next token: rows are packed without them."""
    counted = labels[labels != -100]
    if len(counted) != len(ids) or (counted != ids).any():
        raise BadRow(
            f"labels are not input_ids ({len(counted)} of {len(ids)} tokens count); here every token of a document is "
            "a target, so remove the column if that is meant"
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists that are tokenized at once."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
