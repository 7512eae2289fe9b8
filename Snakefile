# From raw chats to a served, tested model. Each stage ends with receipts/<rule>.json; the next one starts from it.
#   snakemake [target] --profile profiles/slurm [--configfile config/experiments/<yours>.yaml]
from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"  # configuration, paths, input functions
include: "workflow/rules/envs.smk"  # build_env
include: "workflow/rules/data.smk"  # prepare_data, tokenize_data
include: "workflow/rules/plan.smk"  # plan, refine_plan
include: "workflow/rules/model.smk"  # prepare_model
include: "workflow/rules/preflight.smk"  # preflight
include: "workflow/rules/rehearse.smk"  # rehearse
include: "workflow/rules/train.smk"  # train
include: "workflow/rules/convert.smk"  # convert_checkpoint, verify_model
include: "workflow/rules/serve.smk"  # smoke_test, serve
include: "workflow/rules/evaluate.smk"  # evaluate_base, evaluate
include: "workflow/rules/report.smk"  # build_report
include: "workflow/rules/render.smk"  # render_sbatch
include: "workflow/rules/clean.smk"  # clean, clean_preview


localrules:
    all,
    data,
    model,
    convert,
    report,


rule all:
    default_target: True
    input:
        [receipt(rule) for rule in stages.NEEDS],
        [receipt("evaluate")] if EXPERIMENT.evaluated() else [],


rule data:
    input:
        receipt("tokenize_data"),


rule model:
    input:
        receipt("prepare_model"),


rule convert:
    input:
        receipt("verify_model"),


rule report:
    input:
        receipt("build_report"),


complete_resources(workflow)


onstart:
    check_before_start(workflow)


onsuccess:
    tell_end(workflow, ok=True)


onerror:
    tell_end(workflow, ok=False)
