"""Documents to token ids, as the Hugging Face tokenizer called on each of them gives, but several times as fast.

Text is encoded by that tokenizer, word by word where that is the same (words.py); runs of units by SentencePiece,
which does the same merges several times as fast.
"""

import json

import numpy as np

from data_mixture.words import Words, encode_whole, is_by_words
from towerspeech import units
from towerspeech.errors import UserError
from towerspeech.indexed import token_dtype
from towerspeech.outside_text import MARK, marker, text_tokenizer
from towerspeech.tokenizer import unit_tokens

# A text, and its run of units, as their characters. In the text, unit 0 stands for the whole run. Without a run the
# text is the document.
Document = tuple[str, str]
NO_UNITS = ""
REMAKE = "make it anew with train_bpe_tokenizer/merge_tokenizer.py"


# --- Encoding -------------------------------------------------------------------------------------
def unit_processor(pieces: list[str]):
    """A SentencePiece BPE of these pieces, the best first; they follow <unk>, which has id 0."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    unknown = proto.pieces.add(piece="<unk>", score=0)
    unknown.type = unknown.UNKNOWN
    for rank, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-rank)
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


class Encoder:
    """Encodes documents as a Hugging Face tokenizer does, without special tokens, several times as fast.

    Marked text from outside makes no control tokens (towerspeech/outside_text.py).

    merge_tokenizer.py sees to it that no token crosses the border between text and units, and that the tokens of a run
    of units do not depend on what is around it. So the tokenizer encodes the text, with one unit in the run's place;
    SentencePiece encodes the run; and the run's tokens replace that unit's, which no text from outside can spell.
    """

    def __init__(self, tokenizer, num_units: int, offset: int):
        """Prepare for ``num_units`` units; 0 if there are to be no runs."""
        self.tokenizer, self.num_units, self.offset = tokenizer, num_units, offset
        self.dtype, self.mark = token_dtype(len(tokenizer)), marker(tokenizer)
        self.backend = text_tokenizer(tokenizer).backend_tokenizer
        saved = json.loads(self.backend.to_str())
        self.words = Words(self.backend, saved, self.dtype) if is_by_words(saved) else None
        self.stand_in = units.to_text([0], offset)
        if num_units:
            tokens = unit_tokens(tokenizer, num_units, offset)
            ids = self.unit_ids(tokens)
            self.stand_in_id = ids[-num_units]
            self.processor = unit_processor([units.to_text(tokens[index], offset) for index in ids])
            self.lookup = np.array([0, *ids], self.dtype)  # the token of each piece; <unk> does not occur

    def __getstate__(self) -> dict:
        """What another process needs to encode: the tokenizer's class alone would cost it seconds of imports."""
        return {**self.__dict__, "tokenizer": None}

    def unit_ids(self, tokens: dict[int, list[int]]) -> list[int]:
        """Order the tokens of units alone as SentencePiece wants its pieces: merges, the best first, then units.

        Raises:
            UserError: A unit has no token.
        """
        singles = {spoken[0]: index for index, spoken in tokens.items() if len(spoken) == 1}
        missing = sorted(set(range(self.num_units)) - set(singles))
        if missing:
            raise UserError(f"the tokenizer has no token for unit {missing[0]}", REMAKE)
        ranks = {}  # of merges: their ids may have another order
        model = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        for rank, (left, right) in enumerate(model.get("merges", ())):
            ranks.setdefault(left + right, rank)
        names = dict(zip(tokens, self.tokenizer.convert_ids_to_tokens(list(tokens)), strict=True))
        merged = [index for index, spoken in tokens.items() if len(spoken) > 1 and names[index] in ranks]
        return [*sorted(merged, key=lambda index: ranks[names[index]]), *[singles[u] for u in range(self.num_units)]]

    def reference(self, text: str) -> list[int]:
        """The tokenizer's own ids of a text."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def __call__(self, batch: list[Document]) -> list[np.ndarray]:
        """Token ids, (num_tokens,), of each document."""
        texts = [text for text, _ in batch]
        encoded = self.words(texts) if self.words else encode_whole(self.backend, texts, self.dtype)
        runs = [speech for _, speech in batch if speech]
        encoded_runs = iter(self.processor.encode(runs, return_type="numpy") if runs else [])
        rows = []
        for (_, speech), ids in zip(batch, encoded, strict=True):
            if speech:
                run = self.lookup[next(encoded_runs)]
                place = int((ids == self.stand_in_id).argmax())
                if ids[place] != self.stand_in_id:
                    raise UserError("the tokenizer has no token of unit 0 alone in a document", REMAKE)
                ids = np.concatenate([ids[:place], run, ids[place + 1 :]])
            rows.append(ids)
        return rows

    def compare(self, batch: list[Document]) -> None:
        """Raise UserError if the ids of documents without control tokens are not the tokenizer's own."""
        batch = [(text, speech) for text, speech in batch if MARK not in text]
        for (text, speech), ids in zip(batch, self(batch), strict=True):
            document = text.replace(self.stand_in, speech, 1) if speech else text
            if ids.tolist() != self.reference(document):
                raise UserError(
                    f"the tokenizer's tokens of units depend on the text around them: {document[:80]!r}",
                    REMAKE,
                )
