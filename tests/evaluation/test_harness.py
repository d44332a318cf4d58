"""lm-eval's requests on every layout; where lm-eval is installed, its tasks by the program that users run; where it is
not, the line that says so."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_section
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.conversation import TemplateSource
from megatron_mdm.data.templates import TEMPLATES
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.harness_requests import HarnessConfig, Wish, generation_for, wish
from megatron_mdm.objectives import objective_of
from tests.ranks import ProgramResult, run_program_ranks, run_ranks
from tests.small import EOS, MASK, PAD, VOCAB, Words, small_config

INSTALLED = importlib.util.find_spec("lm_eval") is not None
NEEDED = pytest.mark.skipif(not INSTALLED, reason="needs lm-eval (200 MB): pip install 'megatron-mdm[eval]'")


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_extra(tmp_path: Path) -> None:
    result = run_program_ranks("launch/evaluate.py", ["--run-dir", str(tmp_path), "--harness", "arc_easy"])[0]
    assert result.exit_code == 1
    assert "install it with: pip install 'megatron-mdm[eval]'" in result.stderr


class Letters(Words):
    """A tokenizer's back end: single characters."""

    def encode_batch(self, texts: list[str], parse_special: bool = False) -> list[list[int]]:
        return [[2 + ord(letter) % 50 for letter in text] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("d") + token % 20) for token in ids)


