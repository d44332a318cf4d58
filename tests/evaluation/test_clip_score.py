"""CLIP scores against a reference in numpy, long captions, other CLIPs' pitfalls, bad folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from megatron_mdm.config.errors import UserError
from megatron_mdm.evaluation.clip_score import clip_scores, evaluate_clip, load_clip

HEADS = 2
PLACES = 77
CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
VOCABULARY = {c: n for n, c in enumerate([*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)])}
BOS = len(VOCABULARY)
EOS = BOS + 1
VOCABULARY |= {"<|startoftext|>": BOS, "<|endoftext|>": EOS}


def write_clip(folder: Path, eos: int = EOS) -> Path:
    """A random one; a character is a token."""
    text = {"vocab_size": len(VOCABULARY), "max_position_embeddings": PLACES, "eos_token_id": eos, "bos_token_id": BOS}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    config = CLIPConfig(
        text_config={**text, **sizes},
        vision_config={**sizes, "hidden_size": 12, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=VOCABULARY, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


class Reference:
    """CLIP by numpy, from its paper and the weights alone."""

    def __init__(self, folder: Path) -> None:
        self.weights = {name: value.astype(float) for name, value in load_file(folder / "model.safetensors").items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def layers(self, name: str, x: np.ndarray, causal: bool) -> np.ndarray:
        for layer in range(2):
            prefix = f"{name}.encoder.layers.{layer}"
            x = x + self.attention(f"{prefix}.self_attn", self.norm(f"{prefix}.layer_norm1", x), causal)
            hidden = self.linear(f"{prefix}.mlp.fc1", self.norm(f"{prefix}.layer_norm2", x))
            x = x + self.linear(f"{prefix}.mlp.fc2", hidden / (1 + np.exp(-1.702 * hidden)))
        return x

    def attention(self, name: str, x: np.ndarray, causal: bool) -> np.ndarray:
        query, key, value = (self.linear(f"{name}.{part}_proj", x) for part in "qkv")
        width = x.shape[1] // HEADS
        mixed = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            scores = query[:, part] @ key[:, part].T / np.sqrt(width)
            if causal:
                scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mixed.append(weights / weights.sum(1, keepdims=True) @ value[:, part])
        return self.linear(f"{name}.out_proj", np.concatenate(mixed, 1))

    def of_text(self, ids: list[int]) -> np.ndarray:
        name = "text_model"
        x = self.weights[f"{name}.embeddings.token_embedding.weight"][ids]
        x = x + self.weights[f"{name}.embeddings.position_embedding.weight"][: len(ids)]
        x = self.norm(f"{name}.final_layer_norm", self.layers(name, x, causal=True))
        return self.unit(x[-1] @ self.weights["text_projection.weight"].T)  # the last is eos

    def of_image(self, pixels: np.ndarray) -> np.ndarray:
        """pixels [8, 8, 3] uint8."""
        mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        values = (pixels / 255.0 - mean) / deviation
        name = "vision_model"
        kernel = self.weights[f"{name}.embeddings.patch_embedding.weight"]  # [D, 3, 4, 4]
        patches = [values[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].transpose(2, 0, 1) for r in range(2) for c in range(2)]
        x = np.stack([np.tensordot(kernel, patch, 3) for patch in patches])
        x = np.concatenate([self.weights[f"{name}.embeddings.class_embedding"][None], x])
        x = x + self.weights[f"{name}.embeddings.position_embedding.weight"]
        x = self.layers(name, self.norm(f"{name}.pre_layrnorm", x), causal=False)
        return self.unit(self.norm(f"{name}.post_layernorm", x[0]) @ self.weights["visual_projection.weight"].T)

    @staticmethod
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x)


def pictures(number: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


# Ids with bos and eos: 4, 76, 77, 78, 202.
CAPTIONS = ["ab", "x" * 74, "y" * 75, "z" * 76, "w" * 200]


@pytest.mark.parametrize("eos", [EOS, 2])  # 2: what old files say, and the largest id is pooled
def test_scores_are_those_of_the_reference(eos: int, tmp_path: Path) -> None:
    """Cut captions keep eos; captions of a batch do not disturb each other."""
    folder = write_clip(tmp_path, eos)
    reference = Reference(folder)
    clip = load_clip(folder)
    images = pictures(len(CAPTIONS))
    expected = []
    for image, caption in zip(images, CAPTIONS):
        characters = [VOCABULARY[c] for c in caption[:-1]] + [VOCABULARY[f"{caption[-1]}</w>"]]
        ids = [BOS, *characters[: PLACES - 2], EOS]
        assert clip.ids(caption) == (ids, len(caption) > PLACES - 2)
        cosine = reference.of_image(np.asarray(image)) @ reference.of_text(ids)
        expected.append(100 * max(cosine, 0.0))
    np.testing.assert_allclose(clip_scores(images, CAPTIONS, clip), expected, atol=1e-4)
    assert evaluate_clip(images, CAPTIONS, clip)["num_cut"] == 2


def test_the_floor_is_every_other_caption(folder: Path) -> None:
    """Each picture's mean score with the captions that are not its own, which may stand several times."""
    clip = load_clip(folder)
    images = pictures(6)
    captions = ["a", "b", "a", "c", "b", "a"]
    result = evaluate_clip(images, captions, clip)
    by_hand = []
    for image, caption in zip(images, captions):
        own, *others = (
            clip_scores([image], [text], clip)[0] for text in (caption, *(text for text in "abc" if text != caption))
        )
        by_hand.append((own, np.mean(others), own >= max(others)))
    own, others, first = np.array(by_hand).T
    assert result["clip_score"] == pytest.approx(own.mean(), abs=1e-4)
    assert result["shuffled"] == pytest.approx(others.mean(), abs=1e-4)
    assert result["above_shuffled"] == pytest.approx((own - others).mean(), abs=1e-4)
    assert result["above_shuffled_error"] == pytest.approx((own - others).std(ddof=1) / 6**0.5, abs=1e-4)
    assert result["recall_at_1"] == pytest.approx(first.mean())
    assert (result["num_images"], result["num_captions"], result["num_cut"]) == (6, 3, 0)
    identity = {name: result["clip"][name] for name in ("name", "patch", "resolution", "width", "layers", "projection")}
    assert identity == {"name": "tiny", "patch": 4, "resolution": 8, "width": 12, "layers": 2, "projection": 6}
    assert len(result["clip"]["sha256"]["model.safetensors"]) == 64
    with pytest.raises(UserError, match="two distinct captions"):
        evaluate_clip(images[:2], ["a", "a"], clip)


