localrules:
    stop,


rule train:
    input:
        base=receipt("prepare_model"),
        tokens=receipt("tokenize_data"),
        plan=receipt("refine_plan"),  # must fit; made again only when tokens or settings of train change
    output:
        receipt=receipt("train"),
    log:
        log_file("train"),
    benchmark:
        benchmark_file("train")
    params:
        settings=EXPERIMENT.settings("train"),
    message:
        "Training"
    shell:
        rendered_stage("train", folder="train", arguments="--in-workflow {resources.attempt}")


# Named on the command line only, also while another snakemake waits for training.
rule stop:
    log:
        log_file("stop"),
    message:
        "Asking training to save and end"
    shell:
        f"{SCRIPT}/stop.py {RESULTS} --logs {LOGS} 2>&1 | tee -i {{log}}"
