"""`mdm prepare inspect`: what training will see, for a person's eyes."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_mdm.cli.configs import config_path
from megatron_mdm.config.files import write_json
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import BatchConfig, RunConfig
from megatron_mdm.data.batching import CUTS, computed_tokens, cut
from megatron_mdm.data.loader import TrainLoader
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.reports.plots import save_figure
from megatron_mdm.training.inputs import Dataset, describe_data, resolve

GREEN = "\033[32m"
RESET = "\033[0m"
NUM_STEPS = 50  # whose efficiency is measured


def inspect_data(arguments: argparse.Namespace) -> None:
    """Print samples and figures; write inspect.json and lengths.png."""
    config, data = resolve(load_config(config_path(arguments.config), arguments.overrides))
    print(describe_data(data, config))
    for message in getattr(data.train, "first_bad", ()):
        print(f"skipped: {message}")
    marks = ("⟦", "⟧") if arguments.no_color else (GREEN, RESET)
    rows = np.linspace(0, len(data.train) - 1, min(arguments.samples, len(data.train))).astype(int)
    for row in rows:
        sample = data.train.samples[int(row)]
        print(f"\nsample {row}: {len(sample.tokens)} tokens, {np.count_nonzero(sample.eligible)} eligible")
        print(shown(sample, data.tokenizer, marks))
    result = figures(config, data.train)
    print(f"\n{'mode':<10}{'padding efficiency':>20}{'micro-batches a step':>22}{'tokens at most':>16}")
    for name, mode in result["modes"].items():
        count = mode["micro_batches_per_step"]
        most = mode["most_tokens"]
        print(f"{name:<10}{mode['padding_efficiency']:>20.3f}{count:>22.1f}{most:>16,}")
    write_json(arguments.output / "inspect.json", result)
    save_figure(length_figure(data.train), arguments.output / "lengths.png")
    print(f"written: {arguments.output / 'inspect.json'}, {arguments.output / 'lengths.png'}")


def shown(sample: Sample, tokenizer: Tokenizer, marks: tuple[str, str]) -> str:
    """The sample's text, its targets between the marks; end tokens are shown, documents apart."""
    ends = set(np.cumsum(sample.segments).tolist())
    text = ""
    run: list[int] = []
    learnt = False

    def flush() -> str:
        begin, end = marks if learnt else ("", "")
        return f"{begin}{tokenizer.decode_all(run)}{end}" if run else ""

    for place, (token, eligible) in enumerate(zip(sample.tokens.tolist(), sample.eligible.tolist())):
        if eligible != learnt or place in ends:
            text = text + flush() + ("\n--- another document ---\n" if place in ends else "")
            run = []
        learnt = eligible
        run.append(token)
    return text + flush()


def figures(config: RunConfig, data: Dataset) -> dict[str, Any]:
    """Lengths, and for each way of batching: useful / computed tokens, micro-batches a step, tokens of the largest."""
    lengths = data.lengths()
    eligible = data.num_eligible()
    return {
        "samples": len(data),
        "tokens": int(lengths.sum()),
        "eligible_tokens": int(eligible.sum()),
        "length_quantiles": {str(q): float(np.quantile(lengths, q)) for q in (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)},
        "left_out_for_length": data.num_too_long,
        "bad": data.num_bad,
        "modes": {mode: _batching(config, data, mode) for mode in CUTS},
    }


def _batching(config: RunConfig, data: Dataset, mode: str) -> dict[str, float]:
    budget = 0 if mode == "padded" else config.batch.micro_tokens
    batch = BatchConfig.model_validate({**config.batch.model_dump(), "mode": mode, "micro_tokens": budget})
    views = config.diffusion.rows_per_sample
    loader = TrainLoader(data, batch=batch, views=views, data_rank=0, data_size=1, pad_id=0, seed=config.seed)
    useful = 0
    computed = 0
    micro_batches = 0
    most = 0
    steps = min(NUM_STEPS, max(1, len(data) // batch.global_size))
    for step in range(steps):
        lengths = loader.lengths[loader.sample_ids(step)]
        parts = cut(lengths, batch, views, 1)
        sizes = [computed_tokens(lengths, part, mode) for part in parts]
        useful = useful + int(lengths.sum())
        computed = computed + sum(sizes)
        micro_batches = micro_batches + len(parts)
        most = max(most, views * max(sizes))
    return {
        "padding_efficiency": useful / computed,
        "micro_batches_per_step": micro_batches / steps,
        "most_tokens": most,
    }


def length_figure(data: Dataset) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bins = np.histogram_bin_edges(np.concatenate([data.lengths(), data.num_eligible()]), bins=40)
    axes.hist(data.lengths(), bins=bins.tolist(), alpha=0.6, label="tokens")
    axes.hist(data.num_eligible(), bins=bins.tolist(), alpha=0.6, label="eligible tokens")
    axes.set(xlabel="tokens of a sample", ylabel="samples")
    axes.legend()
    return figure
