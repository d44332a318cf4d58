"""A run's data: what it is trained on and what is held out, and further data read in the same way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.corpus import CorpusDataset, read_corpora
from megatron_mdm.data.documents import format_of
from megatron_mdm.data.indexed import is_corpus
from megatron_mdm.data.prompt_set import PromptDataset, read_prompt_set
from megatron_mdm.data.sft import Set, SftDataset, blended, joined, read_sft, split_validation
from megatron_mdm.data.syntax import add_syntax, mark_delimiters
from megatron_mdm.data.tokenizer import Tokenizer

Dataset = SftDataset | CorpusDataset


def read_splits(config: RunConfig, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """(training, validation), the latter None where the configuration holds nothing out."""
    return _SPLITS[config.data.format](config, tokenizer)


def read_held_out(path: str, config: RunConfig, tokenizer: Tokenizer) -> Dataset:
    """Other data as a run reads its own: samples, or the corpus of a prefix; an empty path: the run's validation data.

    Raises UserError where it has none, and where a path is neither.
    """
    if not path:
        _, validation = read_splits(config, tokenizer)
        if validation is None:
            raise UserError("the run holds no validation data out; name some with --data")
        return validation
    is_file = Path(path).is_file()
    if is_corpus(path) or (config.data.format == "corpus" and not is_file):
        corpus, _ = _read_corpora(config)({path: 1.0}, random_length=0.0, validation_fraction=0.0)
        return corpus
    if config.data.format == "corpus" and format_of(path) == "text":
        raise UserError(f"{path}: is a text; make a corpus of it (tools/prepare_data.py corpus) and name its prefix")
    return read_sft(path, tokenizer, config.data, int(config.model.vocab_size))


def _samples(config: RunConfig, tokenizer: Tokenizer) -> tuple[SftDataset, SftDataset | None]:
    vocab_size = int(config.model.vocab_size)
    train, validation = _held_apart(config, lambda path: read_sft(path, tokenizer, config.data, vocab_size))
    train = mark_delimiters(add_syntax(train, config.diffusion.syrm, tokenizer), config.diffusion.isad, tokenizer)
    return train, validation


def _prompts(config: RunConfig, tokenizer: Tokenizer) -> tuple[PromptDataset, PromptDataset | None]:
    vocab_size = int(config.model.vocab_size)
    gen_length = config.rl.gen_length
    return _held_apart(config, lambda path: read_prompt_set(path, tokenizer, config.data, vocab_size, gen_length))


def _held_apart(config: RunConfig, read: Callable[[str], Set]) -> tuple[Set, Set | None]:
    """(training, validation) from the files that the configuration names."""
    data = config.data
    blend = data.train if isinstance(data.train, dict) else {data.train: 1.0}
    sets = [read(path) for path in blend]
    validation = None
    if data.validation:
        validation = read(data.validation)
    elif data.validation_fraction:  # of each file, since a blend shows samples several times
        pairs = [split_validation(part, data.validation_fraction, config.seed) for part in sets]
        sets = [train for train, _ in pairs]
        validation = joined([held_out for _, held_out in pairs])
    return blended(sets, list(blend.values())), validation


def _corpora(config: RunConfig, tokenizer: Tokenizer) -> tuple[CorpusDataset, CorpusDataset | None]:
    data = config.data
    read = _read_corpora(config)
    blend = data.train if isinstance(data.train, dict) else {data.train: 1.0}
    train, validation = read(blend, random_length=data.random_length, validation_fraction=data.validation_fraction)
    if data.validation:
        validation, _ = read({data.validation: 1.0}, random_length=0.0, validation_fraction=0.0)
    return train, validation


def _read_corpora(config: RunConfig) -> Callable[..., tuple[CorpusDataset, CorpusDataset | None]]:
    data = config.data
    return partial(
        read_corpora,
        length=data.max_length,
        vocab_size=int(config.model.vocab_size),
        tokenizer_path=data.tokenizer,
        sees_across_documents=data.across_documents,
        seed=config.seed,
        skip_bad=data.on_error == "skip",
    )


_SPLITS: dict[str, Callable[[RunConfig, Tokenizer], tuple[Dataset, Dataset | None]]] = {  # by data.format
    "sft": _samples,
    "corpus": _corpora,
    "prompts": _prompts,
}
