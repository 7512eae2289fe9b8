localrules:
    serve,


rule smoke_test:
    input:
        model=receipt("verify_model"),
    output:
        receipt=receipt("smoke_test"),
    log:
        log_file("smoke_test"),
    benchmark:
        benchmark_file("smoke_test")
    params:
        settings=EXPERIMENT.settings("smoke_test"),
        prompts=EXPERIMENT.state_of_prompts(),
    message:
        "Serving the model and testing its API"
    shell:
        rendered_stage("smoke_test", folder="serve")


# Submits a job that stays; it has no output, so asking for it always looks at what is running and acts.
rule serve:
    input:
        test=receipt("smoke_test"),
    log:
        f"{LOGS}/serve.log",
    params:
        settings=EXPERIMENT.settings("serve"),
        allocation=allocation_of_deployment,
    message:
        "Deploying the model for good"
    shell:
        deploy()
