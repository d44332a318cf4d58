"""Documents → a pretraining corpus in Megatron's .bin/.idx format: shards, splits, restartable.

PREFIX-00000.bin/.idx …, or PREFIX-train-00000 … with splits; beside each set of shards, PREFIX.json says what is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sync, write_json
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.documents import START, Position, Source
from megatron_mdm.data.encode import Encoded, Settings, encode_all
from megatron_mdm.data.tokenizer import load_tokenizer
from megatron_mdm.data.tokenizer_folder import tokenizer_fingerprint
from megatron_mdm.parallel.progress import progress_bar

SPLITS = ("train", "validation", "test")
NUM_BAD_SHOWN = 10


@dataclass(frozen=True)
class CorpusSettings:
    output: str  # PREFIX
    data: DataConfig  # tokenizer and end token
    shares: tuple[float, ...] = ()  # of train, validation, test, by document; empty: no splits
    end_token: bool = True
    workers: int = 1
    shard_tokens: int = 50_000_000  # a shard ends with the first chunk that reaches it
    seed: int = 0  # of the splits
    skip_bad: bool = False


@dataclass(frozen=True)
class Progress:
    """What finished shards hold; kept beside them, so that an interrupted preparation resumes."""

    position: Position = START
    shards: int = 0
    documents: tuple[int, ...] = ()  # by split
    tokens: tuple[int, ...] = ()
    bad: int = 0
    first_bad: tuple[str, ...] = ()
    file: str = ""  # that is being read
    documents_in_file: int = 0
    single: int = 0  # files that hold one document
    first_single: str = ""
    read: int = 0  # bytes, for the progress bar
    done: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def write_corpus(source: Source, settings: CorpusSettings) -> Progress:
    """Tokenise everything that is not in finished shards yet. Raises UserError on the first bad document, unless they
    are to be skipped, and where there is no document at all."""
    tokenizer = load_tokenizer(settings.data)
    if (
        len(settings.shares) > len(SPLITS)
        or min(settings.shares, default=1) < 0
        or (settings.shares and not sum(settings.shares))
    ):
        raise UserError(f"--splits: give shares of {', '.join(SPLITS)}, as many as there shall be, none below 0")
    names = tuple(f"{settings.output}-{name}" for name in SPLITS[: len(settings.shares)]) or (settings.output,)
    progress_path = Path(f"{settings.output}.progress.json")
    progress = _resumed(progress_path, _identity(source, settings), len(names))
    dtype = np.dtype(DType.optimal_dtype(tokenizer.num_ids)).name
    encoding = Settings(settings.data, source.field, settings.end_token, dtype)
    bar = progress_bar(total=source.total(), desc="tokenise", unit="B", unit_scale=True, initial=progress.read)
    try:
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        chunks = () if progress.done else source.chunks(progress.position)
        # What is open ends with it, come what may: the line of the bar, the processes.
        with bar, closing(encode_all(chunks, encoding, settings.workers)) as encoded:
            for shard in _Shards(names, settings, dtype, progress).write(encoded, bar):
                progress = shard
                write_json(progress_path, asdict(progress))
    except OSError as error:
        raise UserError(f"{error.filename or settings.output}: cannot be written ({error.strerror})") from None
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenises has died, of lack of memory perhaps; the same command resumes, with fewer "
            "--workers if need be"
        ) from None
    progress = _with_file(progress, "", 0)
    try:
        _check_splits(progress, source, settings)
    except UserError:
        progress_path.unlink(missing_ok=True)  # other settings are needed, which start from scratch
        raise
    for name, documents, tokens in zip(names, progress.documents, progress.tokens):
        summary = {"documents": documents, "tokens": tokens, "shards": progress.shards, "num_ids": tokenizer.num_ids}
        write_json(Path(f"{name}.json"), {**summary, "tokenizer": tokenizer_fingerprint(settings.data.tokenizer)})
    progress = replace(progress, done=True)
    write_json(progress_path, asdict(progress))
    return progress


def warnings(progress: Progress, source: Source) -> list[str]:
    """What may not be meant, a line each."""
    if not (progress.single and source.divides_texts):
        return []
    others = f" and {progress.single - 1:,} other files" if progress.single > 1 else ""
    return [
        f"{progress.first_single}{others}: a single document each; --documents {source.separator} divides text files "
        "otherwise"
    ]


def _check_splits(progress: Progress, source: Source, settings: CorpusSettings) -> None:
    """Raise UserError where there is no document, or none for a split that was asked for."""
    if not sum(progress.documents):
        first = f", the first: {progress.first_bad[0]}" if progress.first_bad else ""
        raise UserError(f"{', '.join(source.paths)}: no documents ({progress.bad} were bad{first})")
    for name, share, documents in zip(SPLITS, settings.shares, progress.documents):
        if share and not documents:
            raise UserError(
                f"--splits: none of the {sum(progress.documents):,} documents falls to {name} ({share:g}); give it a "
                f"larger share, or 0, or another --seed, or divide the files otherwise (--documents)"
            )


class _Shards:
    """Writes chunks of token ids to one shard after another."""

    def __init__(self, names: Sequence[str], settings: CorpusSettings, dtype: str, progress: Progress) -> None:
        self.names = names
        self.settings = settings
        self.dtype = np.dtype(dtype).type
        self.progress = progress

    def write(self, chunks: Iterator[Encoded], bar: Any) -> Iterator[Progress]:
        """Yields after every shard that is complete on disk."""
        builders: list[IndexedDatasetBuilder] = []
        open_tokens = 0
        state = self.progress
        for chunk in chunks:
            state = self._counted(state, chunk)
            builders = builders or [
                IndexedDatasetBuilder(f"{self._shard(name, state)}.bin.tmp", dtype=self.dtype) for name in self.names
            ]
            state = self._add(builders, state, chunk)
            bar.update(chunk.size)
            open_tokens += len(chunk.tokens)
            if open_tokens >= self.settings.shard_tokens:
                yield (state := self._finish(builders, state))
                builders = []
                open_tokens = 0
        if builders:
            yield self._finish(builders, state)

    def _counted(self, state: Progress, chunk: Encoded) -> Progress:
        if chunk.num_bad and not self.settings.skip_bad:
            raise UserError(f"{chunk.first_bad[0]}; mend it, or leave such documents out with --on-error skip")
        return replace(
            _with_file(state, chunk.path, len(chunk.lengths)),
            bad=state.bad + chunk.num_bad,
            first_bad=(*state.first_bad, *chunk.first_bad)[:NUM_BAD_SHOWN],
            position=chunk.following,
            read=state.read + chunk.size,
        )

    def _add(self, builders: list[IndexedDatasetBuilder], state: Progress, chunk: Encoded) -> Progress:
        documents = list(state.documents)
        tokens = list(state.tokens)
        first = sum(documents)
        splits = np.array([self._split(first + number) for number in range(len(chunk.lengths))], dtype=np.int64)
        for split, builder in enumerate(builders):
            lengths = chunk.lengths[splits == split]
            _append(builder, chunk.tokens[np.repeat(splits == split, chunk.lengths)], lengths)
            documents[split] += len(lengths)
            tokens[split] += int(lengths.sum())
        return replace(state, documents=tuple(documents), tokens=tuple(tokens))

    def _split(self, document: int) -> int:
        """Which split a document belongs to: a hash of its number, so that it depends on no other."""
        if len(self.names) == 1:
            return 0
        digest = hashlib.blake2b(f"{self.settings.seed}/{document}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest) / 2**64 * sum(self.settings.shares)
        bounds = np.cumsum(self.settings.shares)
        return min(int(np.searchsorted(bounds, place, side="right")), len(self.names) - 1)

    def _finish(self, builders: list[IndexedDatasetBuilder], state: Progress) -> Progress:
        for name, builder in zip(self.names, builders):
            shard = self._shard(name, state)
            builder.finalize(f"{shard}.idx.tmp")
            if not builder.sequence_lengths:  # a file of no bytes cannot be mapped into memory
                for kind in (".bin", ".idx"):
                    Path(f"{shard}{kind}.tmp").unlink()
                continue
            for kind in (".bin", ".idx"):  # a reader looks for the .idx, which comes last
                sync(Path(f"{shard}{kind}.tmp"))
                Path(f"{shard}{kind}.tmp").replace(f"{shard}{kind}")
        return replace(state, shards=state.shards + 1)

    @staticmethod
    def _shard(name: str, state: Progress) -> str:
        return f"{name}-{state.shards:05d}"


def _with_file(state: Progress, path: str, num_documents: int) -> Progress:
    """Further documents of a file counted; where it is another than before, the one before is done."""
    if path == state.file:
        return replace(state, documents_in_file=state.documents_in_file + num_documents)
    is_single = bool(state.file) and state.documents_in_file == 1
    return replace(
        state,
        file=path,
        documents_in_file=num_documents,
        single=state.single + is_single,
        first_single=state.first_single or (state.file if is_single else ""),
    )


def _append(builder: IndexedDatasetBuilder, tokens: NDArray[Any], lengths: NDArray[np.int64]) -> None:
    """What builder.add_document does for each of the documents, at once."""
    builder.data_file.write(tokens.tobytes())
    first = len(builder.sequence_lengths) + 1
    builder.document_indices.extend(range(first, first + len(lengths)))
    builder.sequence_lengths.extend(lengths.tolist())


def _identity(source: Source, settings: CorpusSettings) -> dict[str, Any]:
    """What an interrupted preparation must have in common with the one that resumes it."""
    return {
        "source": {**asdict(source), "paths": [Path(path).name for path in source.paths]},  # wherever they lie
        "shares": list(settings.shares),
        "end_token": settings.end_token,
        "shard_tokens": settings.shard_tokens,
        "seed": settings.seed,
        "skip_bad": settings.skip_bad,
        "tokenizer": tokenizer_fingerprint(settings.data.tokenizer),
        "eos_token": settings.data.eos_token,
    }


def _resumed(path: Path, identity: dict[str, Any], num_splits: int) -> Progress:
    empty = Progress(documents=(0,) * num_splits, tokens=(0,) * num_splits, settings=identity)
    if not path.exists():
        return empty
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(saved[name]) for name in ("documents", "tokens", "first_bad")}
        progress = Progress(**{**saved, **lists, "position": Position(*saved["position"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to start from scratch") from None
    if progress.settings != identity:
        different = next(name for name in identity if progress.settings.get(name) != identity[name])
        raise UserError(f"{path}: belongs to a preparation with another '{different}'; remove it to start from scratch")
    return progress
