localrules:
    render,
    render_sbatch,
    render_submission,


wildcard_constraints:
    stage="|".join(stages.OVER_NODES),


rule render_sbatch:
    output:
        f"{RESULTS}/render/{{stage}}/{{stage}}.sbatch",
    log:
        f"{LOGS}/render_sbatch/{{stage}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/render_sbatch.{{stage}}.tsv"
    params:
        place=render_place,
        settings=settings_of,
        operational=operational_of,
        allocation=allocation_of,
    message:
        "Rendering the sbatch script of {wildcards.stage}"
    shell:
        f"{SCRIPT}/render_sbatch.py {{wildcards.stage}} --output $(dirname {{output}}) {{params.place}} "
        "{params.allocation} --settings {params.settings:q} --operational {params.operational:q} 2> {log}"


# The outer jobs, in which the scripts above and the single commands of the other rules run.
rule render_submission:
    output:
        f"{RESULTS}/render/{{job}}/{{job}}.submission.txt",
    log:
        f"{LOGS}/render_submission/{{job}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/render_submission.{{job}}.tsv"
    params:
        text=submission_of,
    message:
        "Showing what is submitted for {wildcards.job}"
    shell:
        "printf '%s\\n' {params.text:q} > {output} 2> {log}"


rule render:
    input:
        submissions=jobs_to_preview,
        scripts=expand(
            f"{RESULTS}/render/{{stage}}/{{stage}}.sbatch",
            stage=stages.OVER_NODES,
        ),
