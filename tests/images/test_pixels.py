"""Pictures as users have them, the crop that a model sees, PNG, sheets."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mdm.config.errors import UserError
from megatron_mdm.images.pixels import MOST_PIXELS, is_enlarged, read_image, to_png, to_tensor, to_uint8
from megatron_mdm.images.sheet import sheet


def content(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))


def test_exif_turns_the_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture's top is its right side
    image = read_image(content(gradient(40, 20), exif=exif))
    assert image.size == (20, 40)
    np.testing.assert_array_equal(np.asarray(image), np.rot90(np.asarray(gradient(40, 20)), -1))


def test_transparency_is_white_whatever_it_hides() -> None:
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[0] = (255, 0, 0, 255)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).quantize(4)):
        found = np.asarray(read_image(content(image)))
        assert (found[0] == (255, 0, 0)).all()
        assert (found[1] == 255).all()
    grey = Image.fromarray(np.dstack([np.full((2, 2), 7), [[255, 0], [0, 255]]]).astype(np.uint8), "LA")
    assert np.asarray(read_image(content(grey)))[..., 0].tolist() == [[7, 255], [255, 7]]


def test_grey_sixteen_bits_and_two_colours() -> None:
    values = np.array([[0, 255], [256, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        found = np.asarray(read_image(content(Image.fromarray(values), kind)))
        assert found[..., 0].tolist() == [[0, 0], [1, 255]]
        assert (found == found[..., :1]).all()
    assert np.asarray(read_image(content(Image.new("1", (1, 1), 1)))).tolist() == [[[255, 255, 255]]]
    assert np.asarray(read_image(content(Image.new("L", (1, 1), 9)))).tolist() == [[[9, 9, 9]]]


def test_cmyk_and_the_first_of_several_frames() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = np.asarray(read_image(content(ink, "JPEG", quality=100)))[8, 8].astype(int)
    assert red > 240
    assert max(green, blue) < 15
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    animated = content(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(animated))[0, 0].tolist() == [255, 0, 0]


def bomb(width: int, height: int) -> bytes:
    """The header of a PNG that claims to be so large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, end)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


PNG = content(gradient(64, 64))
JPEG = content(gradient(64, 64), "JPEG")
BAD = {
    "empty": (b"", "not a picture"),
    "text": (b"<html>404</html>", "not a picture"),
    "program outside": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "cut PNG": (PNG[: len(PNG) // 2], "broken"),
    "cut JPEG": (JPEG[: len(JPEG) // 2], "broken"),
    "damaged PNG": (PNG[:60] + bytes(40) + PNG[100:], "broken"),
    "header alone": (bomb(4, 4), "broken"),
    "bomb": (bomb(20_000, 20_000), "pixels; make it smaller"),
    "half a bomb": (bomb(MOST_PIXELS // 100 + 1, 100), "pixels; make it smaller"),
    "floats": (content(Image.new("F", (4, 4)), "TIFF"), "32 bits"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "it.png"
    path.write_bytes(BAD[name][0])
    with pytest.raises(UserError, match=BAD[name][1]) as of_bytes:
        read_image(BAD[name][0])
    with pytest.raises(UserError) as of_file:
        read_image(path)
    assert str(of_file.value) == f"{path}: {of_bytes.value}"
    assert "\n" not in str(of_file.value)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.png: no such picture"):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (64, 101), (333, 77), (20, 15)])
def test_crop_is_that_of_the_reference(size: tuple[int, int]) -> None:
    """torchvision's Resize(R, bicubic) and CenterCrop(R), from their formulas."""
    image = gradient(*size)
    short, long = sorted(size)
    resized = image.resize([32 if side == short else int(32 * long / short) for side in size], Image.Resampling.BICUBIC)
    top, left = (int(round((side - 32) / 2.0)) for side in reversed(resized.size))  # noqa: RUF046
    expected = np.asarray(resized)[top : top + 32, left : left + 32]
    found = to_tensor(image, 32)
    assert found.shape == (3, 32, 32)
    torch.testing.assert_close(found, torch.from_numpy(expected / 255.0 * 2 - 1).permute(2, 0, 1).float())
    assert is_enlarged(image, 32) == (short < 32)


def test_what_has_the_size_already_is_not_touched() -> None:
    expected = torch.from_numpy(np.array(gradient(8, 8)) / 255.0 * 2 - 1).permute(2, 0, 1).float()
    torch.testing.assert_close(to_tensor(gradient(8, 8), 8), expected)


def test_a_thread_of_a_picture_is_refused() -> None:
    with pytest.raises(UserError, match="too narrow"):
        to_tensor(Image.new("RGB", (20_000, 1)), 512)


def test_values_are_clipped_and_truncated() -> None:
    values = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.999, 1.0, 1.7])
    expected = [0, 0, int(0.0005 * 255), 127, int(0.9995 * 255), 255, 255]
    assert to_uint8(values.expand(3, 1, -1))[0, :, 0].tolist() == expected
    assert np.asarray(read_image(to_png(values.expand(3, 1, -1))))[0, :, 2].tolist() == expected


def test_the_way_to_png_and_back_loses_one_level_at_most() -> None:
    """Truncation turns what rounding puts just below a level into the one below."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    again = np.asarray(read_image(to_png(to_tensor(image, 16)))).astype(int)
    assert set(np.unique(again - np.asarray(image))) <= {-1, 0}
    np.testing.assert_array_equal(np.asarray(read_image(to_png(image))), np.asarray(image))


def test_a_sheet_shows_pixels_and_captions() -> None:
    images = [gradient(8, 8), gradient(300, 100), gradient(2000, 1000)]
    captions = ["a red seven", "word " * 100, "x" * 500]
    shown = np.asarray(sheet(images, captions, columns=2))
    assert shown.shape[2] == 3
    block = shown[8 : 8 + 128, 8 : 8 + 128]  # 16 pixels for each
    np.testing.assert_array_equal(block[::16, ::16], np.asarray(images[0]))
    below = shown[8 + 512 :, 8 : 8 + 512]
    assert (below[:60] < 128).any()  # letters
    assert np.asarray(sheet([], [])).size
