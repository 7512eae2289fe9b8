# Named on the command line only: no stage waits for it, and a finished rehearsal is no training.
rule rehearse:
    input:
        base=receipt("prepare_model"),
        tokens=receipt("tokenize_data"),
        plan=receipt("refine_plan"),
    output:
        receipt=receipt("rehearse"),
    log:
        log_file("rehearse"),
    benchmark:
        benchmark_file("rehearse")
    params:
        settings=EXPERIMENT.settings("rehearse"),
        resources=resources_of_training,
    message:
        "Rehearsing training on its own nodes: five steps, saved, left and entered again"
    shell:
        rendered_stage("rehearse", folder="rehearsal", more=judged_by())
