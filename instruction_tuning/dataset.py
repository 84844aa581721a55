"""Chat examples as token ids, with labels on the assistant's turns alone."""

import bisect
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from towerspeech.errors import UserError
from towerspeech.outside_text import check_units, marker, text_tokenizer
from towerspeech.records import check_messages, iter_jsonl
from towerspeech.tokenizer import IM_END

IGNORE = -100  # the label of a token without loss
ENCODE_ROWS = 1000  # conversations tokenized at once


@dataclass
class Prepared:
    """Everything that is known to be right before a model is loaded."""

    settings: dict[str, Any]  # in full, as sft_config.json keeps them
    sft_config: Any  # trl.SFTConfig
    tokenizer: Any
    config: Any  # the model's
    dataset: Any  # datasets.Dataset of input_ids, labels


def read_conversations(data: Path, num_units: int, offset: int) -> tuple[list[str], list[list[dict]]]:
    """Read sft.jsonl and check each row's turns.

    Returns:
        Of each row, ``file:line (id)``, and its turns.

    Raises:
        UserError: A row is malformed, its roles do not alternate from user to assistant, or its text holds units
            that are not the tokenizer's, or stand where no speech does; names the row.
    """
    places, chats = [], []
    for place, row in iter_jsonl(data, required=("id", "messages")):
        where = f"{place} (id {row['id']})"
        check_messages(row["messages"], where)
        for number, turn in enumerate(row["messages"], 1):
            task = row.get("task") if turn["role"] == "user" else None  # a transcript has no units
            check_units(turn["content"], task, num_units, offset, f"{where}, message {number}")
        roles = [turn["role"] for turn in row["messages"]]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
            raise UserError(f"{where}: the roles are {roles}", "user and assistant must take turns, assistant last")
        places.append(where)
        chats.append(row["messages"])
    return places, chats


def encode(tokenizer, conversations: list[list[dict]], places: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenize conversations with the chat template; ``places`` names their rows.

    Returns:
        Ids and, of the same lengths, labels: the ids of each assistant turn's content and of the <|im_end|> that
        closes it, else ``IGNORE``.

    Raises:
        UserError: The template refuses a conversation, or the ids of a prompt are not the beginning of it.
    """
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    template = "use the template of towerspeech/prompts.py (train_bpe_tokenizer/extend_model.py)"
    texts, answers = [], []  # conversations; of each assistant turn its place, what asks for it and what ends with it
    for i, (chat, place) in enumerate(zip(conversations, places, strict=True)):
        try:
            texts.append(render(chat))
            for k, turn in enumerate(chat):
                if turn["role"] == "assistant":
                    answers.append((i, k, render(chat[:k], add_generation_prompt=True), render(chat[: k + 1])))
        except Exception as error:  # the template is a program, which may raise anything
            remedy = f"mend the row, or {template}"
            raise UserError(f"{place}: the chat template refuses it: {error}", remedy) from None
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    labels = [[IGNORE] * len(row) for row in ids]
    for i, k, prompt, closed in answers:
        if not (texts[i].startswith(closed) and closed.startswith(prompt)):
            raise UserError(f"{places[i]}: the chat template changes earlier turns when more follow", template)
        last_character = closed.rfind(IM_END, len(prompt))
        starts, ends = zip(*encoded["offset_mapping"][i], strict=True)  # of each token, in characters
        first, last = bisect.bisect_right(ends, len(prompt)), bisect.bisect_right(ends, last_character)
        if last_character < 0 or ids[i][last] != tokenizer.eos_token_id:
            raise UserError(f"{places[i]}: the chat template closes no answer with {IM_END}", template)
        if starts[first] < len(prompt):
            answer = conversations[i][k]["content"]
            space = answer[: len(answer) - len(answer.lstrip())] or answer[0]
            raise UserError(
                f"{places[i]}, message {k + 1}: the answer begins with {space!r}, which this tokenizer joins with the "
                "end of the prompt into one token, so that no prompt could lead to it",
                "take white space off the beginnings of the answers",
            )
        labels[i][first : last + 1] = ids[i][first : last + 1]
    return ids, labels


def make_dataset(places: list[str], chats: list[list[dict]], tokenizer, max_length: int, show: bool):
    """Tokenize all rows into a Dataset of input_ids and labels; what spells a control token is text.

    Raises:
        UserError: As ``encode``; or examples longer than ``max_length`` tokens: how many, and the longest.
    """
    import pyarrow as pa
    from datasets import Dataset
    from tqdm import tqdm

    text_only, mark = text_tokenizer(tokenizer), marker(tokenizer)
    columns = {"input_ids": [], "labels": []}
    starts = range(0, len(chats), ENCODE_ROWS)
    for start in tqdm(starts, desc="tokenizing", unit=" examples", unit_scale=ENCODE_ROWS, disable=not show):
        batch = slice(start, start + ENCODE_ROWS)
        marked = [[{"role": turn["role"], "content": mark(turn["content"])} for turn in chat] for chat in chats[batch]]
        for column, rows in zip(columns.values(), encode(text_only, marked, places[batch]), strict=True):
            column.append(pa.array(rows, pa.list_(pa.int32())))
    dataset = Dataset.from_dict({name: pa.chunked_array(chunks) for name, chunks in columns.items()})
    sizes = lengths(dataset)
    longest = sizes.argmax()
    if sizes[longest] > max_length:
        raise UserError(
            f"{(sizes > max_length).sum():,} of {len(chats):,} examples are longer than {max_length:,} tokens; "
            f"the longest, {places[longest]}, has {sizes[longest]:,}",
            "take them out, or raise sft.max_length (up to the model's context)",
        )
    return dataset


def lengths(dataset):
    """Tokens of each example, prompt included, (num_examples,) int32."""
    import pyarrow.compute as pc

    return pc.list_value_length(dataset.data.column("input_ids")).to_numpy()
