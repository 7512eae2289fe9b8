localrules:
    render,
    render_sbatch,


wildcard_constraints:
    stage="preflight|train|smoke_test|serve",


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


rule render:
    input:
        expand(
            f"{RESULTS}/render/{{stage}}/{{stage}}.sbatch",
            stage=["preflight", "train", "smoke_test", "serve"],
        ),