def answers(config: RunConfig) -> dict[str, Any]:
    from megatron_mdm.checkpoint.load import build_model
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.evaluation.harness_requests import Requests
    from megatron_mdm.parallel.groups import initialize

    context = initialize(config.parallel)
    engine = InferenceEngine(build_model(config.model, config.parallel, context, 3), "fp32")
    tokenizer = Tokenizer(Letters(), VOCAB, MASK, PAD, EOS, TEMPLATES["plain"](TemplateSource("")))
    settings = HarnessConfig(num_times=8, block_length=4, batch_size=3)
    beyond = settings.model_copy(update={"extrapolate": True, "is_greedy": False})
    requests = Requests(engine, tokenizer, settings, config, objective_of(config), context)
    long = "ab" * 40  # 80 tokens, where the model has room for 64
    asked = [
        ("abc", {"until": [], "max_gen_toks": 8}),
        ("abc", {"until": [], "max_gen_toks": 6}),
        ("xyz", {"until": [], "max_gen_toks": 8}),
        (long, {"max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "num_beams": 2}),
        (long, {"max_gen_toks": 8, "do_sample": False, "temperature": 0.7}),
    ]
    whole = requests.responses(asked)
    stops = [whole[0][5], whole[0][2:4]]
    stopped = requests.responses([("abc", {"until": until, "max_gen_toks": 8}) for until in (stops, stops[0])])
    pairs = [("two and two", " four"), ("two and two", " five"), ("", "alone"), ("trailing ", "space"), (long, " end")]
    return {
        "whole": whole,
        "stopped": stopped,
        "stops": stops,
        "pairs": requests.log_likelihoods(pairs),
        "uncut": Requests(engine, tokenizer, beyond, config, objective_of(config), context).log_likelihoods(pairs[-1:]),
        "documents": requests.document_log_likelihoods(["a" * 200, "b", ""]),
    }


def test_requests_are_answered_alike_on_every_layout(tmp_path: Path) -> None:
    expected = run_ranks(answers, 1, small_config(tmp_path, model={"init_std": 0.3}))[0]
    whole, (one, other) = expected["whole"], expected["stops"]
    assert [len(text) for text in whole[:2]] == [8, 6]
    assert all(0 < len(text) <= 8 for text in whole)  # padding that an untrained model writes has no letter
    assert expected["stopped"] == [min(whole[0].split(stop)[0] for stop in (one, other)), whole[0].split(one)[0]]
    assert all(likelihood < 0.0 for likelihood, _ in expected["pairs"])
    assert expected["uncut"][0][0] != expected["pairs"][-1][0]  # 80 tokens of prompt, not the last 60
    assert expected["documents"][0] < expected["documents"][1] < expected["documents"][2] == 0.0
    for parallel, ranks in (({}, 2), ({"tensor": 2}, 2)):
        config = small_config(tmp_path, model={"init_std": 0.3}, parallel=parallel)
        for result in run_ranks(answers, ranks, config):
            assert [result[name] for name in ("whole", "stopped")] == [expected[name] for name in ("whole", "stopped")]
            assert result["documents"] == pytest.approx(expected["documents"], rel=1e-5)
            assert [pair[1] for pair in result["pairs"]] == [pair[1] for pair in expected["pairs"]]


def test_what_tasks_ask_is_honoured() -> None:
    own = HarnessConfig()
    ours = HarnessConfig(gen_length=64)
    greedy = {"until": ["\n\n", ""], "do_sample": False, "temperature": 0.0, "max_gen_toks": 100}
    assert wish(greedy, own) == Wish(100, (), ("\n\n",))
    assert wish(greedy, ours) == Wish(64, (), ("\n\n",))
    assert wish({}, own) == Wish(256, (), ())
    assert wish({"until": "Q:", "max_new_tokens": 5}, own) == Wish(5, (), ("Q:",))
    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert wish(sampled, own).sampling == (("temperature", 0.5), ("top_p", 0.9))
    assert wish({**sampled, "do_sample": False}, own).sampling == ()


@pytest.mark.parametrize(
    ("settings", "tokens", "expected"),
    [
        ([], 256, (256, 32, 256)),
        ([], 100, (128, 32, 128)),  # whole blocks, of which 100 tokens are kept
        ([], 12, (12, 12, 12)),
        (["block_length=8", "steps=16"], 100, None),  # 13 blocks
        (["block_length=8", "steps=26"], 100, (104, 8, 26)),
        ([], 1023, None),  # in 32 blocks, nothing is left for a prompt
    ],
)
def test_lengths_are_whole_blocks(settings: list[str], tokens: int, expected: tuple[int, int, int] | None) -> None:
    section = load_section(HarnessConfig, settings)
    if expected is None:
        with pytest.raises(UserError, match=f"{tokens} (response )?tokens"):
            generation_for(Wish(tokens, (), ()), section, 1024)
        return
    found = generation_for(Wish(tokens, (), ()), section, 1024)
    assert (found.gen_length, found.block_length, found.steps) == expected


TASKS = {
    "generated": {
        "output_type": "generate_until",
        "doc_to_target": "{{response}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, trained for a step, and tasks over a file of questions."""
    folder = tmp_path_factory.mktemp("harness")
    record = {"question": "a b", "answer": 0, "choices": ["b a", "c"], "response": "b a"}
    (folder / "data.jsonl").write_text((json.dumps(record) + "\n") * 8, encoding="utf-8")
    letters = tokenizers.Tokenizer(tokenizers.models.BPE())
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    letters.train_from_iterator(["a"], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    letters.save(str(folder / "tokenizer.json"))
    data = {"train": str(folder / "data.jsonl"), "tokenizer": str(folder / "tokenizer.json")}
    columns = {"columns": {"prompt": "question", "response": "response"}}
    tokens = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "</s>"}
    config = small_config(folder, model={"vocab_size": "tokenizer"}, data={**data, **columns, **tokens})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    arguments = ["--config", str(folder / "config.yaml"), "schedule.steps=1"]
    result = run_program_ranks("launch/train.py", arguments)[0]
    assert result.exit_code == 0, result.stderr
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
        common = {"task": name, "test_split": "test", "doc_to_text": "{{question}}", **source}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")
    return folder


def evaluate(folder: Path, names: str, *arguments: str) -> list[ProgramResult]:
    command = ["--run-dir", str(folder / "run"), "--harness", names, "num_times=4", *arguments]
    return run_program_ranks("launch/evaluate.py", command, 2)


@NEEDED
@pytest.mark.parametrize("layout", [[], ["--tensor", "2"]])
def test_tasks_end_well_on_every_rank(layout: list[str], folder: Path) -> None:
    results = evaluate(folder, ",".join(str(folder / f"{name}.yaml") for name in TASKS), *layout)
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "generated: exact_match,none " in results[0].stdout
    assert "chosen: acc,none " in results[0].stdout
    scored = json.loads((folder / "run" / "harness.json").read_text())
    assert scored["n-samples"]["generated"] == {"original": 8, "effective": 8}
    lines = (folder / "run" / "harness_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["generated"] * 8 + ["chosen"] * 8


@NEEDED
def test_tasks_that_cannot_be_loaded_are_one_line(folder: Path) -> None:
    away = folder / "away.yaml"
    away.write_text(yaml.safe_dump({"task": "away", "dataset_path": str(folder / "nowhere"), **TASKS["generated"]}))
    for names, message in (("arc_eazy", "did you mean arc_easy?"), (f"{away},x.yaml", "cannot be loaded")):
        for result in evaluate(folder, names):
            assert result.exit_code == 1
            (line,) = result.stderr.strip().splitlines()
            assert line.removeprefix("rank 1: ").startswith("error: --harness: "), line
            assert message in line
