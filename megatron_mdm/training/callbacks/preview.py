"""Pictures of a few captions at every validation."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from megatron_mdm.config.files import write_atomically
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.captions import read_captions
from megatron_mdm.data.records import BadRecords
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.engine.base import Engine
from megatron_mdm.generation.generate import generate
from megatron_mdm.generation.image_sampler import denoise_images
from megatron_mdm.generation.image_settings import ImageSampling, ImageTokens
from megatron_mdm.generation.images import picture, run_image_tokenizer
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.images.pixels import to_png
from megatron_mdm.images.sheet import sheet
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.training.callbacks.base import AtValidations, Order
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState

NUM_PICTURES = 16  # at most, of captions evenly spaced through the file
FOLDER = "samples"


class Preview(AtValidations):
    """Draws captions of `image.preview` every `evaluation.every` steps and at the end, by the default settings of
    generation: samples/step-NNNNNNNN.png in the run's folder, and a picture in tensorboard.

    The draws are the same at every step, so that pictures of two steps differ by what the model has learnt. One that
    cannot be written costs a line.
    """

    order = Order.PREVIEW

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, engine: Engine, context: ParallelContext, metrics: MetricsLog
    ) -> None:
        """Raises UserError where captions or image tokenizer cannot be read, or do not go with the run."""
        super().__init__(config.evaluation.every)
        self.folder = Path(config.checkpoint.directory) / FOLDER
        self.special = SpecialIds.of(tokenizer)
        self.image = ImageTokens.of(config, self.special)
        self.sampling = ImageSampling()
        bad = BadRecords(config.data.on_error)
        room = self.sampling.room(config.model, self.image)
        captions = read_captions(config.image.preview, tokenizer, config.image.vocabulary, bad, room)
        number = min(len(captions), NUM_PICTURES)
        self.captions = [captions[index * len(captions) // number] for index in range(number)]
        self.image_tokenizer = run_image_tokenizer(config.image)
        self.engine = engine
        self.context = context
        self.metrics = metrics

    def at_validation(self, state: TrainState) -> None:
        step = state.step
        enter(f"the pictures after step {step}")
        decode = partial(denoise_images, image=self.image)
        ids = [caption.ids for caption in self.captions]
        responses = generate(self.engine, ids, self.sampling, self.special, self.context, decode)
        if not self.context.is_main:
            return
        pictures = [picture(self.image_tokenizer, response.tokens) for response in responses]
        page = sheet(pictures, [caption.text for caption in self.captions])
        self._write(step, page)
        self.metrics.picture("samples", page, step)

    def _write(self, step: int, page: Image.Image) -> None:
        path = self.folder / f"step-{step:08d}.png"
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(path, to_png(page))
        except OSError as error:
            tqdm.write(f"error: {path} cannot be written ({error.strerror}); training goes on", file=sys.stderr)
