"""How well pictures fit their captions: cosines of a CLIP model's embeddings.

The score of a pair is 100 · max(cos, 0), as torchmetrics' CLIPScore, but for the clamp, which it applies to the mean.
Hessel et al.'s CLIPScore, 2.5 · max(cos, 0) with "A photo depicts" before captions, is another. Figures of different
CLIPs cannot be compared, so a result carries the model's identity.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.images.pixels import center_square
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.heartbeat import beat

Floats = NDArray[np.float64]

# of OpenAI's models; a folder's preprocessor_config.json may name others
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_LEGACY_EOS = 2  # in text_config: the place of the largest id is pooled, whatever eos is


class Embeddings(NamedTuple):
    """Unit vectors; pair i is row i of both."""

    images: Floats  # [n, D]
    texts: Floats  # [n, D]
    num_cut: int  # captions that were longer than the model takes


@dataclass(frozen=True)
class Clip:
    """A CLIP model of transformers with its tokenizer, on this rank's device, in float32."""

    model: Any
    tokenizer: Any
    mean: Tensor  # [3]
    std: Tensor  # [3]
    identity: dict[str, Any]  # name, sizes, checksum of the weights

    @property
    def resolution(self) -> int:
        return int(self.model.config.vision_config.image_size)

    @property
    def max_ids(self) -> int:
        """Places of a caption, bos and eos included: 77 of OpenAI's."""
        return int(self.model.config.text_config.max_position_embeddings)

    def ids(self, caption: str) -> tuple[list[int], bool]:
        """(bos, the caption's ids, eos; whether they were cut so that eos stays)."""
        found = self.tokenizer(caption, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        room = self.max_ids - 2
        # A byte that the vocabulary lacks is unk, which is eos: the rest of the caption would not be seen.
        kept = [token for token in found if token not in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)]
        return [self.tokenizer.bos_token_id, *kept[:room], self.tokenizer.eos_token_id], len(kept) > room

    def pixels(self, image: Image.Image) -> Tensor:
        """RGB → [3, R, R]: the shorter side to R (bicubic), the centre cropped, mean and deviation taken out."""
        return normalized(torch.from_numpy(np.array(center_square(image, self.resolution))), self.mean, self.std)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image], captions: Sequence[str], batch_size: int = 32) -> Embeddings:
        """Of n pictures and their n captions."""
        encoded = [self.ids(caption) for caption in captions]
        of_images, of_texts = [], []
        for start in range(0, len(captions), batch_size):
            beat()
            part = slice(start, start + batch_size)
            rows = [ids for ids, _ in encoded[part]]
            longest = max(map(len, rows))
            eos = self.tokenizer.eos_token_id
            padded = torch.tensor([ids + [eos] * (longest - len(ids)) for ids in rows])
            mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows])
            device = platform.device()
            output = self.model(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                pixel_values=torch.stack([self.pixels(image) for image in images[part]]).to(device),
            )
            of_images.append(output.image_embeds.double().cpu().numpy())
            of_texts.append(output.text_embeds.double().cpu().numpy())
        found = Embeddings(np.concatenate(of_images), np.concatenate(of_texts), sum(cut for _, cut in encoded))
        if not (np.isfinite(found.images).all() and np.isfinite(found.texts).all()):
            raise UserError(f"{self.identity['name']}: its embeddings are not numbers; the weights are damaged")
        return found


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [..., R, R, 3] → float32 [..., 3, R, R], less the channels' mean [3], in units of their deviation [3]."""
    return ((pixels.float() / 255.0 - mean) / std).movedim(-1, -3)


