rule prepare_data:
    output:
        receipt=receipt("prepare_data"),
    log:
        log_file("prepare_data"),
    benchmark:
        benchmark_file("prepare_data")
    params:
        arguments=EXPERIMENT.arguments("prepare_data"),
        sources=EXPERIMENT.state_of_sources(),
    message:
        "Checking and merging chats"
    shell:
        script("prepare_data.py {params.arguments} --workers {resources.cpus_per_task} --receipt {output.receipt}")


rule tokenize_data:
    input:
        data=receipt("prepare_data"),
        tokenizer=[receipt("prepare_model")] if EXPERIMENT.tokenizer_is_made() else [],
    output:
        receipt=receipt("tokenize_data"),
    log:
        log_file("tokenize_data"),
    benchmark:
        benchmark_file("tokenize_data")
    params:
        arguments=EXPERIMENT.arguments("tokenize_data"),
    message:
        "Tokenising chats"
    shell:
        script("tokenize_data.py {params.arguments} --workers {resources.cpus_per_task} --receipt {output.receipt}")
