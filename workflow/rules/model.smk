rule prepare_model:
    output:
        receipt=receipt("prepare_model"),
    log:
        log_file("prepare_model"),
    benchmark:
        benchmark_file("prepare_model")
    params:
        arguments=EXPERIMENT.arguments("prepare_model"),
        base=EXPERIMENT.state_of_base(),
    message:
        "Checking the base model"
    shell:
        script(
            f"prepare_model.py {{params.arguments}} {operational('prepare_model')} --workers {{resources.cpus_per_task}} "
            "--receipt {output.receipt}"
        )
