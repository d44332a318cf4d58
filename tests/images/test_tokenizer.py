"""Image tokenizers: the public parameters, bits and codes, folders and what may be wrong with them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.images import lfq
from megatron_mdm.images.magvit import ImageTokenizerConfig, parameter_shapes
from megatron_mdm.images.tokenizer import WEIGHTS, ImageTokenizer, load_tokenizer, save_tokenizer
from tests.images.reference import decoded, encoded
from tests.images.small import small_image_tokenizer


def conv(name: str, width: int, width_in: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width, width_in, kernel, kernel), f"{name}.bias": (width,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name: str, width_in: int, width: int) -> dict[str, tuple[int, ...]]:
    shortcut = conv(f"{name}.nin_shortcut", width, width_in, 1) if width_in != width else {}
    first = {**norm(f"{name}.norm1", width_in), **conv(f"{name}.conv1", width, width_in, 3)}
    return {**first, **norm(f"{name}.norm2", width), **conv(f"{name}.conv2", width, width, 3), **shortcut}


def middle(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {**block(f"{name}.block_1", 512, 512), **block(f"{name}.block_2", 512, 512)}
    shapes |= norm(f"{name}.attn_1.norm", 512)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.attn_1.{layer}", 512, 512, 1)
    return shapes


def public_shapes() -> dict[str, tuple[int, ...]]:
    """MMaDA's and Show-o's, written down from the released classes' description level by level."""
    shapes = conv("encoder.conv_in", 128, 3, 3)
    for level, (width_in, width, number) in enumerate(
        [(128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3), (512, 512, 4)]
    ):
        for place in range(number):
            shapes |= block(f"encoder.down.{level}.block.{place}", width if place else width_in, width)
        if level < 4:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    shapes |= middle("encoder.mid")
    shapes |= norm("encoder.norm_out", 512) | conv("encoder.conv_out", 13, 512, 3)
    shapes |= conv("encoder.quant_conv", 13, 13, 1) | conv("decoder.post_quant_conv", 13, 13, 1)
    shapes |= conv("decoder.conv_in", 512, 13, 3) | middle("decoder.mid")
    for level, (width_in, width, number) in zip(
        (4, 3, 2, 1, 0), [(512, 512, 3), (512, 256, 4), (256, 256, 3), (256, 128, 4), (128, 128, 4)]
    ):
        for place in range(number):
            shapes |= block(f"decoder.up.{level}.block.{place}", width if place else width_in, width)
        if level:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    return shapes | norm("decoder.norm_out", 128) | conv("decoder.conv_out", 3, 128, 3)


def test_full_size_has_the_public_parameters() -> None:
    shapes = parameter_shapes(ImageTokenizerConfig())
    assert shapes == public_shapes()
    assert len(shapes) == 380
    sizes = {
        half: sum(math.prod(s) for n, s in shapes.items() if n.startswith(half)) for half in ("encoder", "decoder")
    }
    assert sizes == {"encoder": 55_439_171, "decoder": 39_947_833}
    assert (ImageTokenizerConfig().down, ImageTokenizerConfig().num_codes) == (16, 8192)


