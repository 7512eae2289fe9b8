localrules:
    build_env,
    envs,


rule build_env:
    input:
        lock_files,
    output:
        ".envs/{environment}.json",
    log:
        "logs/envs/{environment}.log",
    benchmark:
        "logs/envs/{environment}.tsv"
    message:
        "Building environment {wildcards.environment}"
    shell:
        f"{SCRIPT}/build_env.py {{wildcards.environment}} --marker {{output}} > {{log}} 2>&1"


rule envs:
    input:
        [EXPERIMENT.environment_markers(stage) for stage in ("train", "serve")],
