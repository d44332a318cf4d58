"""Pictures ↔ tensors: what a file may hold, the crop that a model sees, and PNG."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from megatron_mdm.config.errors import UserError

# Others are not tried: EPS, for one, is handed to a program outside.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Pillow's limit is a warning up to twice this number; here it is an error.
MOST_PIXELS = int(Image.MAX_IMAGE_PIXELS or 0)
_BACKGROUND = (255, 255, 255)  # of transparent pictures
_REASON_LENGTH = 200
# Of odd metadata, and of bombs, which are errors here. Once for all: pictures are read by several threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(source: Path | bytes) -> Image.Image:
    """The picture of a file, or of its content, in RGB and upright (EXIF): the first of several frames, transparency
    on white, 16-bit grey in 8 bits. Raises UserError, which names the file if there is one."""
    where = f"{source}: " if isinstance(source, Path) else ""
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as opened:
            _check_size(opened.size)
            is_deep = opened.mode.startswith("I;16") or (opened.format, opened.mode) == ("PPM", "I")
            return _rgb(ImageOps.exif_transpose(opened), is_deep)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{where}more than {2 * MOST_PIXELS:,} pixels; make it smaller") from None
    except FileNotFoundError:
        raise UserError(f"{where}no such picture") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{where}not a picture that can be read (known are {', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
        reason = " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__
        raise UserError(f"{where}a broken picture ({reason})") from None


def is_enlarged(image: Image.Image, resolution: int) -> bool:
    """Whether the picture has fewer pixels than the model is shown."""
    return min(image.size) < resolution


def to_tensor(image: Image.Image, resolution: int) -> Tensor:
    """An RGB picture → [3, R, R] float32 in [−1, 1]: the shorter side to R pixels (bicubic, antialiased), the centre
    cropped. As in MMaDA's training/utils.py and torchvision's Resize and CenterCrop."""
    return as_model_input(torch.from_numpy(cropped(image, resolution)))


def cropped(image: Image.Image, resolution: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The same square, [R, R, 3] uint8. Raises UserError where the picture is too narrow for memory."""
    return np.array(center_square(image, resolution))


def center_square(image: Image.Image, resolution: int) -> Image.Image:
    """The same square as a picture."""
    shorter = min(image.size)
    width, height = (resolution * side // shorter for side in image.size)
    if width * height > MOST_PIXELS:
        raise UserError(f"{image.width} × {image.height} pixels are too narrow to be cropped to a square")
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + resolution, top + resolution))


def as_model_input(pixels: Tensor) -> Tensor:
    """uint8 [..., R, R, 3] → float32 [..., 3, R, R] in [−1, 1]."""
    return pixels.movedim(-1, -3).float() / 255.0 * 2.0 - 1.0


def to_uint8(pixels: Tensor) -> Tensor:
    """float [..., 3, H, W] in [−1, 1], clipped → uint8 [..., H, W, 3], truncated as MMaDA's inference_t2i.py does."""
    return ((pixels.float() + 1.0) / 2.0).clamp(0.0, 1.0).mul(255.0).to(torch.uint8).movedim(-3, -1)


def to_picture(pixels: Tensor) -> Image.Image:
    """float [3, H, W] in [−1, 1] → an RGB picture."""
    return Image.fromarray(to_uint8(pixels).cpu().contiguous().numpy())


def to_png(picture: Tensor | Image.Image) -> bytes:
    """A picture, or float [3, H, W] in [−1, 1], as the content of a PNG file: the same bytes for the same pixels."""
    content = io.BytesIO()
    (to_picture(picture) if isinstance(picture, Tensor) else picture).save(content, "PNG")
    return content.getvalue()


def _check_size(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise UserError(f"{size[0]} × {size[1]} are more than {MOST_PIXELS:,} pixels; make it smaller")


def _rgb(image: Image.Image, is_deep: bool) -> Image.Image:
    """is_deep: grey levels are 16 bits, which Pillow would clip at 255."""
    if is_deep:
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(f"32 bits a pixel (Pillow's mode {image.mode}); save it with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image).convert("RGB")
    return image.convert("RGB")
