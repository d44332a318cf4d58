"""Plan a run before paying for it: memory, communication, time and cost on a cluster; the best layouts.

mdm plan --config sft/llada_8b_gsm8k --cluster h100-80gb --nodes 4 --samples 7473
mdm plan --config pretrain/8b --cluster h100-80gb --nodes 4 --search
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_mdm.cli.configs import config_path
from megatron_mdm.config.load import load_config
from megatron_mdm.data.tokenizer import load_tokenizer, resolve_vocabulary
from megatron_mdm.engine.deepspeed_section import check_deepspeed_section
from megatron_mdm.training.plan.cluster import PRESETS, read_cluster
from megatron_mdm.training.plan.plan import Samples, make_plan
from megatron_mdm.training.plan.search import search
from megatron_mdm.training.plan.tables import plan_text, search_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, or the name of a packaged one")
    parser.add_argument("--cluster", default="h100-80gb", help=f"{', '.join(PRESETS)}, or a YAML file")
    parser.add_argument("--nodes", type=int, default=0, help="in place of the cluster's")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="in place of the cluster's")
    parser.add_argument("--samples", type=int, default=0, help="of the training set, where 'schedule.epochs' is set")
    parser.add_argument(
        "--mean-length",
        type=float,
        default=0.0,
        help="tokens of a sample, eos padding included; default: data.max_length",
    )
    parser.add_argument(
        "--eligible", type=float, default=0.0, help="share of the tokens that is learnt; default: of images, else all"
    )
    parser.add_argument("--search", action="store_true", help="the best feasible layouts, in place of the config's")
    parser.add_argument("--top", type=int, default=10, help="how many of them")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    config = load_config(config_path(arguments.config), arguments.overrides)
    check_deepspeed_section(config)
    if config.model.vocab_size == "tokenizer" and Path(config.data.tokenizer).is_file():
        config = config.model_copy(update={"model": resolve_vocabulary(config.model, load_tokenizer(config.data))})
    cluster = read_cluster(arguments.cluster, arguments.nodes, arguments.gpus_per_node)
    samples = Samples(arguments.samples, arguments.mean_length, arguments.eligible)
    if arguments.search:
        plans = search(config, cluster, samples, arguments.top)
        print(json.dumps([plan.as_json() for plan in plans], indent=1) if arguments.json else search_text(plans))
        return
    plan = make_plan(config, cluster, samples)
    print(json.dumps(plan.as_json(), indent=1) if arguments.json else plan_text(plan))
    if not plan.is_feasible:
        sys.exit(2)