def test_special_tokens_and_unknown_characters_in_a_caption_are_no_special_tokens(folder: Path) -> None:
    clip = load_clip(folder)
    ids, is_cut = clip.ids("a<|endoftext|>b é c")
    assert (ids[0], ids[-1], is_cut) == (BOS, EOS, False)
    assert {BOS, EOS}.isdisjoint(ids[1:-1])
    assert ids[-2] == VOCABULARY["c</w>"]  # what follows is there
    assert ids[1] == VOCABULARY["a</w>"]


def test_pictures_are_prepared_as_transformers_does(folder: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = CLIPImageProcessorPil(**size)
    clip = load_clip(folder)
    for width, height in ((8, 8), (30, 12), (13, 52)):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(clip.pixels(image).numpy(), expected, atol=1e-5)


def test_a_folders_own_mean_and_deviation_are_used(tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    assert load_clip(folder).pixels(white).unique().tolist() == [2.0]


def config_changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return apply


def one_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"][0] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:5000])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no folder with a CLIP model's config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
    "another model": (config_changed(lambda values: values.update(model_type="siglip")), "model_type is not clip"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights$"),
    "pickles": (pickled, "no safetensors weights .* a pickle, which is not loaded"),
    "cut": (cut, "not a CLIP model that can be loaded"),
    "one missing": (one_missing, "'text_projection.weight' is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "not a CLIP model that can be loaded"),
    "wrong eos": (
        config_changed(lambda values: values["text_config"].update(eos_token_id=5)),
        f"text_config.eos_token_id is 5, its tokenizer's eos {EOS}: captions would be summed up at the wrong token",
    ),
    "odd mean": (
        lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [1, 2]}'),
        "preprocessor_config.json: cannot be used",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_line(name: str, tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    BAD[name][0](folder)
    with pytest.raises(UserError, match=BAD[name][1]) as raised:
        load_clip(folder)
    assert str(raised.value).startswith(str(folder))
    assert "\n" not in str(raised.value)


def test_damaged_weights_are_said(tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    not_a_number(folder)
    with pytest.raises(UserError, match="its embeddings are not numbers"):
        clip_scores(pictures(1), ["a"], load_clip(folder))
