"""Train a sentencepiece tokenizer on the texts of a JSONL file, with the special tokens of masked diffusion.

python tools/train_tokenizer.py --data data.jsonl --output tokenizer.model --vocab-size 400 --whole-numbers 99
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data.records import read_records
from megatron_mdm.data.sft import prompt_and_response
from megatron_mdm.parallel.program import run_program
from megatron_mdm.parallel.progress import progress_bar


def texts(path: str) -> Iterator[str]:
    for where, record in progress_bar(read_records(path), desc="read", unit="sample"):
        yield from prompt_and_response(record, where)


def train(arguments: argparse.Namespace) -> None:
    """Ids: pad 0, unk 1, bos 2, eos 3, mask 4, line break 5, then the whole numbers, then learnt pieces."""
    # "▁" is sentencepiece's space: with it inside, a number is one token and "24." stays two.
    symbols = ["\n", *(f"▁{number}" for number in range(arguments.whole_numbers + 1))]
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "tokenizer")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=texts(arguments.data),
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
    print(f"tokenizer: {arguments.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with question/answer or prompt/response")
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--model-type", choices=["unigram", "bpe", "word"], default="unigram")
    parser.add_argument("--whole-numbers", type=int, default=-1, help="numbers 0…N become single tokens; -1: none")
    parser.add_argument("--byte-fallback", action="store_true", help="unknown characters become bytes, not <unk>")
    train(parser.parse_args())


if __name__ == "__main__":
    run_program(main)
