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
    retries: 2
    params:
        settings=EXPERIMENT.settings("train"),
    message:
        "Training"
    shell:
        render("train", folder="train") + stage(f"bash {RESULTS}/train/train.sbatch --in-workflow")
