"""What `mdm generate` makes of prompts: answers in text, or images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron_mdm.config.load import load_section
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.captions import read_captions
from megatron_mdm.data.prompts import read_prompts
from megatron_mdm.data.records import BadRecords
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.generation.answers import AnswerFile, answer_prompts
from megatron_mdm.generation.image_interactive import draw_typed_captions
from megatron_mdm.generation.image_settings import ImageSampling, ImageTokens
from megatron_mdm.generation.images import ImageFolder, run_image_tokenizer
from megatron_mdm.generation.interactive import converse
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel.groups import ParallelContext


class Job(Protocol):
    """What is asked is read when it is made, before a model is loaded."""

    bad: BadRecords

    def identity(self) -> dict[str, Any]:
        """JSON-able: what the answers depend on besides checkpoint and prompts."""
        ...

    def converse(self, engine: Any, context: ParallelContext, lines: Iterable[str], output: TextIO) -> None: ...

    def answer(self, engine: Any, context: ParallelContext, output: Path, settings: dict[str, Any]) -> Sequence[str]:
        """Write the answers. Returns lines that sum them up. Collective."""
        ...


class TextJob:
    """Prompts are answered."""

    def __init__(
        self, prompts: str, on_error: str, settings: Sequence[str], config: RunConfig, tokenizer: Tokenizer
    ) -> None:
        """prompts: a file; empty: they will be typed."""
        self.generation = load_section(GenerationConfig, settings)
        self.tokenizer = tokenizer
        self.decode = objective_of(config).decoder
        self.bad = BadRecords(on_error or config.data.on_error)
        self.room = self.generation.room(config.model)
        self.prompts = read_prompts(prompts, tokenizer, config.data, self.bad, self.room) if prompts else []

    def identity(self) -> dict[str, Any]:
        return self.generation.model_dump(mode="json")

    def converse(self, engine: Any, context: ParallelContext, lines: Iterable[str], output: TextIO) -> None:
        converse(engine, self.tokenizer, self.generation, self.room, self.decode, context, lines, output)

    def answer(self, engine: Any, context: ParallelContext, output: Path, settings: dict[str, Any]) -> Sequence[str]:
        file = AnswerFile(output, self.prompts, settings, context)
        answer_prompts(file, engine, self.tokenizer, self.generation, self.decode, context)
        return [f"{len(self.prompts)} responses: {output}"]


class ImageJob:
    """Captions are drawn."""

    def __init__(
        self, prompts: str, on_error: str, settings: Sequence[str], config: RunConfig, tokenizer: Tokenizer
    ) -> None:
        """prompts: a file of captions; empty: they will be typed."""
        self.sampling = load_section(ImageSampling, settings)
        self.tokenizer = tokenizer
        self.special = SpecialIds.of(tokenizer)
        self.image = ImageTokens.of(config, self.special)
        self.bad = BadRecords(on_error or config.data.on_error)
        self.room = self.sampling.room(config.model, self.image)
        vocabulary = config.image.vocabulary
        found = read_captions(prompts, tokenizer, vocabulary, self.bad, self.room) if prompts else []
        self.captions = [caption for caption in found for _ in range(self.sampling.images_per_caption)]
        self.num_cut = sum(caption.is_cut for caption in found)
        self.image_tokenizer = run_image_tokenizer(config.image)

    def identity(self) -> dict[str, Any]:
        return {
            "image tokenizer": self.image_tokenizer.fingerprint(),
            "num_tokens": self.image.number,
            **self.sampling.model_dump(mode="json"),
        }

    def converse(self, engine: Any, context: ParallelContext, lines: Iterable[str], output: TextIO) -> None:
        draw_typed_captions(
            engine,
            self.tokenizer,
            self.image_tokenizer,
            self.sampling,
            self.special,
            self.image,
            self.room,
            context,
            lines,
            output,
        )

    def answer(self, engine: Any, context: ParallelContext, output: Path, settings: dict[str, Any]) -> Sequence[str]:
        folder = ImageFolder(output, self.captions, settings, context)
        folder.draw(engine, self.image_tokenizer, self.sampling, self.special, self.image, context)
        cut = [f"warning: {self.num_cut} captions were longer than a row has room for and were cut"] * bool(
            self.num_cut
        )
        return [*cut, f"{len(self.captions)} images: {output}"]


# (file of prompts, on_error, settings as key=value, the run's configuration, its tokenizer) → what answers them
JOBS: dict[str, Callable[[str, str, Sequence[str], RunConfig, Tokenizer], Job]] = {
    "text": TextJob,
    "images": ImageJob,
}
