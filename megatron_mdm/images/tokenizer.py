"""Image tokenizers: a folder with config.json and one safetensors file → pixels ↔ codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically, write_json
from megatron_mdm.images import lfq
from megatron_mdm.images.magvit import Decoder, Encoder, ImageTokenizerConfig, parameter_shapes

OWN_CLASS = "MdmImageTokenizer"  # _class_name of those that megatron-mdm trains
WEIGHTS = "model.safetensors"
# diffusers-style folders' and ours; else the only .safetensors file
_WEIGHTS_FILES = (WEIGHTS, "pytorch_model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ImageTokenizer(torch.nn.Module):
    """Pixels ↔ codes by an encoder and a decoder, in float32 (no TF32 either): bits near zero would flip."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @property
    def down(self) -> int:
        """Pixels of a token's side."""
        return self.config.down

    def num_tokens(self, resolution: int) -> int:
        """Codes of a square picture. Raises UserError where its side is no multiple of `down`."""
        if resolution <= 0 or resolution % self.down:
            raise UserError(f"resolution {resolution} is not a multiple of the image tokenizer's {self.down} pixels")
        return (resolution // self.down) ** 2

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, R, R] in [−1, 1] → codes [B, (R/down)²] int64 in raster order."""
        self.num_tokens(pixels.shape[-1])
        with _float32():
            return lfq.codes(self.encoder(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor, height: int, width: int) -> Tensor:
        """Codes [B, height·width] int64 → float32 [B, 3, height·down, width·down], about in [−1, 1].

        Raises ValueError for codes outside 0 … num_codes − 1 or of another number.
        """
        if codes.shape[1] != height * width:
            raise ValueError(f"{codes.shape[1]} codes are not {height} × {width}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise ValueError(f"codes must be from 0 to {self.num_codes - 1}")
        with _float32():
            return self.decoder(lfq.vectors(codes, height, width, self.config.bits))

    def fingerprint(self) -> str:
        """Checksum of what is computed: SHA-256 over the architecture and the weights in float32, whatever the file."""
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def _float32() -> Iterator[None]:
    """cuDNN's convolutions round their inputs to TF32 otherwise."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


def save_tokenizer(tokenizer: ImageTokenizer, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", {"_class_name": OWN_CLASS, **tokenizer.config.model_dump(mode="json")})


def load_tokenizer(folder: str | Path) -> ImageTokenizer:
    """The image tokenizer of a folder, on the CPU, in evaluation mode, its parameters frozen.

    Raises UserError where a file is missing or damaged, or a tensor is missing, extra, or of another shape.
    """
    folder = Path(folder)
    config = _config(folder)
    path = _weights_file(folder)
    weights = _checked(path, config)
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config)
    tokenizer.load_state_dict(weights, assign=True)
    return tokenizer.eval().requires_grad_(False)


def _public(_: dict[str, Any]) -> ImageTokenizerConfig:
    """Show-o's and MMaDA's; its config.json names no sizes, the weights' shapes show them."""
    return ImageTokenizerConfig()


def _own(fields: dict[str, Any]) -> ImageTokenizerConfig:
    return ImageTokenizerConfig.model_validate(fields)


# by config.json's _class_name: its other fields → the architecture
IMAGE_TOKENIZERS: dict[str, Callable[[dict[str, Any]], ImageTokenizerConfig]] = {
    "MAGVITv2": _public,
    "MAGViTv2": _public,
    OWN_CLASS: _own,
}


def _config(folder: Path) -> ImageTokenizerConfig:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of an image tokenizer")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json, which an image tokenizer's folder has") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name not in IMAGE_TOKENIZERS:
        raise UserError(f"{path}: '_class_name' {name!r} is no known image tokenizer ({', '.join(IMAGE_TOKENIZERS)})")
    fields = {key: value for key, value in values.items() if not key.startswith("_")}
    try:
        return IMAGE_TOKENIZERS[name](fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {f'{place!r}: ' if place else ''}{first['msg']}") from None


def _weights_file(folder: Path) -> Path:
    found = [folder / name for name in _WEIGHTS_FILES if (folder / name).is_file()]
    found = found or sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: several files of weights ({names}); keep one")
    if found:
        return found[0]
    pickles = [path for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if not pickles:
        raise UserError(f"{folder}: no {WEIGHTS}, which an image tokenizer's folder has")
    raise UserError(
        f"{pickles[0]}: a pickle, which can run code, is not loaded; write a safetensors file beside it: python -c "
        f"\"import torch, safetensors.torch as s; w = torch.load('{pickles[0].name}', weights_only=True); "
        f"s.save_file({{k: v.contiguous() for k, v in w.get('model', w).items()}}, '{WEIGHTS}')\""
    )


def _checked(path: Path, config: ImageTokenizerConfig) -> dict[str, Tensor]:
    expected = parameter_shapes(config)
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            buffers = names & _BUFFERS.keys()
            missing = sorted(expected.keys() - names)
            extra = sorted(names - expected.keys() - buffers)
            if missing or extra:
                what, some = ("is missing", missing) if missing else ("is not a tensor of this image tokenizer", extra)
                more = f" (and {len(some) - 1} more)" if len(some) > 1 else ""
                raise UserError(f"{path}: '{some[0]}' {what}{more}")
            for name in sorted(buffers):
                if not torch.equal(file.get_tensor(name).double(), _BUFFERS[name](config.bits).double()):
                    raise UserError(f"{path}: '{name}' orders bits in another way than channel 0 first")
            return {name: _parameter(file.get_tensor(name), f"{path}: '{name}'", expected[name]) for name in expected}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a safetensors file that can be read ({' '.join(str(error).split())})") from None


def _parameter(tensor: Tensor, what: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{what} has the shape {list(tensor.shape)}; expected {list(shape)}")
    if tensor.dtype not in _FLOATS:
        raise UserError(f"{what} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers")
    tensor = tensor.to(torch.float32, copy=True)  # not a part of the mapped file
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{what} holds values that are infinite or not numbers (NaN)")
    return tensor


def _all_codes(bits: int) -> Tensor:
    codes = torch.arange(1 << bits)
    return lfq.vectors(codes[None], 1 << bits, 1, bits)[0, :, :, 0].t()


# Constants that public files store beside the parameters.
_BUFFERS: dict[str, Callable[[int], Tensor]] = {
    "quantize.embedding": _all_codes,
    "quantize.power_vals": lambda bits: 1 << torch.arange(bits - 1, -1, -1),
}
