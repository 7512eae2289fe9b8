"""The stages, each said once. Rules, scripts, templates, profiles and report are held against these rows by a test.

A new stage is a row here; whatever lists stages reads it. Any Python 3 must read this file, as `interpreter` does.
"""

from types import MappingProxyType
from typing import Mapping, NamedTuple, Optional, Tuple  # noqa: UP035


class Stage(NamedTuple):
    """One stage.

    Attributes:
        name: of its rule, log, receipt, profile entry, template and section in the report.
        purpose: one line for the report; empty: it has no section there.
        needs: stages whose receipts it takes, and the result of each that it reads (empty: the receipt alone).
        chain: whether target `all` makes it.
        advisory: whether an experiment is complete without it.
        shown_where_run: whether the report has its section only once it ran.
        environment: of its programs: ``workflow``, ``train`` or ``serve``.
        scripts: its programs under workflow/scripts, where they are not ``<name>.py`` alone.
        over_nodes: whether it runs on several nodes, by the template ``<name>.sbatch.j2``.
        local: whether its rule runs where Snakemake does, without a job of its own.
        nodes_of: the stage whose nodes it gets where the profile says nothing by its name.
        minutes: its time limit there; None: that stage's too.
        first_step_of: the stage in whose job it runs; it has no rule of its own.
    """

    name: str
    purpose: str
    needs: Mapping[str, str] = MappingProxyType({})
    chain: bool = True
    advisory: bool = False
    shown_where_run: bool = False
    environment: str = "workflow"
    scripts: Tuple[str, ...] = ()  # noqa: UP006
    over_nodes: bool = False
    local: bool = False
    nodes_of: Optional[str] = None  # noqa: UP045
    minutes: Optional[int] = None  # noqa: UP045
    first_step_of: Optional[str] = None  # noqa: UP045


TRAINED_FROM = {"prepare_model": "base", "tokenize_data": "tokens", "refine_plan": ""}
ASKED = {"chain": False, "advisory": True, "shown_where_run": True}  # by name on the command line
ON_TRAINING_NODES = {"environment": "train", "over_nodes": True, "nodes_of": "train", "minutes": 60}
EVALUATED = {"environment": "serve", "over_nodes": True, "nodes_of": "smoke_test", **ASKED}
FIRST_STEP = {"environment": "train", "scripts": ("preflight",), **ASKED}

# In the order in which the report shows them.
ROWS = (
    Stage("prepare_data", "Raw chats to one checked format"),
    Stage("tokenize_data", "Chats to token ids and loss masks", {"prepare_data": "data"}),
    Stage("plan", "Whether the run fits the cluster", advisory=True, local=True),
    Stage("prepare_model", "Base model in BF16"),
    Stage(
        "refine_plan",
        "The plan again, with counted tokens",
        {"tokenize_data": ""},
        advisory=True,
        shown_where_run=True,
        scripts=("plan",),
        local=True,
    ),
    Stage("preflight", "Nodes checked without training", {"plan": ""}, **ON_TRAINING_NODES, **ASKED),
    Stage("rehearse_preflight", "Nodes checked as the rehearsal's first step", first_step_of="rehearse", **FIRST_STEP),
    Stage(
        "rehearse",
        "Training rehearsed: left, resumed, held against the plan",
        TRAINED_FROM,
        scripts=("rehearse", "train"),
        **ON_TRAINING_NODES,
        **ASKED,
    ),
    Stage("train_preflight", "Nodes checked as training's first step", first_step_of="train", **FIRST_STEP),
    Stage("train", "Full-parameter fine-tuning", TRAINED_FROM, environment="train", over_nodes=True),
    Stage(
        "convert_checkpoint", "Checkpoint to a Hugging Face folder", {"train": "checkpoint", "prepare_model": "base"}
    ),
    Stage(
        "verify_model",
        "Converted model against base and checkpoint",
        {"convert_checkpoint": "model", "train": "checkpoint", "prepare_model": "base"},
    ),
    Stage(
        "smoke_test",
        "Served model tested over its API",
        {"verify_model": "model"},
        environment="serve",
        scripts=("serve_node", "smoke_test"),
        over_nodes=True,
    ),
    Stage(
        "evaluate_base",
        "Base model evaluated on tasks",
        {"prepare_model": "base"},
        scripts=("serve_node", "evaluate_served"),
        **EVALUATED,
    ),
    Stage(
        "evaluate",
        "Model evaluated on tasks",
        {"verify_model": "model"},
        scripts=("serve_node", "evaluate_served"),
        **EVALUATED,
    ),
    # no sections of the report from here on
    Stage(
        "serve",
        "",
        {"smoke_test": ""},
        chain=False,
        environment="serve",
        scripts=("serve_node",),
        over_nodes=True,
        local=True,
        nodes_of="smoke_test",
    ),
    Stage("snapshot", "", chain=False, scripts=("convert_snapshot",), nodes_of="convert_checkpoint"),
)
REPORT = "build_report"  # the last stage of all: it takes every receipt of the chain

BY_NAME = {stage.name: stage for stage in ROWS}
CHAIN = tuple(stage.name for stage in ROWS if stage.chain)
SECTIONS = tuple(stage.name for stage in ROWS if stage.purpose)
OVER_NODES = tuple(stage.name for stage in ROWS if stage.over_nodes)
NEEDS = dict({name: tuple(BY_NAME[name].needs) for name in CHAIN}, **{REPORT: CHAIN})


def environment_of(name: str) -> str:
    """Environment of a stage: ``workflow``, ``train`` or ``serve``."""
    return BY_NAME[name].environment if name in BY_NAME else "workflow"


def run_by(environment: str) -> Tuple[str, ...]:  # noqa: UP006
    """Names of the stages that have a rule and run in an environment."""
    return tuple(stage.name for stage in ROWS if stage.environment == environment and not stage.first_step_of)


def below(name: str) -> set:
    """Names of all stages of the chain, and of the report, that stand on one."""
    found = set()
    for stage, needed in NEEDS.items():  # in order, so that what stands between comes first
        if set(needed) & ({name} | found):
            found.add(stage)
    return found


def above(name: str) -> Tuple[str, ...]:  # noqa: UP006
    """Names of all stages that one of the chain stands on, in order."""
    return tuple(stage for stage in CHAIN if name in below(stage))