def load_clip(folder: str | Path) -> Clip:
    """CLIP as transformers saves it: config.json, safetensors weights, tokenizer. Raises UserError where something is
    missing, or where captions would be pooled at the wrong place."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no folder with a CLIP model's config.json")
    if _json(folder / "config.json").get("model_type") != "clip":
        raise UserError(f"{folder}: config.json's model_type is not clip; give a CLIP model as transformers saves it")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = " (a .bin is a pickle, which is not loaded: save_pretrained of transformers writes it anew)"
        raise UserError(f"{folder}: no safetensors weights{pickles * any(folder.glob('*.bin'))}")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    of_model: Any = transformers.CLIPModel
    try:
        model, loaded = of_model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any type: transformers' loaders
        raise UserError(
            f"{folder}: not a CLIP model that can be loaded ({' '.join(str(error).split())[:300]})"
        ) from None
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise UserError(
            f"{folder}: '{missing[0]}' is missing ({len(missing)} of its tensors are), so it is no CLIP model"
        )
    _check_eos(folder, model, tokenizer)
    mean, std = _normalization(folder)
    return Clip(
        model.eval().requires_grad_(False).to(platform.device()), tokenizer, mean, std, _identity(folder, model, files)
    )


def _check_eos(folder: Path, model: Any, tokenizer: Any) -> None:
    pooled, eos = model.config.text_config.eos_token_id, tokenizer.eos_token_id
    is_largest = eos == max(tokenizer.get_vocab().values())
    if pooled != eos and not (pooled == _LEGACY_EOS and is_largest):
        raise UserError(
            f"{folder}: config.json's text_config.eos_token_id is {pooled}, its tokenizer's eos {eos}: captions would "
            "be summed up at the wrong token; correct config.json"
        )


def _normalization(folder: Path) -> tuple[Tensor, Tensor]:
    path = folder / "preprocessor_config.json"
    values = _json(path) if path.exists() else {}
    try:
        found = [
            torch.tensor(values.get(name, default)).float()
            for name, default in (("image_mean", MEAN), ("image_std", STD))
        ]
        if any(each.shape != (3,) for each in found) or bool((found[1] <= 0).any()):
            raise ValueError("image_mean and image_std must be three numbers each")
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be used ({error})") from None
    return found[0], found[1]


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def _identity(folder: Path, model: Any, files: Sequence[Path]) -> dict[str, Any]:
    vision = model.config.vision_config
    return {
        "name": folder.resolve().name,
        "patch": vision.patch_size,
        "resolution": vision.image_size,
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "projection": model.config.projection_dim,
        "sha256": {path.name: sha256(path) for path in files},
    }


def clip_scores(images: Sequence[Image.Image], captions: Sequence[str], clip: Clip) -> Floats:
    """100 · max(cos, 0) of each picture and its caption, [n]."""
    return _scores_of_pairs(clip.embed(images, captions))


def _scores_of_pairs(embeddings: Embeddings) -> Floats:
    return 100.0 * np.maximum((embeddings.images * embeddings.texts).sum(1), 0.0)


def evaluate_clip(images: Sequence[Image.Image], captions: Sequence[str], clip: Clip) -> dict[str, Any]:
    """The mean score with its standard error, beside its floor: the mean score of the same pictures with every other
    caption of the set. recall_at_1: pictures whose own caption scores best of all distinct ones.

    Raises UserError for fewer than two distinct captions. "scores" [n] are the pairs'.
    """
    texts = list(dict.fromkeys(captions))
    if len(texts) < 2:
        raise UserError("a CLIP score needs two distinct captions at least: others are its floor")
    embeddings = clip.embed(images, captions)
    first = [captions.index(text) for text in texts]
    own = np.array([texts.index(caption) for caption in captions])
    table = 100.0 * np.maximum(embeddings.images @ embeddings.texts[first].T, 0.0)  # [n, distinct captions]
    scores = table[np.arange(len(own)), own]
    others = (table.sum(1) - scores) / (len(texts) - 1)
    return {
        "clip_score": float(scores.mean()),
        "standard_error": _standard_error(scores),
        "shuffled": float(others.mean()),
        "above_shuffled": float((scores - others).mean()),
        "above_shuffled_error": _standard_error(scores - others),
        "recall_at_1": float((table.argmax(1) == own).mean()),
        "num_images": len(images),
        "num_captions": len(texts),
        "num_cut": embeddings.num_cut,
        "clip": clip.identity,
        "scores": scores.tolist(),
    }


def summary(result: dict[str, Any]) -> list[str]:
    """Lines that say what evaluate_clip found."""
    error = result["standard_error"]
    return [
        f"CLIP score: {result['clip_score']:.2f}",
        f"standard error {error if error is None else f'{error:.2f}'}, with other captions {result['shuffled']:.2f}; "
        f"own caption first of {result['num_captions']}: {result['recall_at_1']:.3f}; {result['num_images']} pictures, "
        f"{result['num_cut']} captions cut; by {result['clip']['name']}",
    ]


def _standard_error(values: Floats) -> float | None:
    """Of the mean; None of a single value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
