# Both submit nothing where the results are there already, and `evaluate` where the smoke test's job makes them.
rule evaluate_base:
    input:
        base=receipt("prepare_model"),
    output:
        receipt=receipt("evaluate_base"),
    log:
        log_file("evaluate_base"),
    benchmark:
        benchmark_file("evaluate_base")
    params:
        settings=EXPERIMENT.settings("evaluate_base"),
        tasks=EXPERIMENT.state_of_tasks(),
    message:
        "Evaluating the base model on the tasks"
    shell:
        evaluated_stage("evaluate_base", folder="evaluate/base")


rule evaluate:
    input:
        [receipt("evaluate_base")] if EXPERIMENT.compared_with_base() else [],
        passed_before_evaluation,
        model=receipt("verify_model"),
    output:
        receipt=receipt("evaluate"),
    log:
        log_file("evaluate"),
    benchmark:
        benchmark_file("evaluate")
    params:
        settings=EXPERIMENT.settings("evaluate"),
        tasks=EXPERIMENT.state_of_tasks(),
    message:
        "Judging the model by its results on the tasks"
    shell:
        evaluated_stage("evaluate", folder="evaluate")
