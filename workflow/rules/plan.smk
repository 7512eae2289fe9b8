localrules:
    plan,
    refine_plan,


# Nothing but the report waits for it: the same plan is made before any job starts (check_before_start).
rule plan:
    output:
        receipt=receipt("plan"),
    log:
        log_file("plan"),
    benchmark:
        benchmark_file("plan")
    resources:
        partition_of_training=partition_of_training,
    params:
        settings=EXPERIMENT.settings("plan"),
        resources=resources_of_training,
        base=EXPERIMENT.state_of_base(),
    message:
        "Planning memory, disk and time from estimates"
    shell:
        script(
            f"plan.py --settings {{params.settings:q}} --operational {operational_json('plan')} "
            f"--resources {{params.resources:q}} {{resources.partition_of_training:q}} --output {RESULTS}/plan --receipt {{output.receipt}}"
        )
        + show_plan("plan")


# Stands before train. Its params are train's own, so that a changed profile or `plan` section does not train again.
rule refine_plan:
    input:
        tokens=receipt("tokenize_data"),
    output:
        receipt=receipt("refine_plan"),
    log:
        log_file("refine_plan"),
    benchmark:
        benchmark_file("refine_plan")
    resources:
        training=resources_of_training,
        partition_of_training=partition_of_training,
    params:
        settings=EXPERIMENT.settings("refine_plan"),
    message:
        "Planning memory, disk and time for the counted tokens"
    shell:
        script(
            f"plan.py --rule refine_plan --settings {{params.settings:q}} --operational {operational_json('refine_plan')} "
            f"--resources {{resources.training:q}} {{resources.partition_of_training:q}} --tokens-receipt {{input.tokens}} "
            f"--output {RESULTS}/plan/refined --receipt {{output.receipt}}"
        )
        + show_plan("plan/refined")
