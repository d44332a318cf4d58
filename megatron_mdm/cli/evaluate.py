"""Score a run: mdm evaluate [--nproc RANKS] --run-dir DIR --data test.jsonl --task gsm8k [gen_length=128 …]
Tasks: answers that are exactly right (gsm8k, gsm8k_tags, hitab, openscience, countdown, sudoku), perplexity,
multiple_choice; images that are drawn of captions: clip_score, image_scores (of tinted digits); or --harness with names
of tasks of EleutherAI's lm-eval."""

import argparse

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.checkpoint import load  # noqa: E402
from megatron_mdm.checkpoint.run_weights import ADAPTERS, distinct_labels  # noqa: E402
from megatron_mdm.cli.image_scores import real_digits  # noqa: E402
from megatron_mdm.config.errors import UserError  # noqa: E402
from megatron_mdm.config.load import load_section  # noqa: E402
from megatron_mdm.data.records import ON_ERROR, bad_lines  # noqa: E402
from megatron_mdm.evaluation.measure import Source  # noqa: E402
from megatron_mdm.evaluation.measures import MEASURES, write_result  # noqa: E402
from megatron_mdm.objectives import objective_of  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from megatron_mdm.parallel.watchdog import watch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    load.add_run_arguments(parser)
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="FOLDER",
        help=f"{ADAPTERS}; several: each is scored, the model being loaded once",
    )
    parser.add_argument("--data", default="", help="see megatron_mdm/evaluation/README.md; perplexity: the run's own")
    parser.add_argument("--task", choices=sorted(MEASURES), default="gsm8k")
    parser.add_argument("--harness", default="", metavar="TASK,…", help="tasks of lm-eval, which is asked for the data")
    parser.add_argument("--clip", default="", help="clip_score: folder of a CLIP model of transformers")
    parser.add_argument(
        "--digits", nargs=2, default=(), metavar=("TRAIN", "TEST"), help="image_scores: real ones, `mdm prepare digits`"
    )
    parser.add_argument("--limit", type=int, default=0, help="questions to ask; 0: all")
    parser.add_argument("--on-error", choices=ON_ERROR, default="", help="bad records; else the run's data.on_error")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="of generation, or of likelihoods; data.template …"
    )
    arguments = parser.parse_intermixed_args()
    measure = MEASURES[arguments.task]
    if not arguments.harness and not arguments.data and measure.needs_data:
        raise UserError("give --data, or --harness")
    if arguments.harness:
        from megatron_mdm.evaluation.harness import HARNESS as measure

    overrides = load.Overrides.of(arguments.settings)
    config = load.run_config(arguments.run_dir, arguments.tensor, arguments.pipeline, overrides)
    on_error = arguments.on_error or config.data.on_error
    digits = real_digits(arguments.digits, on_error) if arguments.digits else None
    source = Source(arguments.harness or arguments.data, arguments.limit, on_error, arguments.clip, digits)
    settings = load_section(measure.settings, overrides.others)
    tokenizer = load.run_tokenizer(arguments.run_dir, config)
    evaluate = measure.prepare(source, settings, config, tokenizer, objective_of(config))
    context = initialize(config.parallel, hang_minutes=config.faults.hang_minutes)
    if context.is_main:
        print(f"device: {platform.describe()}", flush=True)
    watch(arguments.run_dir, config.faults.hang_minutes, context)
    weights = load.run_weights(arguments.run_dir, config, context, arguments.checkpoint, overrides.base)
    adapters = [weights.adapter(wish) for wish in arguments.adapter or [""]]
    run = load.LoadedRun(weights, adapters[0], config, context)
    about = {"task": "harness" if arguments.harness else arguments.task, "data": source.path}
    about["checkpoint"] = run.engine.source
    for adapter, label in zip(adapters, distinct_labels(adapters)):
        run.take(adapter)
        result = evaluate(run.engine, context)
        if context.is_main:
            bad = bad_lines(result.get("num_bad", 0), result.get("first_bad", ()))
            print("\n".join([*adapter.lines(), *measure.summary(result), *bad]))
            written = write_result(arguments.run_dir, measure, {**about, **adapter.identity(), **result}, label)
            print(*(f"{name}: {path}" for name, path in written.items()), sep="\n", flush=True)