def test_the_first_channel_is_the_most_significant_bit() -> None:
    signs = lfq.vectors(torch.tensor([[1, 4096, 0, 8191]]), 2, 2, 13)
    positive = [(signs[0, :, place // 2, place % 2] > 0).nonzero()[:, 0].tolist() for place in range(4)]
    assert positive == [[12], [0], [], list(range(13))]


def test_codes_of_their_vectors_are_the_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in (1, 8, 13, 24):
        code = torch.randint(0, 1 << bits, (3, 12), generator=generator)
        signs = lfq.vectors(code, 3, 4, bits)
        assert set(signs.unique().tolist()) <= {-1.0, 1.0}
        assert torch.equal(lfq.codes(signs * torch.rand(signs.shape, generator=generator).add(1e-6)), code)
    assert lfq.codes(torch.zeros(1, 4, 1, 1)).tolist() == [[0]]  # zero counts as negative
    assert torch.equal(lfq.quantize(torch.tensor([0.0, -0.3, 2.0])), torch.tensor([-1.0, -1.0, 1.0]))


def test_signs_pass_gradients_through() -> None:
    z = torch.tensor([[0.3, -2.0]], requires_grad=True)
    (lfq.quantize(z) * torch.tensor([5.0, 7.0])).sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[5.0, 7.0]]


def test_losses_of_the_quantizer_by_numpy() -> None:
    z = np.random.default_rng(0).normal(size=(4, 3, 2, 2))
    found = lfq.losses(torch.from_numpy(z))
    probability = 1 / (1 + np.exp(-4 * z))

    def entropy(p: np.ndarray) -> np.ndarray:
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    assert found.commitment.item() == pytest.approx(((np.sign(z) - z) ** 2).mean())
    expected = entropy(probability).mean() - entropy(probability.mean((0, 2, 3))).mean()
    assert found.entropy.item() == pytest.approx(expected)
    sure = torch.tensor([400.0, -400.0]).view(2, 1, 1, 1)  # of each token, and as many of each kind: the least there is
    assert lfq.losses(sure).entropy.item() == pytest.approx(-math.log(2), rel=1e-6)


def test_the_quantizers_gradient_is_finite_where_bits_are_sure() -> None:
    for values in ([400.0, 300.0], [-400.0, -300.0], [400.0, -400.0]):
        z = torch.tensor(values).view(2, 1, 1, 1).requires_grad_()
        sum(lfq.losses(z)).backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()


def test_both_halves_are_the_reference() -> None:
    """In float64. A step down that padded all sides would move every token by half a pixel."""
    tokenizer = small_image_tokenizer().double()
    for parameter in tokenizer.parameters():
        parameter.normal_(std=0.3)
    weights = dict(tokenizer.named_parameters())
    architecture = tokenizer.config
    pixels = torch.rand(2, 3, 8, 12, dtype=torch.double) * 2 - 1
    z = encoded(weights, architecture.encoder.blocks, architecture.groups, pixels)
    torch.testing.assert_close(tokenizer.encoder(pixels), z)
    code = tokenizer.encode(pixels)
    signs = torch.where(z > 0, 1.0, -1.0).double()
    assert torch.equal(lfq.vectors(code, 4, 6, 5).double(), signs)
    shown = decoded(weights, architecture.decoder.blocks, architecture.groups, signs)
    torch.testing.assert_close(tokenizer.decoder(signs), shown)


def test_full_size_makes_1024_codes_of_512_pixels() -> None:
    """And pixels again; by shapes alone, without numbers."""
    with torch.device("meta"):
        tokenizer = ImageTokenizer(ImageTokenizerConfig())
        z = tokenizer.encoder(torch.empty(1, 3, 512, 512))
        assert z.shape == (1, 13, 32, 32)
        assert tokenizer.decoder(z).shape == (1, 3, 512, 512)
    assert tokenizer.num_tokens(512) == 1024


def test_shapes_and_refusals() -> None:
    tokenizer = small_image_tokenizer()
    pixels = torch.rand(3, 3, 12, 12) * 2 - 1
    code = tokenizer.encode(pixels)
    assert code.shape == (3, 36)
    assert code.dtype == torch.int64
    assert tokenizer.num_tokens(12) == 36
    assert tokenizer.decode(code, 6, 6).shape == pixels.shape
    assert tokenizer.decode(code[:, :12], 2, 6).shape == (3, 3, 4, 12)
    with pytest.raises(UserError, match="13 is not a multiple"):
        tokenizer.encode(torch.zeros(1, 3, 13, 13))
    with pytest.raises(ValueError, match="36 codes are not 5 × 6"):
        tokenizer.decode(code, 5, 6)
    with pytest.raises(ValueError, match="from 0 to 31"):
        tokenizer.decode(code + 31, 6, 6)


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    tokenizer = small_image_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.config == tokenizer.config
    assert again.fingerprint() == tokenizer.fingerprint() != small_image_tokenizer(1).fingerprint()
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.encode(pixels), tokenizer.encode(pixels))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_the_fingerprint_is_of_the_weights_not_of_the_file(tmp_path: Path) -> None:
    """Another order, name and type of file, and the public constants beside the weights: the same tokenizer."""
    tokenizer = small_image_tokenizer()
    for parameter in tokenizer.parameters():
        parameter.copy_(parameter.bfloat16())
    save_tokenizer(tokenizer, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights = {name: tensor.bfloat16() for name, tensor in reversed(weights.items())}
    weights["quantize.power_vals"] = 2 ** torch.arange(4, -1, -1)
    weights["quantize.embedding"] = torch.tensor(
        [[1.0 if c >> k & 1 else -1.0 for k in (4, 3, 2, 1, 0)] for c in range(32)]
    )
    (tmp_path / WEIGHTS).unlink()
    save_file(weights, tmp_path / "pytorch_model.safetensors")
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_public_folders_are_known_by_their_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2", "_diffusers_version": "0.30.1"}))
    save_file({"encoder.conv_in.weight": torch.zeros(128, 3, 3, 3)}, tmp_path / "pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"'decoder\.conv_in\.bias' is missing \(and 378 more\)"):
        load_tokenizer(tmp_path)


def weights_changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def config_changed(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def not_finite(weights: dict[str, Tensor]) -> None:
    weights["decoder.conv_in.bias"][3] = torch.nan


NAME = "decoder.conv_in.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors"),
    "a pickle": (pickled, r"pytorch_model.bin: a pickle, which can run code, is not loaded; write a safetensors"),
    "cut": (cut, "not a safetensors file that can be read"),
    "text": (lambda folder: (folder / WEIGHTS).write_text("git-lfs pointer"), "not a safetensors file"),
    "two files": (lambda folder: (folder / "pytorch_model.safetensors").write_bytes(b""), "several files of weights"),
    "one missing": (weights_changed(lambda weights: weights.pop(NAME)), f"'{NAME}' is missing"),
    "one extra": (weights_changed(lambda weights: weights.update(more=torch.zeros(1))), "'more' is not a tensor of"),
    "a shape": (
        weights_changed(lambda weights: weights.update({NAME: torch.zeros(16, 5, 1, 1)})),
        rf"'{NAME}' has the shape \[16, 5, 1, 1\]; expected \[8, 5, 3, 3\]",
    ),
    "integers": (weights_changed(lambda weights: weights.update({NAME: torch.zeros(8, 5, 3, 3).int()})), "int32"),
    "not a number": (weights_changed(not_finite), "infinite or not numbers"),
    "bits reversed": (
        weights_changed(lambda weights: weights.update({"quantize.power_vals": 2 ** torch.arange(5)})),
        "'quantize.power_vals' orders bits in another way",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "no known image tokenizer"),
    "another class": (config_changed(_class_name="VQModel"), "'VQModel' is no known image tokenizer"),
    "another number": (config_changed(bits=0), "'bits': Input should be greater than 0"),
    "another field": (config_changed(codebook=4), "'codebook': Extra inputs are not permitted"),
    "levels": (config_changed(encoder={"multipliers": [1], "blocks": [1]}), "as many levels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_line(name: str, tmp_path: Path) -> None:
    save_tokenizer(small_image_tokenizer(), tmp_path)
    BAD[name][0](tmp_path)
    with pytest.raises(UserError, match=BAD[name][1]) as raised:
        load_tokenizer(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_the_way_to_convert_a_pickle_works(tmp_path: Path) -> None:
    tokenizer = small_image_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    torch.save({"model": load_file(tmp_path / WEIGHTS)}, tmp_path / "pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path)
    (code,) = re.findall(r'python -c "(.*)"$', str(raised.value))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=dict(os.environ), check=True)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of an image tokenizer"):
        load_tokenizer(tmp_path / "absent")
