"""Adapters against the peft library: what they compute, their gradients, and files in both directions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_mdm.checkpoint.compare import differences
from megatron_mdm.checkpoint.convert import ImportOptions, export_checkpoint, import_checkpoint
from megatron_mdm.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.checkpoint.lazy_tensors import read, with_grown_tables
from megatron_mdm.checkpoint.merged import merged
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.checkpoint.peft import ADAPTER_FILE, PeftAdapter
from megatron_mdm.checkpoint.peft_export import export_adapter, tensors_to_write
from megatron_mdm.checkpoint.run_weights import NONE, RunWeights
from megatron_mdm.checkpoint.weights import adapters_in, whole_tensors
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import LoraConfig, RunConfig
from megatron_mdm.models.families import FAMILIES
from megatron_mdm.models.parameters import EMBEDDING, OUTPUT
from tests.checkpoint.adapted_models import CASES, load_peft, logits_of, peft_model
from tests.checkpoint.huggingface_models import VOCAB, write_checkpoint
from tests.ranks import run_ranks
from tests.small import small_config

LAYER = "decoder.layers.1."
TOKENS = np.random.default_rng(0).integers(1, VOCAB, (4, 11))  # without the padding token, which PEFT does not train
SOME = ("llama", "qwen2_all_linear", "llada_all")
LAYOUTS: dict[str, tuple[int, dict[str, Any], Sequence[str]]] = {
    "one": (1, {"zero": 0}, tuple(CASES)),
    "tp2": (2, {"tensor": 2, "zero": 1}, SOME),
    "tp2_sp": (2, {"tensor": 2, "sequence": True, "zero": 1}, ("llada_all",)),
    "pp2": (2, {"pipeline": 2, "zero": 1}, SOME),
    "dp2_zero3": (2, {"zero": 3}, SOME),
}
Logits = dict[str, dict[str, Any]]  # of cases, by what computes them


def config_of(folder: Path, case: str, run: str, parallel: dict[str, Any]) -> RunConfig:
    """A run that begins with a case's model and adapter. Adam's first moment is the gradient itself."""
    family, _ = CASES[case]
    described = HuggingFaceCheckpoint.open(folder / family).model
    lora = PeftAdapter.open(folder / case, described).weights.lora.model_copy(update={"init_from": str(folder / case)})
    model = described.model_copy(update={"init_from": str(folder / family), "vocab_divisor": 8, "lora": lora})
    return small_config(
        folder,
        model=model.model_dump(),
        parallel=parallel,
        batch={"global_size": 4, "micro_size": 2},
        optimizer={"lr": 0.1, "betas": [0.0, 0.999], "weight_decay": 0.0, "gradient_clipping": 0.0},
        checkpoint={"directory": str(folder / run / case)},
    )


def trained(configs: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """On a rank, for each configuration: logits before and after a step, whose checkpoint the run's folder has; and of
    that, read for inference, with its adapter, without one, and with the one it began with."""
    from megatron_mdm.batch import Full
    from megatron_mdm.checkpoint.base import BASE, INPUTS, fingerprint
    from megatron_mdm.checkpoint.load import LoadedRun, restored_engine, run_config, run_weights
    from megatron_mdm.checkpoint.native import keep_companions
    from megatron_mdm.checkpoint.store import CheckpointStore
    from megatron_mdm.config.files import write_json
    from megatron_mdm.config.load import dump_config
    from megatron_mdm.engine.inputs import logits_inputs
    from megatron_mdm.parallel.groups import initialize

    context = initialize(next(iter(configs.values())).parallel)
    tokens = torch.from_numpy(TOKENS)
    everything = torch.ones(tokens.shape, dtype=torch.bool)
    inputs = logits_inputs(tokens, Full(), everything)
    scored = inputs._replace(labels=tokens, token_weight=torch.ones(tokens.shape), row_weight=torch.ones(len(tokens)))
    halves = [
        type(scored)(*(value[rows] if torch.is_tensor(value) else value for value in scored))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    results = {}
    for name, config in configs.items():
        run = Path(config.checkpoint.directory)
        engine = restored_engine(None, config, context, 0)
        logits = {"before": engine.logits(inputs)}
        mine = halves[context.data_rank :: context.layout.data]
        engine.train_batch(mine, 0.1)
        logits["after"] = engine.logits(inputs)
        store = CheckpointStore(run / "checkpoints", config.checkpoint, context)
        store.save(1, engine, {})
        store.finish()
        if context.is_main:
            keep_companions(Path(config.model.init_from), run)
            write_json(run / INPUTS, {BASE: fingerprint(Path(config.model.init_from))})
            (run / "config.yaml").write_text(dump_config(config, run), encoding="utf-8")
        torch.distributed.barrier()
        reading = run_config(run, config.parallel.tensor, config.parallel.pipeline)
        weights = run_weights(run, reading, context)
        loaded = LoadedRun(weights, weights.adapter(), reading, context)
        logits["own"] = loaded.engine.logits(inputs)
        for wish in (NONE, config.model.lora.init_from):
            loaded.take(weights.adapter(wish))
            logits[wish] = loaded.engine.logits(inputs)
        results[name] = {key: value.float().numpy().copy() for key, value in logits.items()}
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters, written by transformers and PEFT."""
    folder = tmp_path_factory.mktemp("peft")
    for family in {family for family, _ in CASES.values()}:
        write_checkpoint(folder / family, family)
    for case in CASES:
        peft_model(case).save_pretrained(folder / case)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """PEFT's logits and gradients."""
    found = {}
    for case in CASES:
        model = peft_model(case)
        logits = logits_of(model, torch.from_numpy(TOKENS))
        F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(TOKENS).flatten(), reduction="sum").backward()
        gradients = {
            name.replace(".default", ""): parameter.grad.numpy()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        with model.disable_adapter(), torch.no_grad():
            base = logits_of(model, torch.from_numpy(TOKENS)).flatten(0, 1).numpy()
        found[case] = {"logits": logits.detach().flatten(0, 1).numpy(), "gradients": gradients, "base": base}
    return found


@pytest.fixture(scope="module")
def runs(folder: Path) -> Callable[[str], list[Logits]]:
    """What each rank of a layout has, whose runs then lie in folder/layout."""

    @cache
    def run(layout: str) -> list[Logits]:
        num_ranks, parallel, cases = LAYOUTS[layout]
        return run_ranks(trained, num_ranks, {case: config_of(folder, case, layout, parallel) for case in cases})

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_pefts(
    layout: str, folder: Path, runs: Callable[[str], list[Logits]], expected: dict[str, dict[str, Any]]
) -> None:
    results = runs(layout)
    for case in LAYOUTS[layout][2]:
        family, _ = CASES[case]
        run = NativeCheckpoint.open(folder / layout / case)
        gradients = tensors_to_write(run, FAMILIES[family], "exp_avg")
        assert gradients.keys() == expected[case]["gradients"].keys()
        for name, gradient in expected[case]["gradients"].items():
            tolerance = 1e-5 * np.abs(gradient).max()
            ours = read(gradients[name]).numpy()
            np.testing.assert_allclose(ours, gradient, rtol=0, atol=tolerance, err_msg=f"{case} {name}")
        for result in (result[case] for result in results):
            assert_close(result["before"], expected[case]["logits"], case)
            assert_close(result[str(folder / case)], expected[case]["logits"], f"{case}, merged")
            assert_close(result[NONE], expected[case]["base"], f"{case}, without the adapter")
            assert_close(result["own"], result["after"], f"{case}, merged after a step")
            assert np.abs(result["after"] - result["before"]).max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_is_exported(case: str, folder: Path, runs: Callable[[str], list[Logits]]) -> None:
    """The adapter, of which every tensor finds its place, and the merged weights."""
    layout = "tp2" if case in SOME else "one"
    logits = runs(layout)[0][case]["after"]
    family, settings = CASES[case]
    run = NativeCheckpoint.open(folder / layout / case)
    adapter, whole = folder / f"{case}.adapter", folder / f"{case}.whole"
    assert export_adapter(run, adapter, "auto", "auto") == [f"base: {folder / family}"]
    model = load_peft(family, adapter)
    exported = load_file(adapter / ADAPTER_FILE)
    placed = {name.replace(".default", "") for name in model.state_dict() if ".lora_" in name}
    assert placed == exported.keys()
    theirs = {name for name in load_file(folder / case / ADAPTER_FILE) if ".lora_" in name}
    assert placed == theirs
    with torch.no_grad():
        assert_close(logits_of(model, torch.from_numpy(TOKENS)).flatten(0, 1).numpy(), logits, case)
    assert model.peft_config["default"].use_rslora == settings.get("use_rslora", False)

    export_checkpoint(run, whole, "auto", "auto", 10**9)
    merged = model.merge_and_unload().state_dict()
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7, msg=name)
    assert set(differences(folder / layout / case, whole)) == {""}
    assert set(differences(folder / layout / case, adapter)) == {""}
    assert any(differences(folder / case, adapter))  # a step lies between


