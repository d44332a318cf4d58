"""A file of responses that an interrupted job resumes with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data.json_files import Record
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.generation.generate import Decoder, generate_by_turns
from megatron_mdm.generation.settings import GenerationConfig, LogitsEngine, SpecialIds
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext


class Asked(Protocol):
    """A prompt, or a caption."""

    @property
    def ids(self) -> list[int]: ...

    def as_record(self) -> Record: ...


class AnswerFile:
    """JSON lines {"prompt" (or "messages"), "response", "steps"}: as they come, in FILE.partial; at the end, in the
    prompts' order, FILE.

    The partial file begins with what its responses depend on; one that was made with other settings is refused.
    """

    def __init__(
        self,
        path: Path,
        prompts: Sequence[Asked],
        settings: dict[str, Any],
        context: ParallelContext,
        is_whole: Callable[[Record], bool] = lambda _: True,
    ) -> None:
        """settings: JSON-able, all that the responses depend on besides the prompts. is_whole: whether what a record
        stands for is there; else its row is missing. Collective."""
        self.is_whole = is_whole
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.prompts = prompts
        self.is_main = context.is_main
        digest = hashlib.sha256()
        for prompt in prompts:  # their tokens depend on tokenizer and template, and on the day that a template names
            digest.update(_line({**prompt.as_record(), "ids": prompt.ids}).encode())
        self.header = {**settings, "prompts and their tokens (sha256)": digest.hexdigest()}
        self.records: dict[int, dict[str, Any]] = {}
        error = ""
        if context.is_main:
            try:
                self._open()
            except UserError as problem:
                error = str(problem)
        first: Any = gather_objects((sorted(self.records), error), context)[0]
        self.done: list[int] = first[0]
        error = first[1]
        if error:
            raise UserError(error)

    @property
    def missing(self) -> list[int]:
        """Rows of the prompts that have no response yet, the same on every rank."""
        done = set(self.done)
        return [row for row in range(len(self.prompts)) if row not in done]

    def add(self, responses: dict[int, dict[str, Any]]) -> None:
        """Keep a record of each row. Writes on the main rank."""
        if not self.is_main:
            return
        self.records.update(responses)
        lines = [_line({"row": row, **record}) for row, record in responses.items()]
        try:
            with self.partial.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            raise UserError(
                f"{self.partial}: cannot be written ({error.strerror}); the same command goes on from what is there"
            ) from None

    def finish(self) -> None:
        if not self.is_main:
            return
        records = ({**prompt.as_record(), **self.records[row]} for row, prompt in enumerate(self.prompts))
        content = "".join(map(_line, records))
        try:
            write_atomically(self.path, content)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make it possible and give the same command again: "
                f"all responses are in {self.partial}"
            ) from None
        self.partial.unlink()

    def _open(self) -> None:
        """Read what an interrupted job left, or begin."""
        lines = self.partial.read_bytes().split(b"\n") if self.partial.exists() else []
        records = [record for record in map(_parsed, lines) if record is not None]
        if not records:
            self._begin()
            return
        header, *rest = records
        for name in {**self.header, **header}:  # the checkpoint first
            if header.get(name) != self.header.get(name):
                raise UserError(
                    f"{self.partial}: begun with {name} = {header.get(name)!r}, not {self.header.get(name)!r}; go on "
                    "with the same settings, or remove the file"
                )
        rows = range(len(self.prompts))
        self.records = {
            record.pop("row"): record for record in rest if record.get("row") in rows and self.is_whole(record)
        }
        self._begin()  # without the line that was being written when the job died
        self.add(self.records)

    def _begin(self) -> None:
        try:
            write_atomically(self.partial, _line(self.header))
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror})") from None


def answer_prompts(
    file: AnswerFile,
    engine: LogitsEngine,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    decode: Decoder,
    context: ParallelContext,
) -> None:
    """Generate what the file lacks and finish it. Collective."""
    if len(file.missing) < len(file.prompts) and context.is_main:
        print(f"{file.partial}: {len(file.prompts) - len(file.missing)} responses are there already", flush=True)
    ids = [prompt.ids for prompt in file.prompts]
    special = SpecialIds.of(tokenizer)
    for share in generate_by_turns(engine, ids, file.missing, config, special, context, decode):
        file.add(
            {
                row: {"response": tokenizer.decode(response.tokens), "steps": response.steps}
                for row, response in share.items()
            }
        )
    file.finish()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's object; None where it is none, such as a line that was cut off."""
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
