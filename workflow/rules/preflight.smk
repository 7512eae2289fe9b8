# Checks the nodes without training; train does the same on its own nodes as its first step (train.sbatch.j2).
rule preflight:
    input:
        plan=receipt("plan"),
    output:
        receipt=receipt("preflight"),
    log:
        log_file("preflight"),
    benchmark:
        benchmark_file("preflight")
    params:
        settings=EXPERIMENT.settings("preflight"),
        asked=preflight_is_asked(),
    message:
        "Checking the nodes of training"
    shell:
        rendered_stage("preflight", folder="preflight")