def test_a_run_with_adapters_is_a_start(folder: Path, runs: Callable[[str], list[Logits]]) -> None:
    """Of a plain run, by its merged weights; of one with adapters beside the same weights, by its own."""
    runs("one")
    source = folder / "one/llada_all"
    kept = load_config(source / "config.yaml").model
    initial = InitialWeights(kept.model_copy(update={"lora": LoraConfig(), "init_from": str(source)}))
    assert "adapters merged" in initial.describe(57)
    ours = whole_tensors(NativeCheckpoint.open(source))
    assert all(torch.equal(read(initial.tensors[name]), read(tensor)) for name, tensor in ours.items())
    again = kept.model_copy(update={"lora": kept.lora.model_copy(update={"init_from": str(source)})})
    adapters = adapters_in(NativeCheckpoint.open(source)).tensors
    begun = InitialWeights(again)
    assert f"adapters: those of {source}" in begun.describe(57)
    assert all(torch.equal(read(begun.tensors[name]), read(tensor)) for name, tensor in adapters.items())
    assert InitialWeights(again, with_adapters=False).tensors.keys().isdisjoint(adapters)


def test_a_runs_adapters_belong_to_the_weights_beside_them(
    folder: Path, runs: Callable[[str], list[Logits]], tmp_path: Path
) -> None:
    """Those of another folder are refused; whether a run that was imported has the same is not known, and told."""
    runs("one")
    adapter = folder / "one/llada"
    other = opened_weights(folder / "one/llama")
    with pytest.raises(UserError, match="was trained beside other weights than those of"):
        other.adapter(str(adapter))
    options = ImportOptions(1, 1, "auto", 10**9, {"mask": "", "pad": "", "eos": ""})
    import_checkpoint(folder / "llada", tmp_path / "imported", options)
    imported = opened_weights(tmp_path / "imported")
    chosen = imported.adapter(str(adapter))
    (note,) = chosen.notes
    assert f"that it held the weights of {imported.run.path} is not checked" in note
    own = opened_weights(adapter)
    ours, theirs = imported.tensors(chosen), own.tensors(own.adapter())
    assert all(torch.equal(read(ours[name]), read(tensor)) for name, tensor in theirs.items())


