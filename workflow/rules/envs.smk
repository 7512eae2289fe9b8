localrules:
    build_env,
    pack_env,
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


rule pack_env:
    input:
        ".envs/{environment}.json",
    output:
        ".envs/{environment}.{kind}",
    log:
        "logs/envs/{environment}.{kind}.log",
    benchmark:
        "logs/envs/{environment}.{kind}.tsv"
    wildcard_constraints:
        kind="tar|squashfs",
    message:
        "Packing environment {wildcards.environment} for the nodes' own disks"
    shell:
        f"{SCRIPT}/build_env.py {{wildcards.environment}} --archive {{wildcards.kind}} > {{log}} 2>&1"


rule envs:
    input:
        [EXPERIMENT.environment(kind).files for kind in EXPERIMENT.kinds_of_environments()],
