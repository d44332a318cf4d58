"""Train a sentencepiece tokenizer, with the special tokens of masked diffusion, on samples (JSON lines, parquet), on
texts in a column of theirs, or on plain text.

mdm tokenizer --data data.jsonl --output tokenizer.model --vocab-size 400 --whole-numbers 99
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.columns import conversation
from megatron_mdm.data.documents import START, Source, format_of
from megatron_mdm.data.records import ON_ERROR, BadRecords, bad_lines, read_records
from megatron_mdm.parallel.progress import progress_bar

_LONGEST = 1 << 24  # bytes of a text; sentencepiece leaves longer ones out, without a word


def texts(path: str, field: str, bad: BadRecords) -> Iterator[str]:
    """The lines of texts; of samples, what each side says."""
    if format_of(path) == "text":
        for chunk in Source([path], "text", separator="line").chunks(START):
            for place, line in zip(chunk.places, chunk.records):
                with bad.of(f"{path}, {place}"):
                    yield line.decode("utf-8")
        return
    for where, record in progress_bar(read_records(path, bad), desc="read", unit="sample"):
        with bad.of(where):
            if isinstance(record.get(field), str):
                yield from record[field].split("\n")
            else:
                yield from (turn.content for turn in conversation(record, DataConfig(train="", max_length=2)))


def train(arguments: argparse.Namespace) -> None:
    """Train a tokenizer with the ids pad 0, unk 1, bos 2, eos 3, mask 4, line break 5, whole numbers, learnt pieces."""
    # "▁" is sentencepiece's space: with it inside, a number is one token and "24." stays two.
    symbols = ["\n", *(f"▁{number}" for number in range(arguments.whole_numbers + 1))]
    bad = BadRecords(arguments.on_error)
    sentences = [text for text in texts(arguments.data, arguments.field, bad) if text.strip()]
    if not sentences:
        raise UserError(f"{arguments.data}: no text{bad.summary()}")
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "tokenizer")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                max_sentence_length=_LONGEST,
                model_prefix=prefix,
                model_type=arguments.model_type,
                vocab_size=arguments.vocab_size,
                hard_vocab_limit=False,
                pad_id=0,
                unk_id=1,
                bos_id=2,
                eos_id=3,
                pad_piece="<pad>",
                control_symbols=["<mask>"],  # which, unlike the others, is never found in a text
                user_defined_symbols=symbols,
                character_coverage=1.0,
                normalization_rule_name="identity",
                byte_fallback=arguments.byte_fallback,
                num_threads=1,  # several make the result depend on timing
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{arguments.data}: sentencepiece cannot train on it ({reason})") from None
        write_atomically(Path(arguments.output), Path(prefix + ".model").read_bytes())
    print("\n".join([*bad_lines(bad.count, bad.first), f"tokenizer: {arguments.output}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="text; or JSON lines or parquet of samples or of texts")
    parser.add_argument("--field", default="text", help="the column of texts")
    parser.add_argument("--on-error", choices=ON_ERROR, default="stop", help="at a bad record")
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--model-type", choices=["unigram", "bpe", "word"], default="unigram")
    parser.add_argument("--whole-numbers", type=int, default=-1, help="numbers 0…N become single tokens; -1: none")
    parser.add_argument("--byte-fallback", action="store_true", help="unknown characters become bytes, not <unk>")
    train(parser.parse_args())
