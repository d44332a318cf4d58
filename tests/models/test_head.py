"""The head, asked for the logits of some tokens only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_mdm.config.sections.image import ImageVocabulary
from tests.ranks import run_ranks
from tests.small import small_model

NUM_PLACES = 1024
MMADA = ImageVocabulary()
TABLE = 134_656  # MMaDA's rows


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        views_of = {id(tensor.untyped_storage()) for tensor in arguments if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in views_of:
                self.numel = max(self.numel, tensor.numel())
        return result


def of_an_image(tensor_parallel: int) -> tuple[int, int]:
    """On a rank: (elements of the largest tensor, floating-point operations) of an image's logits."""
    from megatron_mdm.batch import Full
    from megatron_mdm.config.schema import ParallelConfig
    from megatron_mdm.engine.inputs import logits_inputs
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    parallel = ParallelConfig(tensor=tensor_parallel)
    context = initialize(parallel)
    model = small_model(hidden_size=4, num_heads=2, num_kv_heads=2, vocab_size=TABLE, max_sequence_length=2048)
    head = build_model(model, parallel, context, 3)[-1].requires_grad_(False)
    inputs = logits_inputs(
        torch.zeros(1, NUM_PLACES, dtype=torch.int64), Full(), torch.ones(1, NUM_PLACES, dtype=torch.bool)
    )
    hidden = torch.randn(NUM_PLACES, 1, 4)
    with torch.no_grad(), Largest() as largest, FlopCounterMode(display=False) as counter:
        logits = head(hidden, inputs, True, (MMADA.first_id, MMADA.num_codes))
    assert logits.shape == (NUM_PLACES, MMADA.num_codes)
    return largest.numel, counter.get_total_flops()


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_an_image_is_computed_without_logits_of_the_whole_table(tensor_parallel: int) -> None:
    """1,024 places, MMaDA's table: at most an eighth of [1024, 134656] in memory and in work, on all ranks together."""
    of_ranks = run_ranks(of_an_image, tensor_parallel, tensor_parallel)
    assert all(NUM_PLACES * MMADA.num_codes <= numel <= NUM_PLACES * TABLE // 8 for numel, _ in of_ranks)
    assert sum(flops for _, flops in of_ranks) == 2 * NUM_PLACES * 4 * MMADA.num_codes


def of_a_drawn_image() -> int:
    """On a rank: elements of the largest tensor while an image is drawn in one step, with guidance."""
    from megatron_mdm.config.schema import ParallelConfig
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.generation.image_sampler import denoise_images
    from megatron_mdm.generation.image_settings import ImageSampling, ImageTokens
    from megatron_mdm.generation.settings import SpecialIds
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    model = small_model(
        num_layers=1, hidden_size=4, num_heads=1, num_kv_heads=1, vocab_size=TABLE, max_sequence_length=2048
    )
    engine = InferenceEngine(build_model(model, ParallelConfig(), context, 3), "fp32")
    image = ImageTokens(MMADA, NUM_PLACES)
    with Largest() as largest:
        (response,) = denoise_images(engine, [[5]], [0], ImageSampling(steps=1), SpecialIds(126_336, 0), image=image)
    assert len(set(response.tokens)) > 900  # of 8,192 drawn about evenly
    return largest.numel


def test_drawing_an_image_holds_no_logits_of_the_whole_table() -> None:
    """Two rows of 1,024 places and 8,192 ids, with caption and without, are the most that there is."""
    assert run_ranks(of_a_drawn_image, 1) == [2 * NUM_PLACES * MMADA.num_codes]
    assert 2 * NUM_PLACES * MMADA.num_codes <= NUM_PLACES * TABLE // 8


def of_an_adapted_head(ids: tuple[int, int]) -> dict[str, np.ndarray]:
    from megatron_mdm.batch import Full
    from megatron_mdm.config.schema import ParallelConfig
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.engine.inputs import logits_inputs
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    model = small_model(lora={"rank": 2, "targets": ("head",)}, init_from="base")
    built = build_model(model, ParallelConfig(), context, 3)
    with torch.no_grad():
        built[-1].adapter.lora_head_B.normal_()
    engine = InferenceEngine(built, "fp32")
    tokens = torch.arange(2, 12)[None]
    inputs = logits_inputs(tokens, Full(), tokens > 4)
    message = ""
    try:
        engine.logits(inputs, ids=(50, 12))
    except ValueError as error:
        message = str(error)
    return {
        "all": engine.logits(inputs).numpy(),
        "some": engine.logits(inputs, ids=ids).numpy(),
        "message": np.array(message),
    }


def test_an_adapted_head_and_ids_that_the_model_lacks() -> None:
    found = run_ranks(of_an_adapted_head, 1, (7, 20))[0]
    np.testing.assert_allclose(found["some"], found["all"][:, 7:27], rtol=1e-5, atol=1e-5)
    assert str(found["message"]) == "ids 50 to 61 are not all of the 61 of the model"