def opened_weights(run: Path) -> RunWeights:
    found = NativeCheckpoint.open(run)
    return RunWeights(run, found.config.model, found.path)


def test_a_table_that_is_not_the_bases_is_named(folder: Path, tmp_path: Path) -> None:
    """PEFT writes tables that are targets beside their adapters."""
    model = HuggingFaceCheckpoint.open(folder / "llama").model
    base = HuggingFaceCheckpoint.open(folder / "llama").lazy_tensors()
    adapter = PeftAdapter.open(folder / "llama_tables", model)
    assert adapter.tables.keys() == {EMBEDDING, OUTPUT}
    adapter.check_base(base)
    copy = Path(shutil.copytree(folder / "llama_tables", tmp_path / "copy"))
    tensors = load_file(copy / ADAPTER_FILE)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 4] += 1
    save_file(tensors, copy / ADAPTER_FILE)
    with pytest.raises(UserError, match=r"'base_model\.model\.lm_head\.base_layer\.weight' is not the base's: the ada"):
        PeftAdapter.open(copy, model).check_base(base)


def test_a_table_that_has_grown_has_no_adapter_in_its_new_rows(folder: Path) -> None:
    model = HuggingFaceCheckpoint.open(folder / "llama").model
    wider = model.model_copy(update={"vocab_size": VOCAB + 3})
    found = PeftAdapter.open(folder / "llama_tables", wider)
    base = with_grown_tables(HuggingFaceCheckpoint.open(folder / "llama").lazy_tensors(), wider)
    found.check_base(base)
    ours = merged(base, found.weights, wider)
    theirs = peft_model("llama_tables").merge_and_unload().state_dict()
    for name, table in ((EMBEDDING, "model.embed_tokens.weight"), (OUTPUT, "lm_head.weight")):
        whole = read(ours[name])
        torch.testing.assert_close(whole[:VOCAB], theirs[table], rtol=1e-6, atol=1e-7)
        assert torch.equal(whole[VOCAB:], read(base[name])[VOCAB:])


def test_any_block_of_merged_weights_has_the_same_bits(folder: Path) -> None:
    checkpoint = HuggingFaceCheckpoint.open(folder / "qwen2")
    adapter = PeftAdapter.open(folder / "qwen2_all_linear", checkpoint.model).weights
    tensor = merged(checkpoint.lazy_tensors(), adapter, checkpoint.model)[f"{LAYER}self_attention.linear_qkv.weight"]
    whole = read(tensor)
    for row, column, rows, columns in ((0, 0, 1, 1), (7, 3, 20, 29), (30, 31, 34, 1), (13, 0, 1, 32)):
        block = torch.empty(rows, columns)
        tensor.read_into(block, row, column)
        assert torch.equal(block, whole[row : row + rows, column : column + columns])
    half = read(tensor, torch.bfloat16)
    assert torch.equal(half, whole.bfloat16())


def assert_close(ours: Any, theirs: Any, name: str) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max(), err_msg=name)
