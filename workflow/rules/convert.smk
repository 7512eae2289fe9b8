rule convert_checkpoint:
    input:
        train=receipt("train"),
        base=receipt("prepare_model"),
    output:
        receipt=receipt("convert_checkpoint"),
    log:
        log_file("convert_checkpoint"),
    benchmark:
        benchmark_file("convert_checkpoint")
    params:
        arguments=EXPERIMENT.arguments("convert_checkpoint"),
    message:
        "Converting the checkpoint to safetensors"
    shell:
        script(
            f"convert_checkpoint.py --checkpoint {path_from('train', 'checkpoint')} "
            f"--base {path_from('prepare_model', 'base')} "
            f"{{params.arguments}} {operational('convert_checkpoint')} --nodes {{resources.nodes}} --receipt {{output.receipt}}"
        )


rule verify_model:
    input:
        model=receipt("convert_checkpoint"),
        train=receipt("train"),
        base=receipt("prepare_model"),
    output:
        receipt=receipt("verify_model"),
    log:
        log_file("verify_model"),
    benchmark:
        benchmark_file("verify_model")
    params:
        arguments=EXPERIMENT.arguments("verify_model"),
    message:
        "Verifying the converted model"
    shell:
        script(
            f"verify_model.py --model {path_from('convert_checkpoint', 'model')} "
            f"--checkpoint {path_from('train', 'checkpoint')} --base {path_from('prepare_model', 'base')} "
            f"--train-receipt {{input.train}} {{params.arguments}} {operational('verify_model')} --workers {{resources.cpus_per_task}} --receipt {{output.receipt}}"
        )


# Named on the command line only, also while another snakemake waits for training: it has neither input nor output to lock.
rule snapshot:
    log:
        log_file("snapshot"),
    params:
        arguments=EXPERIMENT.arguments("snapshot"),
    message:
        "Converting a checkpoint of the training that goes on"
    shell:
        script(
            f"convert_snapshot.py {RESULTS} --base {path_from('prepare_model', 'base')} {{params.arguments}} "
            f"{operational('snapshot')} --nodes {{resources.nodes}}"
        )
