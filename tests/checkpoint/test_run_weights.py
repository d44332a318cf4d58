"""Which adapter a run is read with, and what is read again where another is taken."""

from __future__ import annotations

import pytest

from megatron_mdm.checkpoint.merged import AdapterWeights, merged_names
from megatron_mdm.checkpoint.peft import target_modules
from megatron_mdm.checkpoint.run_weights import NONE, OWN, ChosenAdapter, distinct_labels
from megatron_mdm.config.schema import LoraConfig
from megatron_mdm.models.families import FAMILIES
from tests.small import small_model

WEIGHTS = AdapterWeights(LoraConfig(rank=2), {})


def test_only_matrices_with_an_adapter_are_read_again() -> None:
    model = small_model(qkv_bias=True)
    one = AdapterWeights(LoraConfig(rank=2, targets=("q_proj", "down", "embedding")), {})
    assert merged_names(one, model) == {
        "embedding.word_embeddings.weight",
        *(f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(2)),
        *(f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(2)),
    }
    assert merged_names(None, model) == set()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("query", "value"), ["q_proj", "v_proj"]),
        (("down",), ["0.ff_out", "1.ff_out"]),
        (("head", "embedding"), ["wte", "transformer.ff_out"]),
        (("down", "head"), ["ff_out"]),
    ],
)
def test_modules_are_named_as_shortly_as_no_other_is(targets: tuple[str, ...], expected: list[str]) -> None:
    """A LLaDA's down projections and its head are all called ff_out."""
    model = small_model(lora={"rank": 2, "targets": targets})
    assert target_modules(FAMILIES["llada"], model) == expected


def test_results_of_several_adapters_have_names_of_their_own() -> None:
    names = ["a/adapter", "none", "b/adapter", "own", "c/adapter/"]
    assert distinct_labels([ChosenAdapter(name, WEIGHTS) for name in names]) == [
        "adapter",
        "none",
        "adapter-2",
        "own",
        "adapter-3",
    ]
    assert distinct_labels([ChosenAdapter("a/adapter", WEIGHTS)]) == [""]


def test_an_identity_is_of_contents_and_not_of_a_place() -> None:
    moved = [ChosenAdapter(f"{place}/adapter", WEIGHTS, "1f") for place in ("here", "there")]
    assert moved[0].identity() == moved[1].identity() == {"adapter": "adapter", "adapter (sha256)": "1f"}
    assert ChosenAdapter(NONE).identity() == {"adapter": "none"}
    assert ChosenAdapter(OWN, WEIGHTS, "2e").identity() != ChosenAdapter(OWN, WEIGHTS, "1f").identity()
    assert ChosenAdapter("").identity() == {}  # a run without adapters, as before there were any
